"""The example scripts go on where they were told to, to the last bit, and keep their log."""

import json
import shutil
import sys

import pytest
from safetensors.torch import load_file

from trl_rlad.scripts import distil, train


RUN = "--max_steps 4 --save_strategy steps --save_steps 2 --logging_steps 1"
RUN += " --per_device_train_batch_size 16 --eval_size 6"
ARGUMENTS = {
    train: "--train_size 48 --teacher_samples 1",
    distil: "--num_prompts 12 --samples_per_prompt 2",
}


def run(script, folder, arguments=""):
    """Run a script. Returns what it has logged."""
    with pytest.MonkeyPatch.context() as patch:
        command = f"{RUN} {ARGUMENTS[script]} {arguments}".split()
        patch.setattr(sys, "argv", [script.__file__, *command, "--output_dir", str(folder)])
        script.main()
    return json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Folder and log of each script, not interrupted."""
    folders = {script: tmp_path_factory.mktemp("whole") for script in ARGUMENTS}
    return {script: (folder, run(script, folder)) for script, folder in folders.items()}


def losses(logs):
    return [log["loss"] for log in logs if "loss" in log]


@pytest.mark.parametrize("how", ["true", "path"])
@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_script_goes_on_from_a_checkpoint(script, how, wholes, tmp_path, monkeypatch):
    folder, logs = wholes[script]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "checkpoint-4")
    monkeypatch.setattr(distil, "collect", None)  # what the teacher wrote is kept
    checkpoint = tmp_path / "checkpoint-2"
    resumed = run(script, tmp_path, f"--resume_from_checkpoint {checkpoint if how == 'path' else how}")
    assert losses(resumed) == losses(logs) and len(losses(logs)) == 4
    weights, expected = (load_file(path / "model.safetensors") for path in (tmp_path, folder))
    assert all((weights[name] == value).all() for name, value in expected.items())


def test_the_log_is_whole_with_measurements_in_between(wholes, tmp_path):
    logs, (_, plain) = run(train, tmp_path, "--report_steps 2"), wholes[train]
    assert [log["step"] for log in logs if "accuracy" in log] == [2, 4]
    assert [log["step"] for log in logs if "reward" in log] == [1, 3]  # rollouts serve two steps
    assert losses(logs)[:2] == losses(plain)[:2]
    assert (tmp_path / "reward.png").exists() and (tmp_path / "checkpoint-2").exists()


def test_the_results_are_printed_before_anything_is_saved(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(train.RLADTrainer, "save_model", full)
    with pytest.raises(OSError, match="No space left"):
        run(train, tmp_path, "--save_strategy no --max_steps 1")
    assert "Accuracy on 6 held-out puzzles" in capsys.readouterr().out
