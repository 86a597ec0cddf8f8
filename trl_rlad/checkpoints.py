"""Checkpoints that a run can go on from: whole ones, and of the same teacher and objective."""

import json
import os
import re
import warnings
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .config import RLADConfig
from .teachers import Teacher
from .teachers.server import TOLERANCE


logger = get_logger(__name__)

# Settings of ours and of GRPO that don't change what is trained
_WITHOUT_EFFECT = re.compile(
    "teacher_(offload|server_urls|timeout|tokens_per_batch|zero_stage)|trim_padding|trust_remote_code|log_.*|"
    "num_completions_to_print|num_generations_eval|vllm_(?!importance).*|.*transformers_.*|cache_implementation|ds3_.*"
)
# Settings of all trainers that do
_OF_TRAINING = set(
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay optim optim_args adam_beta1 "
    "adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha per_device_train_batch_size "
    "gradient_accumulation_steps seed data_seed bf16 fp16".split()
)


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


@torch.no_grad()
def sample_scores(teacher: Teacher) -> list[float]:
    """Log-probabilities of some tokens drawn at random, which hardly two sets of weights share. All processes call it
    at once."""
    ids = set(teacher.tokenizer.get_vocab().values()) - set(teacher.tokenizer.all_special_ids)
    known = torch.tensor(sorted(id for id in ids if id < teacher.vocab_size))
    drawn = torch.randint(len(known), (int(min(17, teacher.max_length)),), generator=torch.Generator().manual_seed(0))
    with teacher.placed():
        return teacher.score([known[drawn[:1]]], [known[drawn[1:]]])[0].logps.tolist()


def describe_settings(args: RLADConfig) -> dict[str, Any]:
    """The settings that change what is trained, by name, as JSON has them."""
    names = {field.name for field in fields(RLADConfig)} - {field.name for field in fields(TrainingArguments)}
    names = {name for name in names if not _WITHOUT_EFFECT.fullmatch(name)} | _OF_TRAINING
    settings = {name: value for name, value in args.to_dict().items() if name in names}
    # A dtype is an object; that of others has an address, which differs in each process
    return json.loads(json.dumps(settings, default=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value))))


class RunRecord(TrainerCallback):
    """Writes the teachers, by name, some scores of theirs and the settings of a run into its checkpoints, to compare
    them on resumption."""

    file_name = "rlad.json"

    def __init__(self, args: RLADConfig, teachers: dict[str, Teacher]):
        self.teachers = teachers
        self.record: dict[str, Any] = {
            "teachers": {name: describe_teacher(teacher, args.temperature) for name, teacher in teachers.items()},
            "settings": describe_settings(args),
        }
        self.before: tuple[Path, dict[str, Any]] | None = None  # the record of the checkpoint to go on from

    def on_train_begin(self, args, state, control, **kwargs):
        if self.before is None and args.save_strategy == "no":
            return
        self.record["scores"] = {
            name: sample_scores(teacher) for name, teacher in self.teachers.items() if teacher.is_frozen
        }
        self.record["max_steps"] = now = state.max_steps
        path, before = self.before or (None, {})
        self.before = None
        step, planned = state.global_step, before.get("max_steps", now)
        if args.objective.at(step / max(planned, 1)) != args.objective.at(step / max(now, 1)):
            logger.warning(
                f"Step {step} was one of {planned} when the checkpoint was saved, and is one of {now} now. What goes "
                "by the share of training that is done, `distillation_fraction` and `teacher_kl_coef_final`, falls "
                "back to an earlier phase, or jumps to a later one. Set them for the phase that is to come."
            )
        for name, scores in before.get("scores", {}).items():
            scores_now = self.record["scores"][name]
            difference = sum(abs(a - b) for a, b in zip(scores, scores_now, strict=True)) / len(scores)
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"The weights of the teacher {self.record['teachers'][name]['name']!r} are other ones than when "
                    f"{path} was written: it scores the same tokens {difference:.2g} nats apart on average. Take the "
                    f"same `teacher_model`. If this one is meant to go on from there, delete {path}."
                )

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", self.file_name)
            half = path.with_suffix(".tmp")
            half.write_text(json.dumps(self.record, indent=2) + "\n")
            os.replace(half, path)  # whole or not there, whenever the process is killed

    def compare(self, checkpoint: str):
        """Raises a `ValueError` if the checkpoint in a folder is of a run with another teacher, and warns if the
        settings differ or nothing is known. The teacher's scores are compared when training begins."""
        path = Path(checkpoint, self.file_name)
        try:
            before = json.loads(path.read_text())
            if not all(isinstance(before[part], dict) for part in ("teachers", "settings")):
                raise ValueError("it has no teachers or settings")
        except FileNotFoundError:
            logger.warning(f"There is no {path}, so whether the teacher is the same isn't known.")
            return
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} can't be read ({type(error).__name__}: {error}), so whether the teacher is the same isn't "
                "known. If it is, delete this file."
            ) from error
        if before["teachers"] != self.record["teachers"]:
            raise ValueError(
                f"{checkpoint} is of a run with another teacher: {before['teachers']}, and not "
                f"{self.record['teachers']}. Take the same `teacher_model`. If another one is meant to go on from "
                f"there, delete {path}."
            )
        self.before = path, before
        if self.record["settings"]["sync_ref_model"] and not all(each.is_frozen for each in self.teachers.values()):
            logger.warning(
                "TRL saves no reference model, so the teacher that lags behind the student (`sync_ref_model=True`) "
                "begins anew as the model that the run began with."
            )
        changes = [
            f"`{name}` from {before['settings'][name]} to {value}"
            for name, value in self.record["settings"].items()
            if name in before["settings"] and before["settings"][name] != value
        ]
        if changes:
            logger.warning(f"Since {checkpoint} was saved, settings have changed: {', '.join(changes)}.")
