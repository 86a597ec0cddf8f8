"""
The wheel alone: `trl-rlad` in an environment of its own and in a folder with nothing but data, as after `pip install`.

The environment borrows the other packages from the one that tests run in; `tests/wheel/run` fetches them anew.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from hub_server import HubServer
from test_front_door import Place


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models and a data set, and the command that the wheel installs."""
    source, wheels, env = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "env"))
    shutil.copytree(ROOT / "trl_rlad", source / "trl_rlad", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    options = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (wheel,) = wheels.glob("trl_rlad-*.whl")
    subprocess.run([*pip, "--python", env / "bin" / "python", "install", *options, wheel], check=True)
    (packages,) = env.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    place = Place(tmp_path_factory.mktemp("place"))
    place.command = str(env / "bin" / "trl-rlad")
    return place


def run(place, *arguments, env=None, status=0):
    """Run the command in the folder. Returns what it has printed."""
    environment = (env or os.environ | {"HF_HUB_OFFLINE": "1"}) | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # of the source
    command, start = [place.command, *map(str, arguments)], time.perf_counter()
    result = subprocess.run(command, cwd=place.folder, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == status, result.stdout + result.stderr[-3000:]
    print(f"{time.perf_counter() - start:.0f} s: trl-rlad {' '.join(map(str, arguments))[:90]}")
    return result.stdout


def log_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_the_main_job_without_a_clone(place):
    stdout = run(place, "train", "--max_steps", 3, "--train_size", 64, "--eval_size", 24)
    assert re.search(r"^teacher  chains_gpt_strong, whole on each process", stdout, re.MULTILINE)
    assert re.search(r"^ +chains  mean@1 +[\d.]+% -> +[\d.]+%$", stdout, re.MULTILINE)
    out = place.folder / "outputs" / "chains-rlad"
    assert (out / "model.safetensors").exists()
    assert "trl-rlad train --max_steps 3" in (out / "README.md").read_text()
    stdout = run(place, "evaluate", "--model_name_or_path", out, "--eval_size", 24, "--num_samples", 1)
    assert "overall" in stdout
    stdout = run(place, "distil", "--max_steps", 2, "--num_prompts", 24, "--samples_per_prompt", 1, "--eval_size", 24)
    assert (place.folder / "outputs" / "chains-offline" / "model.safetensors").exists()


def test_a_local_file_and_accuracy_reward_and_resumption(place):
    out = place.folder / "local"
    data = ["--dataset_name", "problems/train.jsonl", "--reward_funcs", "accuracy_reward", "my_rewards.varied"]
    arguments = place.arguments(*data, "--output_dir", out, "--save_strategy", "steps", "--save_steps", 2)
    stdout = run(place, "train", *arguments, "--max_steps", 4)
    assert "rewards: accuracy_reward, varied" in stdout and (out / "model.safetensors").exists()
    whole = log_of(out)
    shutil.rmtree(out / "checkpoint-4")
    run(place, "train", *arguments, "--max_steps", 4, status=2)  # there are checkpoints of another run
    run(place, "train", *arguments, "--max_steps", 4, "--resume_from_checkpoint", "true")
    losses, again = ([log["loss"] for log in logs if "loss" in log] for logs in (whole, log_of(out)))
    assert losses == again and len(losses) == 4


def test_two_processes_under_zero3(place):
    out = place.folder / "zero3"
    launch = "--accelerate_config zero3 --num_processes 2 --mixed_precision no --main_process_port 0".split()
    stdout = run(place, "train", *launch, *place.arguments("--output_dir", out))
    assert "2 processes, DeepSpeed" in stdout and "sharded over all processes" in stdout
    assert (out / "model.safetensors").exists() and len([log for log in log_of(out) if "loss" in log]) == 2
    stderr_of_refusal = run(place, "train", *launch, *place.arguments("--output_dir", out, "--alpha", 2), status=1)
    assert "device" not in stderr_of_refusal  # the processes have said why


def test_two_teachers_and_a_push(place, tmp_path):
    teachers = json.dumps({"near": f"{place.folder}/student", "far": f"{place.folder}/teacher"})
    arguments = place.arguments("--output_dir", place.folder / "two", "--per_device_train_batch_size", 8)
    arguments[3] = teachers  # after `--teacher_model_name_or_path`
    with HubServer() as hub:
        env = hub.env(tmp_path) | {"HF_TOKEN": hub.token}
        stdout = run(place, "train", *arguments, "--push_to_hub", "--hub_model_id", "tester/two", env=env)
    assert "near: student" in stdout and "Pushed to tester/two" in stdout
    assert {"README.md", "model.safetensors"} <= set(hub.repos["tester/two"])
    assert any("teacher/near/log_ratio" in log for log in log_of(place.folder / "two"))
