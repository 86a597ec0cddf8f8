"""
See whether a teacher is worth it for a student and a task, before training.

    trl-rlad probe examples/rlad_grpo.py
    trl-rlad probe --prompts 64 --output probe.json examples/rlad_grpo.py --config FILE.yaml --alpha 0.5

It runs your training script, with the arguments that you would train with, up to where its RLADTrainer would train or
evaluate. There it samples `num_generations` completions of some training prompts, has them rewarded and read by the teacher,
reports what came out, and ends. Nothing is trained. What each figure means is in the docstring of `trl_rlad.probe.report`.
"""

import json
import runpy
import sys
import time
from argparse import REMAINDER, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from ..probe import ALPHAS, report
from ..rollouts import describe_rollouts
from ..routing import RoutedScorer
from ..teacher_kl import named_entropy
from ..trainer import RLADTrainer


NAMED = 20  # of the teacher's likeliest tokens, for its entropy


class _Ready(BaseException):
    """A script's trainer would train now. No script catches it."""

    def __init__(self, trainer):
        self.trainer = trainer


def load_trainer(script: str, arguments: list[str]) -> RLADTrainer:
    """Run a training script up to where its [`RLADTrainer`] is to train or to evaluate, and return that."""

    def stop(trainer, *args, **kwargs):
        raise _Ready(trainer)

    with (
        patch.object(sys, "argv", [script, *arguments]),
        patch.object(sys, "path", [str(Path(script).parent.absolute()), *sys.path]),
        patch.object(RLADTrainer, "train", stop),
        patch.object(RLADTrainer, "evaluate", stop),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except _Ready as ready:
            return ready.trainer
    raise ValueError(f"{script} came to its end without an `RLADTrainer` that trains or evaluates.")


class Probe:
    """
    Samples completions of a few training prompts, has them rewarded and read by the teacher, and trains nothing.

    It is an evaluation of the trainer in which the teacher reads every token, whatever the objective makes of it.

    Args:
        trainer ([`RLADTrainer`]):
            With a teacher.

    Attributes:
        rollouts (`list[dict]`):
            A record for each completion, see [`~trl_rlad.rollouts.describe_rollouts`].
        seconds, memory (`dict[str, float]`):
            Of generation and of scoring, in all; the memory is the device's peak in GiB, and missing on a CPU.
    """

    def __init__(self, trainer: RLADTrainer):
        if trainer.teacher_scorer is None:
            raise ValueError(
                "There is no teacher to probe: with `alpha=1.0` and no `teacher_kl_coef` or `distillation_ratio` the trainer has "
                "none. Set `alpha=0.5`."
            )
        self.trainer = trainer
        self.rollouts, self.rewards, self.scores = [], None, None
        self.seconds, self.memory = {"generation": 0.0, "scoring": 0.0}, {}

    def run(self, num_prompts: int):
        """Fill `rollouts`, `seconds` and `memory`."""
        self._evaluate(num_prompts, extend_rollout=self._extend_rollout, see_tokens=self._see_tokens)
        self.rollouts = gather_object(self.rollouts)

    def teacher_accuracy(self, num_prompts: int) -> float:
        """Share of the teacher's own completions of the same prompts, as the student reads them, that succeed."""
        scorer, trainer = self.trainer.teacher_scorer, self.trainer
        if isinstance(scorer, RoutedScorer) or scorer.teacher.is_sharded or not hasattr(scorer.teacher, "model"):
            raise ValueError("`--sample_teacher` takes a single teacher that is a whole model in each process.")
        if trainer.use_vllm:
            raise ValueError("`--sample_teacher` doesn't go with `use_vllm`: sample the teacher with `examples/evaluate.py`.")
        successes = []

        def extend_rollout(batch, rewards_per_func, rows):
            successes.extend((trainer.total_reward(rewards_per_func) > trainer.args.success_reward).tolist())
            return batch

        with scorer.teacher.placed():
            self._evaluate(num_prompts, extend_rollout=extend_rollout, model_wrapped=scorer.teacher.model)
        return sum(successes) / len(successes)

    def _evaluate(self, num_prompts, **attributes):
        """Evaluate the trainer on training prompts, with GRPO's loss and some of its attributes replaced meanwhile."""
        trainer, data = self.trainer, self.trainer.train_dataset
        if isinstance(data, Dataset):
            data = data.shuffle(seed=trainer.args.seed).select(range(min(num_prompts, len(data))))
        else:
            data = Dataset.from_list(list(islice(data, num_prompts)))
        k = trainer.num_generations
        attributes |= {"num_generations_eval": k, "get_anchor": lambda *_: None, "get_penalty": lambda *_: None}
        # These would have the teacher read ahead what the objective asks of it
        attributes |= {"after_generation": lambda *_: None, "during_rewards": lambda *_: nullcontext()}
        with ExitStack() as stack:
            for name, value in attributes.items():
                stack.enter_context(patch.object(trainer, name, value, create=True))
            batch_size = trainer.args.per_device_eval_batch_size
            stack.enter_context(patch.object(trainer.args, "per_device_eval_batch_size", k * max(1, batch_size // k)))
            return trainer.evaluate(data)

    def _extend_rollout(self, batch, rewards_per_func, rows):
        trainer = self.trainer
        self.rewards = trainer.of_this_process(trainer.total_reward(rewards_per_func))
        self.seconds["generation"] += trainer.generation_time
        self._note_memory("generation")
        start = time.perf_counter()
        self.scores = trainer.score_rollout(batch, rows, trainer.loss_mask(batch), NAMED)
        self.seconds["scoring"] += time.perf_counter() - start
        self._note_memory("scoring")
        return batch

    def _see_tokens(self, per_token_logps, old_per_token_logps, anchor, batch):
        mask, top_logps = self.scores["teacher_mask"], self.scores["teacher_top_logps"]
        is_top1 = (self.scores["teacher_top_ids"][..., 0] == batch["completion_ids"]) & top_logps[..., 0].isfinite()
        columns = {
            "reward": self.rewards,
            "advantage": batch["advantages"].reshape(len(mask), -1).mean(1),
            "logps": per_token_logps.float(),
            "teacher_logps": self.scores["teacher_per_token_logps"].masked_fill(~mask, float("nan")),
            "top1": is_top1.float().masked_fill(~mask, float("nan")),
            "entropy": named_entropy(top_logps).masked_fill(~mask, float("nan")),
        }
        k, process = self.trainer.num_generations, self.trainer.accelerator.process_index
        first, processes = len(self.rollouts) // k, self.trainer.accelerator.num_processes
        for row, record in enumerate(describe_rollouts(batch, self.trainer.tokenizer, columns)):
            self.rollouts.append({"step": 0, "group": (first + row // k) * processes + process, **record})

    def _note_memory(self, part):
        if self.trainer.accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.memory[part] = max(peak, self.memory.get(part, 0.0))
            torch.cuda.reset_peak_memory_stats()


def describe(trainer: RLADTrainer, probe: Probe) -> dict:
    """What is probed, as far as its figures depend on it, and what scoring costs."""
    scorer = trainer.teacher_scorer
    scorers = list(scorer.scorers.values()) if isinstance(scorer, RoutedScorer) else [scorer]
    unknown = {id for each in scorers for id in each.unknown_ids.tolist()}
    args = trainer.args
    return {
        "student": trainer.model.config._name_or_path,
        "teacher": ", ".join(each.teacher.name for each in scorers),
        "num_generations": trainer.num_generations,
        "temperature": args.temperature,
        "max_completion_length": trainer.max_completion_length,
        "success_reward": args.success_reward,
        "teacher_log_ratio_clip": args.teacher_log_ratio_clip,
        "unknown_tokens": trainer.tokenizer.convert_ids_to_tokens(sorted(unknown)),
        "seconds": {name: round(value, 2) for name, value in probe.seconds.items()},
        "device_memory_gib": {name: round(value, 2) for name, value in probe.memory.items()},
    }


def write_picture(rollouts: list[dict], figures: dict, path: Path):
    """Draw the gap over the tokens, by reward, and what the teacher prefers."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", gridspec_kw={"width_ratios": [3, 2]})
    for name, sign, color in (("succeeded", True, "C0"), ("failed", False, "C1")):
        gaps = [
            student - teacher
            for rollout in rollouts
            if (rollout["reward"] > figures["success_reward"]) == sign
            for student, teacher in zip(rollout["logps"], rollout["teacher_logps"], strict=True)
            if teacher is not None
        ]
        if gaps:
            label = f"tokens of completions that {name}"
            axes[0].hist(gaps, bins=60, range=(-5, 5), log=True, alpha=0.6, color=color, label=label)
    axes[0].set(xlabel="log(student / teacher), nats", ylabel="tokens", xlim=(-5, 5))
    axes[0].legend(frameon=False, fontsize=8)
    bars = [name for name in ("discrimination", "prefers_rewarded", "prefers_punished", "top1") if figures[name].value >= 0]
    for place, name in enumerate(reversed(bars)):
        value, low, high = figures[name]
        axes[1].errorbar(value, place, xerr=[[max(0, value - low)], [max(0, high - value)]], fmt="o", color="C0", capsize=3)
    axes[1].axvline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes[1].set(xlim=(0, 1), yticks=range(len(bars)), yticklabels=reversed(bars), ylim=(-0.6, len(bars) - 0.4))
    figure.savefig(path, dpi=130)
    plt.close(figure)
