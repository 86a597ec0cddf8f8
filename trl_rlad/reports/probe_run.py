"""Rollouts of a training script's own trainer, read by its teacher, without any training."""

import runpy
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset

from .._trl.names import get_config_model_id, loss_mask
from .._trl.seam import Guide
from ..objective.guidance import Guidance
from ..rollouts import describe_rollouts
from ..teacher_guide import TeacherGuide, spread_scores
from ..trainer import RLADTrainer


NAMED = 20  # of the teacher's likeliest tokens, for its entropy


class _Ready(BaseException):
    """A script's trainer would train now. No script catches it."""


class _StandIn:
    """Skips evaluations, and ends the script where it would train."""

    def train(self, trainer):
        raise _Ready(trainer)

    def evaluate(self, trainer):
        return defaultdict(float)


@contextmanager
def _running_as(script: str, arguments: list[str]) -> Iterator[None]:
    """Have the interpreter look as if it had been started with a script."""
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = [script, *arguments], [str(Path(script).parent.absolute()), *path]
    RLADTrainer.stand_in = _StandIn()
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path
        RLADTrainer.stand_in = None


def load_trainer(script: str, arguments: list[str], main: Callable | None = None) -> RLADTrainer:
    """Run a training script, or its function `main`, up to where its [`RLADTrainer`] is to train, without evaluations,
    and return that."""
    with _running_as(script, arguments):
        try:
            main() if main else runpy.run_path(script, run_name="__main__")
        except _Ready as ready:
            (trainer,) = ready.args
            return trainer
    raise ValueError(f"{script} came to its end without an `RLADTrainer` that trains.")


class ProbeGuide(TeacherGuide):
    """The [`Guide`] of a probe: the teacher reads every token, whatever the objective makes of it, and the loss is
    GRPO's. Keeps a record of each of this process's completions, and the `seconds` and, on a GPU, the peak `memory` in
    GiB of both parts."""

    def __init__(self, trainer: RLADTrainer):
        super().__init__(trainer, trainer.teacher_scorer)
        self.records: list[dict] = []
        self.num_groups = 0
        self.seconds = {"generation": 0.0, "scoring": 0.0}
        self.memory: dict[str, float] = {}

    def begin(self, rollouts, rows):
        return nullcontext()

    def finish(self, batch, rewards_per_func, rows):
        trainer = self.trainer
        rewards = trainer.total_reward(rewards_per_func)
        # In the order of the rewards of all processes
        groups = torch.arange(len(rewards)) // trainer.num_generations + self.num_groups
        self.num_groups = groups[-1].item() + 1
        self.seconds["generation"] += trainer.generation_time
        self._note_memory("generation")
        start = time.perf_counter()
        scores = self.scorer.score(batch, loss_mask(batch), NAMED, self.teacher_prompts(rows), self.teacher_ids(rows))
        self.seconds["scoring"] += time.perf_counter() - start
        self._note_memory("scoring")
        numbers = {"reward": trainer.of_this_process(rewards), "group": trainer.of_this_process(groups)}
        return {**batch, **scores, **numbers}

    def watch_forward(self, model, batch):
        return nullcontext()

    def guide(self, per_token_logps, old_per_token_logps, batch):
        mask, batch = batch["teacher_mask"], spread_scores(batch, old_per_token_logps)
        columns = {
            "group": batch["group"],
            "reward": batch["reward"],
            "advantage": batch["advantages"].reshape(len(mask), -1).mean(1),
            "logps": per_token_logps.float(),
            "teacher_logps": batch["teacher_per_token_logps"].masked_fill(~mask, float("nan")),
        }
        columns |= {name: batch[f"teacher_{name}"].masked_fill(~mask, float("nan")) for name in ("entropy", "top1")}
        self.records += [{"step": 0, **each} for each in describe_rollouts(batch, self.trainer.tokenizer, columns)]
        return Guidance()

    def _note_memory(self, part):
        if self.trainer.accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.memory[part] = max(peak, self.memory.get(part, 0.0))
            torch.cuda.reset_peak_memory_stats()


class _SuccessGuide(Guide):
    """Notes which completions, of all processes, succeed."""

    def __init__(self, trainer: RLADTrainer):
        self.trainer = trainer
        self.successes: list[bool | None] = []  # `None` where none can judge

    def finish(self, batch, rewards_per_func, rows):
        bound = self.trainer.args.success_reward
        rewards = self.trainer.total_reward(rewards_per_func).tolist()
        self.successes += [None if reward != reward else reward > bound for reward in rewards]
        return batch


@contextmanager
def _sampling_from(trainer: RLADTrainer, teacher: Any) -> Iterator[None]:
    """Have the trainer's rollouts be a whole teacher's, which ends them as it is used to."""
    config, ends, tokenizer = trainer.generation_config, teacher.eos_token_ids, trainer.tokenizer
    before = trainer.model_wrapped, trainer.eos_token_ids, config.eos_token_id, config.suppress_tokens
    # A padded vocabulary has more rows than the student knows
    beyond = set(range(max(tokenizer.get_vocab().values()) + 1, teacher.vocab_size)) - ends
    trainer.model_wrapped = teacher.model  # what TRL samples from
    trainer.eos_token_ids = config.eos_token_id = sorted(ends)
    config.suppress_tokens = sorted(beyond.union(config.suppress_tokens or ())) or None
    try:
        yield
    finally:
        trainer.model_wrapped, trainer.eos_token_ids, config.eos_token_id, config.suppress_tokens = before


class Probe:
    """
    Samples completions of a few training prompts, has them rewarded and read by the teacher, and trains nothing.

    Args:
        trainer ([`RLADTrainer`]):
            With a teacher. It isn't to be trained afterwards.

    Attributes:
        rollouts (`list[dict]`):
            A record for each completion of all processes, see [`~trl_rlad.rollouts.describe_rollouts`].
    """

    def __init__(self, trainer: RLADTrainer):
        if trainer.teacher_scorer is None:
            raise ValueError(
                "There is no teacher to probe: with `alpha=1.0` and no `teacher_kl_coef` or `distillation_fraction` "
                "the trainer has none. Set `alpha=0.5`."
            )
        self.trainer, self.guide = trainer, ProbeGuide(trainer)
        self.rollouts: list[dict] = []

    def run(self, num_prompts: int):
        """Fill `rollouts`."""
        num_groups = self._predict(num_prompts, self.guide)
        self.rollouts = [each for each in gather_object(self.guide.records) if each["group"] < num_groups]

    def sample_teacher(self, num_prompts: int) -> dict[str, float]:
        """Have the teacher answer the prompts of `run`, as the student reads them, and say what share of its answers
        succeeds, `teacher_accuracy`, and on what share of the prompts without a success of the student it has one,
        `teacher_rescues`."""
        trainer, guide = self.trainer, _SuccessGuide(self.trainer)
        teachers = list(trainer.teacher_scorer.teachers.values())
        if len(teachers) > 1 or teachers[0].is_sharded or not hasattr(teachers[0], "model"):
            raise ValueError("`--sample_teacher` takes a single teacher that is a whole model in each process.")
        if any(trainer.teacher_scorer.by_text(None, 1)):
            raise ValueError(
                "`--sample_teacher` takes a teacher with the student's tokenizer: sample this one with `trl-rlad "
                "evaluate`."
            )
        if trainer.use_vllm:
            raise ValueError(
                "`--sample_teacher` doesn't go with `use_vllm`: sample the teacher with `trl-rlad evaluate`."
            )
        (teacher,) = teachers
        texts = (trainer.tokenizer.decode([id], skip_special_tokens=True) for id in sorted(teacher.eos_token_ids))
        if visible := list(filter(None, texts)):
            raise ValueError(
                f"The teacher ends its answers with {visible[0]!r}, an ordinary token in the student's tokenizer, so "
                "the reward would read it. Sample the teacher with `examples/evaluate.py`."
            )
        with teacher.placed(), _sampling_from(trainer, teacher):
            num_groups = self._predict(num_prompts, guide)
        k = trainer.num_generations
        bound, successes = trainer.args.success_reward, guide.successes[: num_groups * k]
        solved = {each["group"] for each in self.rollouts if each["reward"] is not None and each["reward"] > bound}
        groups = {group: successes[k * group : k * (group + 1)] for group in range(num_groups) if group not in solved}
        rescues = [any(group) for group in groups.values() if any(success is not None for success in group)]
        judged = [success for success in successes if success is not None]
        return {
            "teacher_accuracy": sum(judged) / len(judged) if judged else float("nan"),
            "teacher_rescues": sum(rescues) / len(rescues) if rescues else float("nan"),
        }

    def _predict(self, num_prompts, guide):
        """Have the trainer make rollouts of training prompts under a guide: a prediction, which logs nothing anywhere.
        Returns the number of prompts: on several processes, accelerate fills up the last batch with the first."""
        trainer, data = self.trainer, self.trainer.train_dataset
        if isinstance(data, Dataset):
            data = data.shuffle(seed=trainer.args.seed).select(range(min(num_prompts, len(data))))
        else:
            data = Dataset.from_list(list(islice(data, num_prompts)))
        k = trainer.num_generations
        trainer.num_generations_eval = k
        trainer.args.per_device_eval_batch_size = k * max(1, trainer.args.per_device_eval_batch_size // k)
        trainer.guide = guide
        trainer.predict(data)
        return len(data)


def describe(probe: Probe) -> dict:
    """What is probed, as far as its figures depend on it, and what scoring costs."""
    trainer, scorers = probe.trainer, probe.trainer.teacher_scorer.scorers.values()
    unknown = {id for each in scorers for id in each.contract.unknown_ids.tolist()}
    args, student = trainer.args, get_config_model_id(trainer.model.config)
    return {
        "student": Path(student).name if Path(student).is_dir() else student,
        "teacher": ", ".join(each.teacher.name for each in scorers),
        "num_generations": trainer.num_generations,
        "temperature": args.temperature,
        "max_completion_length": trainer.max_completion_length,
        "success_reward": args.success_reward,
        "teacher_log_ratio_clip": args.teacher_log_ratio_clip,
        "unknown_tokens": trainer.tokenizer.convert_ids_to_tokens(sorted(unknown)),
        "seconds": {name: round(value, 2) for name, value in probe.guide.seconds.items()},
        "device_memory_gib": {name: round(value, 2) for name, value in probe.guide.memory.items()},
    }
