"""
What the README and the pages of `docs/` tell a reader to type, and what they say about metrics, held against the code.
"""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import yaml
from teacher_server import TeacherServer
from test_routing import make_dataset
from trl import GRPOConfig

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.cli import COMMANDS
from trl_rlad.scripts import distil, evaluate, train


ROOT = Path(__file__).parent.parent


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "trl_rlad/scripts/recipes/README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
PARSERS = {
    "examples/rlad_grpo.py": train.make_parser(),
    "examples/evaluate.py": evaluate.make_parser(),
    "examples/offline_distillation.py": distil.make_parser(),
}
COMMAND_PARSERS = dict(zip(("train", "evaluate", "distil"), PARSERS.values(), strict=True))
SETTINGS = {field.name for field in fields(RLADConfig)}
ARGUMENTS = {
    "RLADConfig": SETTINGS,
    "RLADTrainer": {name for cls in RLADTrainer.__mro__[:3] for name in inspect.signature(cls.__init__).parameters},
}
LAUNCHING = {"--accelerate_config", "--num_processes", "--help-all"}
SMALL = ("use_cpu", "bf16", "max_completion_length", "logging_steps", "report_to", "save_strategy", "learning_rate")
OF_OTHERS = {"k", "logprobs", "weights_only"}  # named on the pages with a value


def check_python(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ARGUMENTS:
            unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - ARGUMENTS[node.func.id]
            assert not unknown, f"{node.func.id} has no {unknown}"


def check_command(line):
    """The flags of a command line that runs a script of ours, and the files that it names."""
    words = shlex.split(line, comments=True)
    for word in words:
        if (
            re.fullmatch(r"(examples|benchmarks|tests|trl_rlad)/\S+\.\w+|\.?(ci|tests)/\S*run", word)
            and "NAME" not in word
        ):
            assert (ROOT / word).exists(), f"{word} isn't there"
    if "trl-rlad" in words and words[-1] != "trl-rlad":
        command, *rest = words[words.index("trl-rlad") + 1 :]
        assert command in COMMANDS, line
        if command in COMMAND_PARSERS:
            flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
            known = {*COMMAND_PARSERS[command]._option_string_actions, "--config", *LAUNCHING}
            assert flags <= known, f"`trl-rlad {command}` has no {flags - known}"
    for script in (word for word in words if word.endswith(".py") and (ROOT / word).exists()):
        flags = {word.partition("=")[0] for word in words[words.index(script) :] if word.startswith("--")}
        if script in PARSERS:
            known = {*PARSERS[script]._option_string_actions, "--config"}
        else:
            known = set(re.findall(r"--\w+", (ROOT / script).read_text()))
        assert flags <= known, f"{script} has no {flags - known}"


def check_bash(source):
    result = subprocess.run(["bash", "-n"], input=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line in re.split(r"\n|&&|\|\|?", source.replace("\\\n", " ")):
        check_command(line)


def check_yaml(source):
    known = {name.removeprefix("--") for name in PARSERS["examples/rlad_grpo.py"]._option_string_actions}
    assert yaml.safe_load(source).keys() <= known


def check_diff(source):
    after = "".join(f"{line[1:]}\n" for line in source.splitlines() if not line.startswith("-"))
    before = "".join(f"{line[1:]}\n" for line in source.splitlines() if not line.startswith("+"))
    is_python = "import" in after
    (check_python if is_python else check_bash)(after)
    (ast.parse if is_python else check_bash)(before)


CHECKS = {"python": check_python, "bash": check_bash, "yaml": check_yaml, "diff": check_diff}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks(page):
    text = page.read_text()
    for _, language, source in BLOCK.findall(text):
        assert language in {*CHECKS, "", "text", "bibtex"}, f"a block in {language!r}"
        if language in CHECKS:
            CHECKS[language](source)
    for command in re.findall(r"`((?:python|accelerate launch|tests/|trl-rlad) ?[^`]*)`", BLOCK.sub("", text)):
        check_bash(command)
    # A setting that is named with a value is one
    named = re.findall(r"`([a-z_]+)=[^`]*`", BLOCK.sub("", text))
    if page.name != "bad_input.md":
        assert set(named) <= SETTINGS | ARGUMENTS["RLADTrainer"] | OF_OTHERS


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("was", ["GRPO", "Distillation"])
def test_what_the_diffs_convert_runs_before_and_after(was, side, tmp_path, monkeypatch, student_path):
    (diff,) = (d for _, language, d in BLOCK.findall((ROOT / "docs/migrating.md").read_text()) if f"{was}Config" in d)
    dropped = "+" if side == "before" else "-"
    source = "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith(dropped))
    assert ("trl_rlad" in source) == (side == "after")
    source = source.replace("Qwen/Qwen3-0.6B", student_path)
    source = source.replace("Qwen/Qwen3-8B", tiny.save_model(tmp_path / "teacher", seed=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: tiny.make_dataset())
    monkeypatch.setattr("trl.rewards.accuracy_reward", tiny.reward)

    def shrink(cls):
        """A configuration as it stands there, in miniature."""

        def make(**kwargs):
            small = {name: getattr(tiny.make_config("outputs"), name) for name in SMALL}
            return cls(**small | {"max_steps": 2} | kwargs)

        return make

    namespace = {"shrink": shrink}
    exec(re.sub(r"args=(\w+Config)\(", r"args=shrink(\1)(", source), namespace)
    logs = [log for log in namespace["trainer"].state.log_history if "grad_norm" in log]
    assert len(logs) == 2 and all(log["grad_norm"] > 0 for log in logs)
    assert any(name.startswith("teacher/") for name in logs[0]) == (side == "after")


def test_the_worked_example_prints_what_the_page_says(capsys):
    text = (ROOT / "docs/architecture.md").read_text()
    section = text[text.index("## One token") : text.index("## How to")]
    (_, _, source), (_, _, output) = BLOCK.findall(section)
    exec(source, {})
    assert capsys.readouterr().out == output


def test_the_page_on_settings_is_the_docstring():
    sys.path.insert(0, str(ROOT / "docs"))
    hooks = pytest.importorskip("hooks", reason="it needs the extra `docs`")
    settings = hooks.list_settings(RLADConfig, GRPOConfig)
    assert set(re.findall("^### `(.*)`$", settings, re.MULTILINE)) == SETTINGS - {
        each.name for each in fields(GRPOConfig)
    }
    page = (ROOT / "docs/settings.md").read_text()
    assert page[page.index("## The objective") : page.index("\n## Columns")] == settings


def test_readme_links():
    for link in re.findall(r"\]\(([^)#\s]+)(?:#\S+)?\)", (ROOT / "README.md").read_text()):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_page_on_metrics_has_all_that_is_logged_and_nothing_else(tmp_path, student_path, teacher_path):
    near = tiny.save_renamed(tmp_path / "near", teacher_path)
    with TeacherServer(teacher_path) as server:
        config = tiny.make_config(
            tmp_path,
            max_steps=2,
            teacher_kl_coef=0.5,
            teacher_kl="forward",
            teacher_server_urls={"far": server.url},
            on_teacher_failure="grpo",
            per_device_eval_batch_size=4,
        )
        data, teachers = make_dataset(["near", "far"]), {"near": near, "far": None}
        trainer = RLADTrainer(student_path, tiny.reward, config, data, data.select(range(4)), teacher_model=teachers)
        trainer.train()
        trainer.evaluate()
    logged = set()
    for name in {name for log in trainer.state.log_history for name in log}:
        name = re.sub("^eval_(?=teacher/|clip_ratio/)", "", name)
        if re.match(r"teacher/|clip_ratio/\w+_by_|eval_rewards/.*/pass@", name):
            logged.add(re.sub("/(near|far|reward)/", "/NAME/", name).replace("pass@4", "pass@K"))

    rows = re.findall(r"^### `(\S+)`$", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    assert logged == set(rows) - {"scorer_failures"}
    assert '"scorer_failures"' in (ROOT / "trl_rlad/scripts/tasks/reasoning.py").read_text()
    readme = set(re.findall(r"`((?:teacher|clip_ratio|eval_rewards)/[\w@/]+)`", (ROOT / "README.md").read_text()))
    assert readme <= set(rows)
