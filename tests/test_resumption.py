"""The example scripts go on where they were told to, to the last bit, and keep their log."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import offline_distillation  # noqa: E402
import rlad_grpo  # noqa: E402


RUN = "--max_steps 4 --save_strategy steps --save_steps 2 --per_device_train_batch_size 16 --eval_size 6"
RUN += " --logging_steps 1"


@pytest.fixture
def run(monkeypatch):
    def run(script, folder, arguments=""):
        arguments = [script.__file__, *RUN.split(), *arguments.split(), "--output_dir", str(folder)]
        monkeypatch.setattr(sys, "argv", arguments)
        script.main()
        return json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]

    return run


def losses(logs):
    return [log["loss"] for log in logs if "loss" in log]


@pytest.mark.parametrize("how", ["true", "path"])
@pytest.mark.parametrize("script", [rlad_grpo, offline_distillation])
def test_a_script_goes_on_from_a_checkpoint(script, how, run, tmp_path, monkeypatch):
    arguments = "--num_prompts 12 --samples_per_prompt 2" if script is offline_distillation else "--teacher_samples 1"
    whole = losses(run(script, tmp_path, arguments))
    expected = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    checkpoint = tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-4").rename(tmp_path / "done")
    monkeypatch.setattr(offline_distillation, "collect", None)  # what the teacher wrote is kept
    resumed = run(script, tmp_path, f"{arguments} --resume_from_checkpoint {checkpoint if how == 'path' else how}")
    assert losses(resumed) == whole and len(whole) == 4
    weights = load_file(tmp_path / "model.safetensors")
    assert all((weights[name] == value).all() for name, value in expected.items())


def test_the_log_is_whole_with_measurements_in_between(run, tmp_path):
    logs = run(rlad_grpo, tmp_path / "a", "--report_steps 2")
    plain = run(rlad_grpo, tmp_path / "b")
    assert [log["step"] for log in logs if "accuracy/2" in log] == [2, 4]
    assert [log["step"] for log in logs if "reward" in log] == [1, 2, 3, 4]
    assert losses(logs)[:2] == losses(plain)[:2]
    assert (tmp_path / "a" / "reward.png").exists() and (tmp_path / "a" / "checkpoint-2").exists()


def test_the_results_are_printed_before_anything_is_saved(run, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(rlad_grpo.RLADTrainer, "save_model", full)
    with pytest.raises(OSError, match="No space left"):
        run(rlad_grpo, tmp_path, "--save_strategy no")
    assert "Accuracy on 6 held-out puzzles" in capsys.readouterr().out
