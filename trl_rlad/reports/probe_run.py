"""Rollouts of a training script's own trainer, read by its teacher, without any training."""

import os
import runpy
import shutil
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import wraps
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import GRPOTrainer

from .._trl.names import get_config_model_id, loss_mask
from .._trl.seam import Guide
from ..objective.guidance import Guidance
from ..rollout_log import add_names, describe_rollouts
from ..teacher_guide import TeacherGuide, spread_scores
from ..trainer import RLADTrainer
from .probe import Estimate, estimate


NAMED = 20  # of the teacher's likeliest tokens, for its entropy


@contextmanager
def _running_as(script: str, arguments: list[str]) -> Iterator[None]:
    """Have the interpreter look as if it had been started with a script."""
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = [script, *arguments], [str(Path(script).parent.absolute()), *path]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path


@contextmanager
def _in_place_of_training(then: Callable[[Trainer], None], folder: str) -> Iterator[None]:
    """Have every trainer that is made meanwhile, of whatever class, call `then` where it is to train, and write and
    push nothing: its output folder is `folder`, and it has no repository, no tracker and no evaluation."""
    trainer_class: Any = Trainer
    init = trainer_class.__init__

    @wraps(init)
    def init_harmless(self, model=None, args=None, *others, **kwargs):
        args = args or TrainingArguments()
        args.output_dir, args.push_to_hub, args.report_to = folder, False, []
        init(self, model, args, *others, **kwargs)
        # Of this object, as a class may have a `train` of its own
        self.train = lambda *args, **kwargs: then(self)
        self.evaluate = lambda *args, **kwargs: defaultdict(float)
        self.save_model = self.push_to_hub = lambda *args, **kwargs: None

    trainer_class.__init__ = init_harmless
    try:
        yield
    finally:
        trainer_class.__init__ = init


def _leave(code: int):
    """End the process at once: nothing of a script that comes after `train()`, or is left for the end, runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_until_training(
    script: str, arguments: list[str], then: Callable[[Trainer], None], main: Callable[[str], None] | None
):
    """
    Run a training script up to where its first trainer is to train, call `then` with that, and end the process.

    Nothing of the script runs after `train()`: no `finally`, no `except`, no exit handler. What it prints goes to
    stderr.

    Args:
        script (`str`), arguments (`list[str]`):
            The script and its command line.
        then (`Callable[[Trainer], None]`):
            What to do. If it raises, the traceback is printed, and the exit status is 1.
        main (`Callable[[str], None]` or `None`):
            A function to call in the place of the script, with the folder that trainers write to.

    Raises:
        `ValueError`: if no trainer trains. Whatever the script itself raises.
    """

    def stop(trainer):
        code = 1
        try:
            then(trainer)
            code = 0
        except SystemExit as exit:
            print(exit.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        shutil.rmtree(folder)
        _leave(code)

    with (
        TemporaryDirectory() as folder,
        _running_as(script, arguments),
        _in_place_of_training(stop, folder),
        redirect_stdout(sys.stderr),
    ):
        main(folder) if main else runpy.run_path(script, run_name="__main__")
    raise ValueError(f"{script} came to its end, and no trainer of transformers or TRL has trained.")


def check_trainer(trainer: Trainer):
    """Raises a `ValueError` that says what to change unless a trainer can be probed."""
    if isinstance(trainer, RLADTrainer):
        return
    name, here = type(trainer).__name__, "`trl-rlad probe` probes an `RLADTrainer`"
    if isinstance(trainer, GRPOTrainer):
        raise ValueError(
            f"the script trains with `{name}`, which has no teacher. Two lines to change, and probe again:\n"
            "    from trl_rlad import RLADConfig as GRPOConfig, RLADTrainer as GRPOTrainer\n"
            '    trainer = GRPOTrainer(..., teacher_model="NAME OR PATH OF THE TEACHER")\n'
            "Nothing was trained, and nothing of the run's was written."
        )
    hint = " docs/migrating.md has the lines to change." if "Distillation" in name else ""
    raise ValueError(
        f"the first to train in the script is `{name}`, and {here}, which has rewards and a teacher.{hint}"
    )


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
        records = describe_rollouts(batch, self.trainer.tokenizer, columns)
        for record, ids, logps in zip(records, batch["teacher_top_ids"], batch["teacher_top_logps"], strict=True):
            add_names(record, ids, logps, self.trainer.tokenizer)
        self.records += [{"step": 0, **record} for record in records]
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
            A record for each completion of all processes, see [`~trl_rlad.rollout_log.describe_rollouts`].
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

    def sample_teacher(self, num_prompts: int) -> dict[str, Estimate]:
        """Have the teacher answer the prompts of `run`, as the student reads them, and say what share of its answers
        succeeds, `teacher_accuracy`, and on what share of the prompts without a success of the student it has one,
        `teacher_rescues`."""
        trainer, guide = self.trainer, _SuccessGuide(self.trainer)
        teachers = list(trainer.teacher_scorer.teachers.values())
        of_its_own = len(teachers) == 1 and teachers[0].is_frozen and hasattr(teachers[0], "model")
        if not of_its_own or teachers[0].is_sharded:
            raise ValueError(
                "`--sample_teacher` takes a single teacher that is a whole model in each process, and not the student."
            )
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
        sums = []
        for group in range(num_groups):
            judged = [success for success in successes[k * group : k * (group + 1)] if success is not None]
            can_rescue = bool(judged) and group not in solved
            sums.append(
                {
                    "teacher_accuracy": (float(sum(judged)), float(len(judged))),
                    "teacher_rescues": (float(can_rescue and any(judged)), float(can_rescue)),
                }
            )
        return estimate(sums)

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
        trainer.callback_handler.callbacks = []  # of the script, which may write or report
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
