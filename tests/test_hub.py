"""Uploads with the real `huggingface_hub` client, to a server on loopback that stands in for the Hub."""

import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
import yaml
from accelerate import Accelerator
from hub_server import HubServer
from teacher_server import TeacherServer

from trl_rlad import RLADTrainer
from trl_rlad.model_card import launch_command


TESTS = Path(__file__).parent
SETUP = f"import sys; sys.path.insert(0, {str(TESTS)!r}); sys.argv.append('')\n"
TRAIN = """
import tiny
from trl_rlad import RLADTrainer

student, teacher, output_dir, token = sys.argv[1:5]
config = tiny.make_config(
    output_dir,
    max_steps=2,
    teacher_kl_coef=0.5,
    teacher_kl_coef_final=0.1,
    eval_strategy="steps",
    eval_steps=1,
    per_device_eval_batch_size=4,
    push_to_hub=True,
    hub_model_id="tester/pupil",
    hub_token=token,
    hub_strategy="end",
    save_strategy="steps",
    save_steps=1,
)
data = tiny.make_dataset()
trainer = RLADTrainer(student, tiny.reward, config, data, data.select(range(4)), teacher_model=teacher)
trainer.train()
"""
PUSH = TRAIN + "trainer.push_to_hub(dataset_name='puzzles/knights')\n"
LOAD = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (auto.from_pretrained("tester/pupil") for auto in (AutoModelForCausalLM, AutoTokenizer))
local = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert all(torch.equal(value, local.state_dict()[name]) for name, value in model.state_dict().items())
assert tokenizer("w0 w1").input_ids == [4, 5], tokenizer("w0 w1").input_ids
"""


def run(hub, home, script, *args):
    """Run `script` with `hub` as the Hub; the client reads its environment when it is imported."""
    env = hub.env(home) | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", SETUP + script, *map(str, args)], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def test_card_weights_and_tokenizer_arrive(hub, tmp_path, student_path, teacher_path):
    output_dir = tmp_path / "out"
    pushed = run(hub, tmp_path / "home", PUSH, student_path, teacher_path, output_dir, hub.token)
    assert pushed.returncode == 0, pushed.stderr
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub.repos["tester/pupil"].keys()

    card = hub.repos["tester/pupil"]["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert {"trl", "grpo", "rlad"} <= set(metadata["tags"]) and metadata["datasets"] == "puzzles/knights"
    for expected in (
        "trained with RLAD, a method introduced in [Reinforcement-aware Knowledge Distillation for LLM Reasoning]",
        "@article{zhang2026rlad",
        "@software{vonwerra2020trl",
        f"| Teacher | {Path(teacher_path).name} |",
        "| Dataset | puzzles/knights |",
        "| `alpha` | 0.5 |",
        "| `teacher_log_ratio_clip` | 1.0 |",
        "| `teacher_kl_coef` | 0.5 to 0.1 |",
        "| Steps | 2 |",
        "|  | step | reward/mean | reward/pass@1 | reward/pass@4 |",
        "\n|  | 1 | ",
        "\n|  | 2 | ",
        'pipeline("text-generation", model="tester/pupil"',
        "![The reward and the teacher over the steps of training](training.png)",
        f"trl-rlad {version('trl-rlad')}, trl {version('trl')}",
    ):
        assert expected in card, expected
    assert hub.repos["tester/pupil"]["training.png"].startswith(b"\x89PNG")
    assert str(tmp_path) not in card and teacher_path not in card, "a local path has left the machine"

    # The token is nowhere: not in the folder, its checkpoint or the pickled arguments, nor on the Hub, nor in the log
    written = [path.read_bytes() for path in output_dir.rglob("*") if path.is_file()]
    said = [pushed.stdout.encode(), pushed.stderr.encode()]
    assert (output_dir / "checkpoint-1" / "training_args.bin").exists()
    assert not any(hub.token.encode() in data for data in [*written, *hub.repos["tester/pupil"].values(), *said])

    loaded = run(hub, tmp_path / "another_home", LOAD, output_dir)
    assert loaded.returncode == 0, loaded.stderr


def test_a_token_refused_at_the_start_costs_no_training(hub, tmp_path, student_path, teacher_path):
    refused = run(hub, tmp_path / "home", PUSH, student_path, teacher_path, tmp_path / "out", "hf_bad")
    assert refused.returncode != 0 and "401" in refused.stderr
    assert "'loss'" not in refused.stdout and not hub.repos


def test_a_token_refused_at_the_end_loses_nothing(hub, tmp_path, student_path, teacher_path):
    # The token is revoked by a server in the same process, after training
    script = """
import os, tempfile
from hub_server import HubServer
hub = HubServer().__enter__()
os.environ.update(hub.env(tempfile.mkdtemp()))
""" + TRAIN.replace("trainer.train()", "trainer.train()\nhub.token = 'revoked'\ntrainer.push_to_hub()")
    output_dir = tmp_path / "out"
    refused = run(hub, tmp_path / "home", script, student_path, teacher_path, output_dir, "hf_good")
    assert refused.returncode != 0 and "401" in refused.stderr
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in output_dir.iterdir()
    }


def test_a_finished_folder_is_pushed_alone_and_an_upload_that_is_killed_loses_nothing(hub, tmp_path, make_trainer):
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    folder = Path(trainer.args.output_dir)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    # As docs/hub.md says it
    command = [
        Path(sys.executable).with_name("hf"),
        "upload",
        "tester/pupil",
        folder,
        ".",
        "--exclude",
        "checkpoint-*/*",
    ]
    env = hub.env(tmp_path / "home") | {"HF_TOKEN": hub.token}
    is_sending, store = threading.Event(), hub.lfs_put
    hub.lfs_put = lambda *args: is_sending.set() or {}  # takes the weights, and keeps nothing
    upload = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert is_sending.wait(60)
    upload.kill()
    upload.wait()
    assert "model.safetensors" not in hub.repos["tester/pupil"]
    assert {path: path.read_bytes() for path in before} == before

    hub.lfs_put = store
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    there = hub.repos["tester/pupil"]
    assert there["model.safetensors"] == before[folder / "model.safetensors"]
    assert {"README.md", "config.json", "tokenizer.json"} <= there.keys()
    assert not any(name.startswith("checkpoint-") for name in there)
    assert {path: path.read_bytes() for path in before} == before


def test_the_launch_command_keeps_secrets_and_folders_to_itself():
    arguments = ["/home/me/run.py", "--hub_token", "abc", "--hub_token=def", "--name", "hf_abcdefgh", "--x", "s3cret"]
    arguments += ["--output_dir", "/home/me/out", "--task_kwargs", '{"dataset": "/data/mine"}', "--config", "a/b.yaml"]
    arguments += ["--teacher_tokens_per_batch", "1024", "--teacher", "https://example.org/v1/teacher"]
    assert launch_command(arguments, {"s3cret", None}) == (
        "run.py --hub_token *** --hub_token=*** --name *** --x *** --output_dir out "
        '--task_kwargs \'{"dataset": "mine"}\' --config a/b.yaml --teacher_tokens_per_batch 1024 '
        "--teacher https://example.org/v1/teacher"
    )
    assert launch_command(["-c", "--x", "1"], set()) is None


def test_the_card_names_a_served_teacher_and_no_address(tmp_path, student_path, teacher_path, monkeypatch):
    with TeacherServer(teacher_path) as one, TeacherServer(teacher_path) as other:
        urls = [f"{one.url}/v1", other.url]
        command = ["/home/me/train.py", "--teacher_server_urls", *urls, "--alpha", "0.3"]
        monkeypatch.setattr(sys, "argv", command)
        args = tiny.make_config(tmp_path, teacher_server_urls=urls, alpha=0.3)
        RLADTrainer(student_path, tiny.reward, args, tiny.make_dataset()).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"| Teacher | {Path(teacher_path).name} |" in card and "| `alpha` | 0.3 |" in card
    assert "\ntrain.py --teacher_server_urls" in card and "--alpha 0.3\n" in card
    assert "127.0.0.1" not in card and f":{one.port}" not in card and f":{other.port}" not in card


def test_completions_in_a_step_and_processes(make_trainer, monkeypatch):
    trainer = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    # Two processes for the card alone, by a stub: a real launch of them takes half a minute
    for processes, launch, completions in ((1, "1 process", 12), (2, "2 processes", 24)):
        with monkeypatch.context() as stub:
            stub.setattr(Accelerator, "num_processes", processes)
            trainer.create_model_card()
        card = Path(trainer.args.output_dir, "README.md").read_text()
        assert f"| Completions in a step | {completions} |" in card
        assert f"\n# on {launch}\ntrain.py\n" in card


def test_an_address_that_another_begins_with_leaves_no_port():
    secrets = ["http://10.0.0.1", "http://10.0.0.1:8000"]
    assert launch_command(["run.py", *secrets], secrets) == "run.py *** ***"
