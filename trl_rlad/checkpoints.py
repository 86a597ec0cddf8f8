"""Checkpoints that a run can go on from: whole ones, and of the same teacher and objective."""

import json
import warnings
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import GRPOConfig

from .config import RLADConfig
from .teachers import Teacher


logger = get_logger(__name__)

# Settings that don't change the scores
_WITHOUT_EFFECT = {
    "teacher_offload",
    "teacher_server_urls",
    "teacher_timeout",
    "teacher_tokens_per_batch",
    "teacher_zero_stage",
    "trim_padding",
}


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint in a folder that was written to its end, or `None`. A killed run may leave a torn one."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda path: -int(path.name.partition("-")[2])):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())  # what transformers writes last
            return str(folder)
        except (OSError, ValueError):
            warnings.warn(f"{folder} was not written to its end, so it is passed over.", stacklevel=2)
    return None


def describe_teacher(teacher: Teacher, temperature: float) -> dict[str, Any]:
    """What tells one teacher from another: its name, commit, vocabulary, and the temperature at which it scores."""
    vocabulary = teacher.tokenizer.get_vocab()
    tokens = "\0".join(sorted(vocabulary, key=vocabulary.__getitem__))
    return {
        "name": teacher.name,
        "commit": getattr(teacher.config, "_commit_hash", None),
        "tokenizer": sha256(tokens.encode()).hexdigest(),
        "temperature": temperature,
    }


class RunRecord(TrainerCallback):
    """Writes the teachers, by name, and the objective of a run into its checkpoints, to compare them on resumption."""

    file_name = "rlad.json"

    def __init__(self, args: RLADConfig, teachers: dict[str, Teacher]):
        ours = {field.name for field in fields(RLADConfig)} - {field.name for field in fields(GRPOConfig)}
        names = sorted(ours - _WITHOUT_EFFECT)
        record = {
            "teachers": {name: describe_teacher(teacher, args.temperature) for name, teacher in teachers.items()},
            "settings": {name: value for name, value in args.to_dict().items() if name in names},
        }
        self.record = json.loads(json.dumps(record, default=str))  # as it will be read again; a dtype is an object
        self.max_steps_before: int | None = None  # of the run whose checkpoint is gone on from

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", self.file_name)
            path.write_text(json.dumps({**self.record, "max_steps": state.max_steps}, indent=2) + "\n")

    def on_train_begin(self, args, state, control, **kwargs):
        step, before, now = state.global_step, self.max_steps_before, state.max_steps
        self.max_steps_before = None
        if before and args.objective.at(step / before) != args.objective.at(step / now):
            logger.warning(
                f"Step {step} was one of {before} when the checkpoint was saved, and is one of {now} now. What goes "
                "by the share of training that is done, `distillation_fraction` and `teacher_kl_coef_final`, falls "
                "back to an earlier phase, or jumps to a later one. Set them for the phase that is to come."
            )

    def compare(self, checkpoint: str):
        """Raises a `ValueError` if the checkpoint in a folder is of a run with another teacher, and warns if the
        settings differ. If it has no record, nothing is known."""
        path = Path(checkpoint, self.file_name)
        if not path.exists():
            return
        before = json.loads(path.read_text())
        self.max_steps_before = before.get("max_steps")
        if before["teachers"] != self.record["teachers"]:
            raise ValueError(
                f"{checkpoint} is of a run with another teacher: {before['teachers']}, and not "
                f"{self.record['teachers']}. Take the same `teacher_model`. If another one is meant to go on from "
                f"there, delete {path}."
            )
        changes = [
            f"`{name}` from {before['settings'].get(name)} to {value}"
            for name, value in self.record["settings"].items()
            if before["settings"].get(name) != value
        ]
        if changes:
            logger.warning(f"Since {checkpoint} was saved, settings have changed: {', '.join(changes)}.")
