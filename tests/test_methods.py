"""The methods of `trl_rlad/scripts/methods/`: what they set, over what, and that the pages say the same."""

import re
import sys
from ast import literal_eval
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from trl import ModelConfig, TrlParser

from trl_rlad import RLADConfig
from trl_rlad.scripts.arguments import (
    METHODS,
    MINI,
    find_checkpoint,
    get_init_kwargs,
    parse_arguments,
    read_method,
)
from trl_rlad.scripts.train import ScriptArguments


ROOT = Path(__file__).parents[1]


NAMES = sorted(path.stem for path in METHODS.glob("*.yaml"))
OBJECTIVE = {
    "alpha",
    "teacher_log_ratio_clip",
    "teacher_credit",
    "distillation_fraction",
    "teacher_kl_coef",
    "teacher_kl_coef_final",
    "teacher_kl",
    "teacher_top_k",
    "teacher_kl_on",
    "success_reward",
}
DEFAULTS = {field.name: field.default for field in fields(RLADConfig) if field.name in OBJECTIVE}
# What a page calls them
CALLED = {
    "GRPO": ["grpo"],
    "RLAD": ["rlad"],
    "the teacher names": ["rlad_named", "rlad_named_all", "grpo_named"],
    "credit": ["credit"],
    "KDRL": ["kdrl", "kdrl_bounded"],
    "on-policy distillation": ["opd", "opd_bounded", "opd_forward"],
    "distil, then": ["distil_then_grpo", "distil_then_rlad"],
}
LIST = re.compile(r"`(\w+=[^`=,]+(?:, \w+=[^`=,]+)*)`")


@pytest.fixture
def parse(monkeypatch):
    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlad_grpo.py", *map(str, arguments)])
        parser = TrlParser((ScriptArguments, RLADConfig, ModelConfig))
        return parse_arguments(parser, base=MINI / "config.yaml")

    return parse


def objective(args):
    """The settings that make the method, without those that have no effect in it."""
    idle = set() if args.objective.has_kl else {"teacher_kl", "teacher_top_k"}
    if args.distillation_fraction == 1.0:
        idle |= {"teacher_kl_coef", "teacher_kl_on"}
    if args.teacher_kl_coef == 0.0:
        idle |= {"teacher_kl_on"}
    return {name: getattr(args, name) for name in OBJECTIVE - idle}


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_the_same_alone_and_in_the_miniature(name, parse, tmp_path):
    text, settings = (METHODS / f"{name}.yaml").read_text(), read_method(name)
    assert re.match(r"# .+\n[^#]+$", text) and "alpha" in settings and settings.keys() <= OBJECTIVE
    small = {"use_cpu": True, "bf16": False, "lr_scheduler_type": "constant"}
    alone = RLADConfig(str(tmp_path), **small, **settings)
    script_args, args, _ = parse("--config", METHODS / f"{name}.yaml")
    assert objective(args) == objective(alone)
    assert (script_args.task, script_args.train_size, args.learning_rate) == ("chains", 2400, 2e-4)
    assert args.needs_teacher == (name != "grpo")


def test_what_the_miniature_is_the_base_of(parse, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("max_steps: 7\n")
    script_args, args, _ = parse("--config", config, "--alpha", 0.25)
    assert (args.max_steps, args.alpha, script_args.train_size) == (7, 0.25, 2400)
    for named in ("task: chain_sum", "model_name_or_path: x"):
        config.write_text(f"{named}\noutput_dir: {tmp_path}\nbf16: false\n")
        script_args, args, _ = parse("--config", config)
        assert (args.steps_per_generation, script_args.train_size) == (1, 10_000)
    small = ["--output_dir", tmp_path, "--bf16", "false"]
    script_args, args, _ = parse("--config", METHODS / "grpo.yaml", "--task", "chain_sum", *small)
    assert (args.alpha, script_args.train_size) == (1.0, 10_000)
    for form in ("--task=chain_sum", "--model-name-or-path=x"):
        script_args, args, _ = parse(form, *small)
        assert (args.steps_per_generation, script_args.train_size) == (1, 10_000)
    assert parse()[1].steps_per_generation == 2
    config.write_text("# nothing\n")
    with pytest.raises(ValueError, match="must be settings with their names, but is None"):
        parse("--config", config)


def test_what_is_said_of_the_student_is_what_it_is_loaded_with():
    model_args = SimpleNamespace(model_revision="v1", attn_implementation="eager", dtype="bfloat16")
    expected = {"revision": "v1", "attn_implementation": "eager", "dtype": "bfloat16", "trust_remote_code": True}
    args = SimpleNamespace(model_init_kwargs=None, trust_remote_code=True)
    assert get_init_kwargs(args, model_args) == expected
    kwargs = {"dtype": "float32", "cache_dir": "there"}  # which are nearer to the model
    args.model_init_kwargs = kwargs
    assert get_init_kwargs(args, model_args) == expected | kwargs


def test_the_checkpoint_that_is_meant(tmp_path):
    def find(wanted):
        return find_checkpoint(SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=wanted))

    assert find(None) is find("false") is None
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert find("true") == find("True") == str(tmp_path / "checkpoint-4")
    assert find(str(tmp_path / "checkpoint-2")) == str(tmp_path / "checkpoint-2")
    for wanted in (None, "false"):
        with pytest.raises(ValueError, match="`--resume_from_checkpoint true`"):
            find(wanted)


@pytest.mark.parametrize(("file", "method"), [("config", "rlad"), ("knights", "rlad_named")])
def test_the_jobs_in_miniature_take_the_method_that_they_say(file, method):
    config = yaml.safe_load((MINI / f"{file}.yaml").read_text())
    assert {name: config[name] for name in OBJECTIVE & config.keys()} == read_method(method)


def parse_value(text):
    try:
        return literal_eval(text)
    except (SyntaxError, ValueError):  # a word, as in YAML
        return text


def find_contradictions(text):
    """Lists of settings in rows of tables that name methods, but none that has these settings."""
    known = set().union(*map(read_method, NAMES))
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        lists = [dict(pair.split("=") for pair in found.split(", ")) for found in LIST.findall(row)]
        named = re.split(LIST, row)[0]
        methods = [DEFAULTS | read_method(name) for called in CALLED if called in named for name in CALLED[called]]
        for settings in lists:
            settings = {name: parse_value(value) for name, value in settings.items()}
            if methods and settings.keys() <= known:  # otherwise it is about something else
                if not any(settings.items() <= method.items() for method in methods):
                    yield row, settings


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md", "docs/settings.md"])
def test_the_pages_name_the_same_settings(page):
    assert not list(find_contradictions((ROOT / page).read_text()))


def test_a_page_that_names_others_is_found_out():
    rows = ["| KDRL | `alpha=1.0, teacher_kl_coef=2e-3` |", "| KDRL | `alpha=1.0, teacher_kl_coef=5e-3` | GRPO |"]
    rows.append('| RLAD, the teacher names | `teacher_kl="reverse", teacher_kl_on=failed` |')
    assert [row for row, _ in find_contradictions("\n".join(rows))] == rows[1:]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there bf16 is TRL's default, and ours")
def test_without_an_accelerator_bf16_is_not_the_default(parse, tmp_path):
    # In TRL it is, and refused there
    for arguments in (["--task", "chain_sum"], ["--model_name_or_path", "x"], ["--task", "mini", "--use_cpu", "true"]):
        assert not parse(*arguments, "--output_dir", tmp_path)[1].bf16
    assert parse("--task", "mini", "--bf16", "true", "--use_cpu", "true", "--output_dir", tmp_path)[1].bf16
