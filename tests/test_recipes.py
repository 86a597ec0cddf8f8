"""The recipes of the paper's runs, each run for one step with tiny models in place of the real ones."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from datasets import Dataset
from test_examples import chat_model  # noqa: F401
from transformers import AutoTokenizer

from trl_rlad import RLADTrainer
from trl_rlad.scripts import source, train
from trl_rlad.scripts.tasks import load_task
from trl_rlad.scripts.tasks.mathematics import INSTRUCTION, load_math, math_reward


pytest.importorskip("reasoning_gym")
ROOT = Path(__file__).parents[1]


RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"), key=lambda path: path.name)
METHODS = ["GRPO", "KDRL", "RLAD"]
# All that a recipe can't keep on a small CPU
TINY = {
    "train_size": 1,
    "eval_size": 1,
    "max_steps": 1,
    "max_completion_length": 4,
    "gradient_accumulation_steps": 1,
    "use_vllm": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def header(recipe):
    return re.match(r"(#.*\n)+", recipe.read_text()).group().replace("\\\n#", "")


def problem(question, answers=("12",)):
    """A row as in Skywork-OR1-RL-Data."""
    return {
        "data_source": "train-math-deepscaler",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"ground_truth": json.dumps(answers), "style": "rule"},
        "extra_info": {"index": 0, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-1.5B": 3}},
    }


@pytest.fixture(scope="module")
def teacher(chat_model, tmp_path_factory):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    path = tmp_path_factory.mktemp("teacher")
    return tiny.save_model(path, 1, tokenizer=tokenizer, vocab_size=len(tokenizer), hidden_size=24)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A folder with the problems 0 to 7 as the split `math`, whose prompts get longer and whose answers are halves."""
    path = tmp_path_factory.mktemp("problems")
    rows = [problem(f"What is {i}/2?{' ' * 50 * i}", [rf"\frac{{{i}}}{{2}}"]) for i in range(8)]
    Dataset.from_list(rows).to_parquet(path / "data" / "math-00000-of-00001.parquet")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(path / "cache"))
        yield str(path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_one_step(recipe, method, chat_model, teacher, problems, tmp_path, monkeypatch):  # noqa: F811
    trainers = []

    class Trainer(RLADTrainer):
        def __init__(self, *args, **kwargs):
            trainers.append(self)
            super().__init__(*args, **kwargs)

    def load_task(*args, **kwargs):
        task = original(*args, **kwargs)
        # Gibberish is rewarded all alike, which leaves nothing to learn
        return task._replace(reward=lambda **columns: [r + i % 2 for i, r in enumerate(task.reward(**columns))])

    original = source.load_task
    monkeypatch.setattr(source, "load_task", load_task)
    monkeypatch.setattr(train, "RLADTrainer", Trainer)
    monkeypatch.setattr(train, "plot_rewards", lambda *args: None)
    written = yaml.safe_load(recipe.read_text())
    overrides = {"model_name_or_path": chat_model, "teacher_model_name_or_path": teacher, "output_dir": tmp_path}
    overrides |= TINY | {"per_device_train_batch_size": written["num_generations"]}
    if written["task"] == "math":
        overrides["task_kwargs"] = json.dumps(written["task_kwargs"] | {"dataset": problems})
    documented = re.search(f"Append for {method}: (.*)", header(recipe))
    baseline = documented.group(1).split() if documented else []
    arguments = [*baseline, *(part for name, value in overrides.items() for part in (f"--{name}", str(value)))]
    monkeypatch.setattr(sys, "argv", ["rlad_grpo.py", "--config", str(recipe), *arguments])
    train.main()

    (trainer,) = trainers
    args = trainer.args
    for name, value in written.items():
        if f"--{name}" not in arguments and hasattr(args, name):
            assert getattr(args, name) == value, name
    assert (args.alpha, args.teacher_kl_coef) == {"GRPO": (1.0, 0), "KDRL": (1.0, 0.002), "RLAD": (0.5, 0)}[method]
    assert (args.teacher_kl, args.teacher_kl_on) == ("reverse", "all")
    assert trainer.state.global_step == 1
    (log,) = (log for log in trainer.state.log_history if "grad_norm" in log)
    assert 0 < log["grad_norm"] < math.inf
    assert ("teacher/log_ratio" in log) == (method == "RLAD")
    assert ("teacher/kl" in log) == (method == "KDRL")
    assert (trainer.teacher_scorer is None) == (method == "GRPO")
    assert ("entropy_coef" in log) == (written["task"] == "math")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_launch_lines(recipe):
    written = yaml.safe_load(recipe.read_text())
    lines = re.findall("accelerate launch.*", header(recipe))
    sizes = []
    for line in lines:
        flags = dict(re.findall(r"--(\w+) (\S+)", line.split("rlad_grpo.py")[0]))
        launcher = yaml.safe_load((ROOT / flags["config_file"]).read_text())
        processes = int(flags.get("num_processes", launcher["num_processes"]))
        script = written | dict(re.findall(r"--(\w+) (\S+)", line.split("rlad_grpo.py")[1]))
        assert ROOT / script["config"] == recipe
        accumulation = int(script["gradient_accumulation_steps"])
        assert written["per_device_train_batch_size"] * processes * accumulation == 256
        sizes.append(processes)
    is_math = written["task"] == "math"
    assert sizes == ([64, 8] if is_math else [8])
    assert written["num_generations"] == (16 if is_math else 8) and 256 % written["num_generations"] == 0
    room = 2048 if is_math else 1024
    assert written["vllm_max_model_length"] == written["max_completion_length"] + room
    assert written["output_dir"] == f"outputs/{recipe.stem}"


def test_readme_lists_every_recipe():
    readme = (recipes := RECIPES[0].parent).joinpath("README.md").read_text()
    rows = re.findall(r"^\| \[(\S+)\]\((\S+)\.yaml\) \| (.+) <- (.+) \| ([\d,]+) \|.* \|$", readme, re.MULTILINE)
    assert [row[0] for row in rows] == [row[1] for row in rows]
    assert sorted(row[0] for row in rows) == [recipe.stem for recipe in RECIPES]
    for name, _, student, teacher, tokens in rows:
        written = yaml.safe_load((recipes / f"{name}.yaml").read_text())
        assert written["model_name_or_path"].endswith(f"/{student}")
        assert written["teacher_model_name_or_path"].endswith(f"/{teacher}")
        assert written["max_completion_length"] == int(tokens.replace(",", ""))
        figures = re.search(rf"\[{name}\].*\| (\S+) / (\S+) / (\S+) \|$", readme, re.MULTILINE).groups()
        assert ", ".join(map(" ".join, zip(METHODS, figures, strict=True))) in header(recipes / f"{name}.yaml")


def test_load_math(problems):
    train, held_out, reward, _ = load_math(100, 3, dataset=problems)
    assert (len(train), len(held_out)) == (5, 3) and reward is math_reward
    rows = {row["prompt"][0]["content"].split("?")[0]: row for row in [*train, *held_out]}
    assert rows.keys() == {f"What is {i}/2" for i in range(8)}
    assert rows["What is 3/2"]["solution"] == r"\boxed{\frac{3}{2}}"
    assert all(row["prompt"][0]["content"].endswith(f"\n\n{INSTRUCTION}") for row in rows.values())
    again, held_out_again, *_ = load_math(2, 3, dataset=problems)
    assert again["prompt"][:] == train["prompt"][:2] and held_out_again["prompt"][:] == held_out["prompt"][:]
    assert load_math(2, 3, seed=1, dataset=problems).eval_dataset["prompt"][:] != held_out["prompt"][:]


def test_long_problems_are_left_out(problems, chat_model):  # noqa: F811
    # A byte is a token. Roles and marks: "<|im_start|>user\n" is 1 + 5, "<|im_end|>\n" 2, "<|im_start|>assistant\n" 1
    # + 10
    lengths = [len(f"What is {i}/2?{' ' * 50 * i}\n\n{INSTRUCTION}") + 19 for i in range(8)]
    train, *_ = load_math(8, tokenizer=chat_model, dataset=problems, max_prompt_length=lengths[4])
    assert sorted(train["solution"]) == [rf"\boxed{{\frac{{{i}}}{{2}}}}" for i in range(5)]
    settings = {"dataset": problems, "max_prompt_length": lengths[4] - 1}
    train, *_ = load_task("math", 8, tokenizer=chat_model, task_kwargs=settings)
    assert len(train) == 4


def test_a_problem_keeps_what_comes_before_it_and_its_own_instruction(tmp_path, monkeypatch):
    row = problem("Give it in \\boxed{}.", ["1", "2"])
    row["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    Dataset.from_list([row]).to_parquet(tmp_path / "data" / "math-00000-of-00001.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (row,) = load_math(1, dataset=str(tmp_path)).train_dataset
    assert row == {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Give it in \\boxed{}."},
        ],
        "solution": r"\boxed{1}",  # the first of those that are acceptable
        "difficulty": "",
    }


@pytest.mark.parametrize(
    ("content", "reward"),
    [
        (r"<think>Is it \boxed{1}? No.</think> So \boxed{\frac{3}{2}}.", 1.0),
        (r"\boxed{1.5}", 1.0),
        (r"<think>Is it \boxed{\frac{3}{2}}? No.</think> So \boxed{1}.", 0.0),
        ("3/2", 0.0),  # not where the answer was asked for
        ("", 0.0),
    ],
)
def test_math_reward(content, reward):
    completions, solution = [[{"role": "assistant", "content": content}]], [r"\boxed{\frac{3}{2}}"]
    assert math_reward(completions=completions, solution=solution, log_extra=None, difficulty=[""]) == [reward]
