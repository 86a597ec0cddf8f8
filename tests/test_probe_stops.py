"""The probe ends a script where it would train: of the user's, nothing is written, overwritten or pushed."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer


TESTS = Path(__file__).parent
# Everything that a script may do around `train()` to save what came of it
SCRIPT = """
import atexit
import os
import sys
from pathlib import Path

import tiny
import trl
from huggingface_hub import HfApi

import trl_rlad

kind, student, teacher, output_dir = sys.argv[1:]
package = trl_rlad if kind == "RLAD" else trl
options = {"teacher_model": teacher} if kind == "RLAD" else {}
args = tiny.make_config(
    output_dir,
    getattr(package, f"{kind}Config"),
    save_strategy="steps",
    save_steps=1,
    push_to_hub=True,
    hub_model_id="tester/pupil",
    hub_token="hf_good",
)


def leave_a_trace(where):
    Path(output_dir, where).write_text("x")


atexit.register(leave_a_trace, "exit")
trainer = getattr(package, f"{kind}Trainer")(student, tiny.reward, args, tiny.make_dataset(), **options)
trainer.save_model()
trainer.save_model(output_dir)
trainer.push_to_hub()
trainer.save_metrics("eval", trainer.evaluate())
try:
    trainer.train()
except BaseException:
    leave_a_trace("except")
    raise
finally:
    trainer.save_model()
    trainer.model.save_pretrained(output_dir)
    trainer.save_state()
    trainer.push_to_hub()
    leave_a_trace("finally")
HfApi(token="hf_good").upload_folder(repo_id="tester/pupil", folder_path=output_dir)
"""


def read(folder: Path) -> dict[str, str]:
    """The hash of each file, and the folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRPO", "RLAD"])
def test_a_script_that_saves_and_pushes_whatever_happens_leaves_folder_and_hub_as_they_were(
    kind, tmp_path, student_path, teacher_path
):
    run, script = tmp_path / "run", tmp_path / "my_script.py"
    (run / "checkpoint-7").mkdir(parents=True)
    for name in ("model.safetensors", "README.md", "checkpoint-7/trainer_state.json"):
        (run / name).write_text(f"{name} of another run")
    script.write_text(SCRIPT)
    before = read(run)
    with HubServer() as hub:
        hub.repos["tester/pupil"] = {"README.md": b"of another run"}
        env = hub.env(tmp_path / "home") | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")}
        env["PYTHONPATH"] = f"{TESTS}:{TESTS.parent}"
        (tmp_path / "tmp").mkdir()
        command = [sys.executable, "-m", "trl_rlad", "probe", "--prompts", "2", script, kind]
        command += [student_path, teacher_path, run]
        result = subprocess.run(list(map(str, command)), env=env, cwd=tmp_path, capture_output=True, text=True)
    assert read(run) == before
    assert hub.repos == {"tester/pupil": {"README.md": b"of another run"}} and not hub.commits
    assert not [request for request in hub.requests if request.split()[0] not in ("GET", "HEAD")], hub.requests
    # Nor is anything else left, but the report
    assert not [path for path in (tmp_path / "tmp").iterdir() if path.name.startswith("tmp")]
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "my_script.py", "home", "tmp", "outputs"}
    report = json.loads((tmp_path / "outputs" / "probe.json").read_text())
    if kind == "RLAD":
        assert result.returncode == 0 and result.stdout.startswith("What to do: "), result.stderr
        assert report["prompts"] == 2
    else:
        assert result.returncode == 1 and result.stdout == "", result.stderr
        assert report["refused"] in result.stderr and "Two lines to change" in report["refused"]


@pytest.mark.slow
def test_the_main_job_is_probed_beside_its_checkpoints_and_pushes_nothing(tmp_path):
    run = tmp_path / "run"
    for name in (
        "checkpoint-7/trainer_state.json",
        "checkpoint-7/model.safetensors",
        "_rollouts/rollouts_00007.parquet",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(f"{name} of another run")
    before = read(run)
    with HubServer() as hub:
        hub.repos["tester/pupil"] = {"README.md": b"of another run"}
        env = hub.env(tmp_path / "home") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
        command = [sys.executable, "-m", "trl_rlad", "probe", "--prompts", "2", "train", "--output_dir", "run"]
        command += "--resume_from_checkpoint true --save_strategy steps --save_steps 1 --push_to_hub true".split()
        command += "--hub_model_id tester/pupil --hub_token hf_good --teacher_samples 1".split()
        result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("What to do: "), result.stderr
    assert read(run) == before and {path.name for path in tmp_path.iterdir()} <= {"run", "home", "outputs"}
    assert not [request for request in hub.requests if request.split()[0] not in ("GET", "HEAD")], hub.requests
    assert hub.repos == {"tester/pupil": {"README.md": b"of another run"}} and not hub.commits
