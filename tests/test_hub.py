"""Uploads with the real `huggingface_hub` client, to a server on loopback that stands in for the Hub."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer


TESTS = Path(__file__).parent
SETUP = f"import sys; sys.path.insert(0, {str(TESTS)!r}); sys.argv.append('')\n"
TRAIN = """
import tiny
from trl_rlad import RLADTrainer

student, teacher, output_dir, token = sys.argv[1:5]
config = tiny.make_config(
    output_dir,
    max_steps=1,
    push_to_hub=True,
    hub_model_id="tester/pupil",
    hub_token=token,
    hub_strategy="end",
    save_strategy="steps",
    save_steps=1,
)
trainer = RLADTrainer(student, tiny.reward, config, tiny.make_dataset(), teacher_model=teacher)
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
        "| `alpha` | 0.5 |",
        "| `teacher_log_ratio_clip` | 1.0 |",
        "| Dataset | puzzles/knights |",
    ):
        assert expected in card, expected
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
