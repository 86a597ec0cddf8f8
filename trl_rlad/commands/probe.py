"""
See whether a teacher is worth it for a student and a task, before training.

    trl-rlad probe examples/rlad_grpo.py
    trl-rlad probe --prompts 64 --output probe.json examples/rlad_grpo.py --config FILE.yaml --alpha 0.5

It runs your training script, with the arguments that you would train with, up to where its RLADTrainer would train; an
evaluation before that is skipped. There it samples `num_generations` completions of some training prompts, has them rewarded and read by the teacher,
reports what came out, and ends. Nothing is trained. What each figure means is in the docstring of `trl_rlad.probe.report`.
"""

import json
import runpy
import sys
import time
from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from contextlib import ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from .._trl import get_config_model_id
from ..probe import ALPHAS, Estimate, recommend, report
from ..rollouts import describe_rollouts
from ..routing import RoutedScorer
from ..teacher_kl import named_entropy
from ..trainer import RLADTrainer


NAMED = 20  # of the teacher's likeliest tokens, for its entropy
END = 6.0  # nats, of the picture
SHARES = ("mean@1", "pass@k", "signal", "discrimination", "prefers_rewarded", "prefers_punished", "contradicted_failed", "contradicted_succeeded", "top1")  # fmt: skip


class _Ready(BaseException):
    """A script's trainer would train now. No script catches it."""

    def __init__(self, trainer):
        self.trainer = trainer


def load_trainer(script: str, arguments: list[str]) -> RLADTrainer:
    """Run a training script up to where its [`RLADTrainer`] is to train, without evaluations, and return that."""

    def stop(trainer, *args, **kwargs):
        raise _Ready(trainer)

    with (
        patch.object(sys, "argv", [script, *arguments]),
        patch.object(sys, "path", [str(Path(script).parent.absolute()), *sys.path]),
        patch.object(RLADTrainer, "train", stop),
        patch.object(RLADTrainer, "evaluate", lambda *args, **kwargs: defaultdict(float)),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except _Ready as ready:
            return ready.trainer
    raise ValueError(f"{script} came to its end without an `RLADTrainer` that trains.")


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
                "There is no teacher to probe: with `alpha=1.0` and no `teacher_kl_coef` or `distillation_fraction` the trainer has "
                "none. Set `alpha=0.5`."
            )
        self.trainer, self.scorer = trainer, trainer.teacher_scorer
        self.rollouts: list[dict] = []
        self.num_groups = 0
        self.groups, self.rewards, self.scores = None, None, None  # of the batch at hand
        self.seconds = {"generation": 0.0, "scoring": 0.0}
        self.memory: dict[str, float] = {}

    def run(self, num_prompts: int):
        """Fill `rollouts`, `seconds` and `memory`."""
        self._evaluate(num_prompts, extend_rollout=self._extend_rollout, see_tokens=self._see_tokens)
        self.rollouts = gather_object(self.rollouts)

    def sample_teacher(self, num_prompts: int) -> dict[str, float]:
        """
        Have the teacher answer the prompts of `run`, as the student reads them, and say what share of its answers succeeds,
        `teacher_accuracy`, and on what share of the prompts without a success of the student it has one, `teacher_rescues`.
        """
        scorer, trainer = self.scorer, self.trainer
        if isinstance(scorer, RoutedScorer) or scorer.teacher.is_sharded or not hasattr(scorer.teacher, "model"):
            raise ValueError("`--sample_teacher` takes a single teacher that is a whole model in each process.")
        if trainer.use_vllm:
            raise ValueError(
                "`--sample_teacher` doesn't go with `use_vllm`: sample the teacher with `examples/evaluate.py`."
            )
        successes = []

        def extend_rollout(batch, rewards_per_func, rows):
            successes.extend((trainer.total_reward(rewards_per_func) > trainer.args.success_reward).tolist())
            return batch

        # A padded vocabulary has more rows than the student knows
        beyond = list(range(max(trainer.tokenizer.get_vocab().values()) + 1, scorer.teacher.vocab_size))
        attributes = {"extend_rollout": extend_rollout, "model_wrapped": scorer.teacher.model}
        attributes["compute_loss"] = lambda *_, **__: torch.zeros(())  # the student has nothing to do with it
        with scorer.teacher.placed(), patch.object(trainer.generation_config, "suppress_tokens", beyond or None):
            self._evaluate(num_prompts, **attributes)
        k = trainer.num_generations
        solved = {each["group"] for each in self.rollouts if each["reward"] > trainer.args.success_reward}
        unsolved = [any(successes[i : i + k]) for i in range(0, len(successes), k) if i // k not in solved]
        return {
            "teacher_accuracy": sum(successes) / len(successes),
            "teacher_rescues": sum(unsolved) / len(unsolved) if unsolved else float("nan"),
        }

    def _evaluate(self, num_prompts, **attributes):
        """Evaluate the trainer on training prompts, with GRPO's loss and some of its attributes replaced meanwhile."""
        trainer, data = self.trainer, self.trainer.train_dataset
        if isinstance(data, Dataset):
            data = data.shuffle(seed=trainer.args.seed).select(range(min(num_prompts, len(data))))
        else:
            data = Dataset.from_list(list(islice(data, num_prompts)))
        k = trainer.num_generations
        attributes |= {"num_generations_eval": k, "get_anchor": lambda *_: None, "get_penalty": lambda *_: None}
        attributes["log"] = lambda *_: None  # nothing is to be reported anywhere
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
        rewards = trainer.total_reward(rewards_per_func)
        self.rewards = trainer.of_this_process(rewards)
        # In the order of the rewards of all processes
        groups = torch.arange(len(rewards)) // trainer.num_generations + self.num_groups
        self.groups = trainer.of_this_process(groups)
        self.num_groups = groups[-1].item() + 1
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
        records = describe_rollouts(batch, self.trainer.tokenizer, {"group": self.groups, **columns})
        self.rollouts += [{"step": 0, **record} for record in records]

    def _note_memory(self, part):
        if self.trainer.accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.memory[part] = max(peak, self.memory.get(part, 0.0))
            torch.cuda.reset_peak_memory_stats()


def describe(probe: Probe) -> dict:
    """What is probed, as far as its figures depend on it, and what scoring costs."""
    trainer, scorer = probe.trainer, probe.scorer
    scorers = list(scorer.scorers.values()) if isinstance(scorer, RoutedScorer) else [scorer]
    unknown = {id for each in scorers for id in each.unknown_ids.tolist()}
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
        "seconds": {name: round(value, 2) for name, value in probe.seconds.items()},
        "device_memory_gib": {name: round(value, 2) for name, value in probe.memory.items()},
    }


def write_picture(rollouts: list[dict], figures: dict, path: Path):
    """Draw the gap over the tokens, by success, and the shares with their intervals."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for rollout in rollouts:
        pairs = zip(rollout["logps"], rollout["teacher_logps"], strict=True)
        known = [student - teacher for student, teacher in pairs if teacher is not None]
        gaps[rollout["reward"] > figures["success_reward"]] += [min(max(x, -END), END) for x in known]
    labels = ["tokens of successes", "tokens of failures"]
    axes[0].hist(
        list(gaps.values()), bins=40, range=(-END, END), log=True, histtype="step", linewidth=1.5, label=labels
    )
    axes[0].set(xlabel=f"log(student / teacher), nats (at the ends, {END:g} and more)", ylabel="tokens")
    axes[0].legend(frameon=False, fontsize=8)
    names = [name for name in SHARES if figures[name].value >= 0][::-1]
    for place, name in enumerate(names):
        value, low, high = figures[name]
        axes[1].errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color="C0", capsize=3)
    axes[1].axvline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes[1].set(xlim=(-0.03, 1.03), yticks=range(len(names)), yticklabels=names)
    figure.savefig(path, dpi=120)
    plt.close(figure)


SHARE, NATS = "{:.0%}", "{:+z.2f}"  # `z` writes no -0.00
# What the table shows: figures, how to write them, and what they tell
TABLE = {
    "student and task": {
        "mean@1": (SHARE, "completions that succeed"),
        "pass@k": (SHARE, "prompts with a success among all completions"),
        "signal": (SHARE, "groups whose rewards differ: all that GRPO learns from"),
        "all_failed": (SHARE, "groups without a success"),
        "student_entropy": ("{:.2f}", "how undecided the student is, in nats"),
    },
    "what the teacher knows": {
        "discrimination": ("{:.2f}", "it favours the better of two completions, against the student; chance .5"),
        "teacher_auc": ("{:.2f}", "the better of two completions is likelier to it"),
        "student_auc": ("{:.2f}", "the same of the student"),
        "prefers_rewarded": (SHARE, "rewarded tokens that it likes more than the student"),
        "prefers_punished": (SHARE, "punished tokens that it likes more than the student"),
        "contradicted_failed": (SHARE, "failed completions in which it contradicts what the student is sure of"),
        "contradicted_succeeded": (SHARE, "the same of those that succeeded: is it to be believed?"),
        "entropy": ("{:.2f}", "how undecided it is, in nats, over its likeliest 20 tokens"),
    },
    "gap, log(student / teacher) in nats": {
        "gap": (NATS, "mean"),
        "gap_rewarded": (NATS, "on rewarded completions"),
        "gap_punished": (NATS, "on punished completions"),
        "gap_first": (NATS, "at the first token"),
        "gap_eos": (NATS, "at the end of a completion"),
        "beyond_clip": (SHARE, "beyond teacher_log_ratio_clip"),
        "top1": (SHARE, "tokens that are the teacher's likeliest"),
    },
    "tokens that RLAD would clip at first": {
        f"clip_{side}@{alpha}": (SHARE, f"{tokens}, at alpha = {alpha}")
        for alpha in ALPHAS
        for side, tokens in (("high", "rewarded"), ("low", "punished"))
    },
}


def print_report(figures: dict):
    """Print the figures as a table, and the advice."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{figures['completions']} completions of {figures['prompts']} prompts, {figures['tokens']} tokens; the teacher has no say "
        f"on {figures['tokens_without_say']}. Student: {figures['student']}; teacher: {figures['teacher']}.",
        highlight=False,
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for column in ("", "", "95%", ""):
        table.add_column(column, justify="right" if column == "95%" else "left")
    for title, rows in TABLE.items():
        table.add_row(f"[bold]{title}", "", "", "")
        for name, (form, meaning) in rows.items():
            value, low, high = figures[name]
            cells = ("-", "") if value != value else (form.format(value), f"{form.format(low)} to {form.format(high)}")
            table.add_row(f"  {name}", *cells, meaning)
    console.print(table)
    quantiles = ", ".join(f"{q}%: {value:+z.2f}" for q, value in figures["gap_quantiles"].items())
    console.print(f"Quantiles of the gap: {quantiles}", highlight=False)
    if "teacher_accuracy" in figures:
        text = f"The teacher's own completions of these prompts: {figures['teacher_accuracy']:.0%} succeed"
        if figures["teacher_rescues"] >= 0.0:  # not NaN
            text += f"; it answers {figures['teacher_rescues']:.0%} of those on which the student fails throughout"
        console.print(text, highlight=False)
    seconds, memory = figures["seconds"], figures["device_memory_gib"]
    costs = f"{seconds['scoring']:.1f} s of scoring beside {seconds['generation']:.1f} s of generation"
    if memory:
        costs += f"; {memory['scoring']:.1f} GiB beside {memory['generation']:.1f}"
    console.print(costs, highlight=False)
    for name, text in figures["advice"].items():
        console.print(f"[bold]{name}[/]: {text}", highlight=False)


def main(arguments: list[str] | None = None):
    parser = ArgumentParser("trl-rlad probe", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="number of training prompts")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs", "probe.json"), help="report, with .png and .parquet beside it"
    )
    parser.add_argument("--sample_teacher", action="store_true", help="have the teacher answer the prompts, too")
    parser.add_argument("script", help="a training script")
    parser.add_argument("arguments", nargs=REMAINDER, help="its arguments")
    args = parser.parse_args(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        trainer = load_trainer(args.script, args.arguments)
        probe = Probe(trainer)
        probe.run(args.prompts)
        answers = probe.sample_teacher(args.prompts) if args.sample_teacher else {}
    except ValueError as error:  # what the trainer refuses, with its remedy
        args.output.write_text(json.dumps({"refused": str(error)}, indent=2) + "\n")
        raise SystemExit(f"Refused: {error}") from error
    if not trainer.is_world_process_zero():
        return
    bounds = (trainer.args.teacher_log_ratio_clip, trainer.epsilon_low, trainer.epsilon_high)
    figures = report(probe.rollouts, trainer.args.success_reward, *bounds, trainer.eos_token_ids)
    figures |= describe(probe) | answers
    figures["advice"] = recommend(figures)
    print_report(figures)
    write_picture(probe.rollouts, figures, args.output.with_suffix(".png"))
    pq.write_table(pa.Table.from_pylist(probe.rollouts), args.output.with_suffix(".parquet"))
    text = json.dumps({name: _plain(value) for name, value in figures.items()}, indent=2)
    args.output.write_text(text + "\n")
    print(f"Wrote {args.output}, and beside it the picture and, for `trl-rlad view`, the rollouts")


def _plain(value):
    """A value for JSON, which has no NaN."""
    if isinstance(value, Estimate):
        return {name: _plain(each) for name, each in value._asdict().items()}
    if isinstance(value, float):
        return None if value != value else round(value, 4)
    return value
