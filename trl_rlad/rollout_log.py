"""What student, teacher and loss make of each token of a few rollouts, written down while a run goes on."""

from itertools import pairwise
from math import inf, log
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .objective.guidance import Guidance
from .rollouts import CLIPPED, FOLDER, TOKENS, choose_groups, write_rollouts


FILES = 100  # of a run, and as many of its evaluations
WATCHED = 1_000_000  # tokens of a generation batch that are held in memory: 40 bytes each
NAMED, RARE = 3, log(0.01)  # of the tokens that the teacher names, how many are kept, and the least of them


def split_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds to what comes before it, its space included."""
    if not ids:
        return []
    alone = tokenizer.batch_decode([[id] for id in ids], clean_up_tokenization_spaces=False)
    pairs = tokenizer.batch_decode([list(pair) for pair in pairwise(ids)], clean_up_tokenization_spaces=False)
    followed = zip(pairs, alone, alone[1:], strict=False)
    # Half a character isn't the beginning of the whole one: then the token's own text, whatever it is
    return alone[:1] + [pair.removeprefix(a) if pair.startswith(a) else b for pair, a, b in followed]


def describe_rollouts(
    batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, columns: dict[str, torch.Tensor]
) -> list[dict]:
    """
    Rollouts as records, one for each completion, without padding.

    Args:
        batch (`dict[str, torch.Tensor]`):
            `prompt_ids` and `prompt_mask` of shape `(B, P)`, `completion_ids` and `completion_mask` of shape `(B, T)`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            What turns them into text.
        columns (`dict[str, torch.Tensor]`):
            Further values by name, of shape `(B,)` or `(B, T)`.

    Returns:
        `list[dict]`: with `prompt`, `ids`, `tokens` (a text for each id), and the columns: a number or a list of one
        for each token, `None` for NaN.
    """
    prompts, completions = (
        [ids[mask.bool()].tolist() for ids, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True)]
        for part in ("prompt", "completion")
    )
    columns = {name: values.tolist() for name, values in columns.items()}
    records = []
    for row, ids in enumerate(completions):
        record = {"prompt": tokenizer.decode(prompts[row]), "ids": ids, "tokens": split_text(ids, tokenizer)}
        for name, values in columns.items():
            value = values[row]
            value = list(map(_known, value[: len(ids)])) if isinstance(value, list) else _known(value)
            record[name] = value
        records.append(record)
    return records


def add_names(record: dict, ids: torch.Tensor, logps: torch.Tensor, tokenizer: PreTrainedTokenizerBase):
    """Add to a record the texts that the teacher names at each token, `named`, and their log-probabilities in nats,
    `named_logps`. `ids` and `logps` are of shape `(N, k)`, for the N tokens that the teacher has scored."""
    is_scored = [x is not None for x in record["teacher_logps"]]
    by_token = list(zip(ids[:, :NAMED].tolist(), logps[:, :NAMED].tolist(), strict=True))
    texts = {id: tokenizer.decode([id]) for id in {id for of_token, _ in by_token for id in of_token}}
    of_scored = iter(by_token)
    named = [list(zip(*next(of_scored), strict=True)) if scored else [] for scored in is_scored]
    named = [[(texts[id], logp) for id, logp in of_token if logp > RARE] for of_token in named]
    record["named"] = [[text for text, _ in of_token] for of_token in named]
    record["named_logps"] = [[logp for _, logp in of_token] for of_token in named]


def _known(value):
    return None if value != value else value


class _Watched:
    """Rows of a generation batch, or of an evaluation, by their number in that of all processes."""

    def __init__(self, step: int = -1):
        self.step = step
        self.rewards: list[float | None] = []  # of all processes
        self.tokens, self.groups = 0, set[int]()  # that are watched
        self.rows: dict[int, dict] = {}  # of them, what `RolloutLog.record` has seen last


class RolloutLog(TrainerCallback):
    """
    Writes with the logs of a run what student, teacher and loss make of each token of a few groups, for `trl-rlad
    view`; and gives TRL's tables of `log_completions` a column `teacher_log_ratio`.

    The groups are a few of each kind ([`~trl_rlad.rollouts.choose_groups`]) of the last generation batch, and of each
    evaluation, those of the main process. They go to `_rollouts/rollouts_STEP.parquet` in the run's folder, one row
    for each completion, and those of an evaluation to `rollouts_STEP_eval.parquet`: at most 100 files of each, spread
    over the run, of at most 60,000 tokens, which take less than 1 MB. STEP is that of the log; what student and
    teacher make of a completion is of the last loss before it.

    Args:
        trainer ([`RLADTrainer`]):
            Its guide calls `number` and `record`.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.is_in_table = False  # whether TRL's table has the rows of this generation batch, and not an evaluation's
        self.log_ratios: dict[int, float | None] = {}  # means of all rows of the generation batch
        self.watched = {"train": _Watched(), "eval": _Watched()}
        self.written = {"train": -inf, "eval": -inf}  # the steps of the last files

    @property
    def mode(self) -> str:
        return "train" if self.trainer.model.training else "eval"

    def number(self, batch: dict, rewards: torch.Tensor) -> dict:
        """Number the rows of a generation batch, `rollout`, and choose which are watched. `rewards` are those of all
        processes, of shape `(B * processes,)`."""
        trainer, mode = self.trainer, self.mode
        step, lengths = trainer.state.global_step, batch["completion_mask"].sum(1).tolist()
        self.is_in_table = mode == "train"
        if mode == "train":
            self.log_ratios = {}
        if mode == "train" or self.watched["eval"].step != step:  # an evaluation has several batches
            self.watched[mode] = _Watched(step)
        watched = self.watched[mode]
        first = len(watched.rewards) + len(lengths) * trainer.accelerator.process_index
        watched.rewards += map(_known, rewards.tolist())
        if trainer.accelerator.is_main_process:
            tokens: dict[int, int] = {}
            for number, length in enumerate(lengths, start=first):
                group = number // self._group_size(mode)
                tokens[group] = tokens.get(group, 0) + length
            for group in Random(step).sample(sorted(tokens), len(tokens)):
                if not watched.groups or watched.tokens + tokens[group] <= WATCHED:
                    watched.groups.add(group)
                    watched.tokens += tokens[group]
        return {**batch, "rollout": torch.arange(first, first + len(lengths), device=batch["completion_ids"].device)}

    def _group_size(self, mode):
        return self.trainer.num_generations if mode == "train" else self.trainer.num_generations_eval

    def record(self, per_token_logps: torch.Tensor, guidance: Guidance, batch: dict):
        """
        Keep what is wanted of a micro-batch. Called by all processes at once.

        Args:
            per_token_logps (`torch.Tensor` of shape `(B, T)`):
                Log-probabilities under the student, in nats.
            guidance ([`~trl_rlad.objective.guidance.Guidance`]):
                What changes in the loss.
            batch (`dict`):
                The micro-batch, with the numbers that `number` has given to its rows.
        """
        if "rollout" not in batch:  # it was not generated here
            return
        trainer, logps, mode = self.trainer, per_token_logps.detach().float(), self.mode
        teacher = torch.full_like(logps, float("nan"))
        if "teacher_per_token_logps" in batch:
            teacher = torch.where(batch["teacher_mask"], batch["teacher_per_token_logps"], teacher)
        numbers = batch["rollout"]
        if trainer.args.log_completions and mode == "train":
            pairs = torch.stack([numbers.double(), (logps - teacher).nanmean(1).double()], dim=1)
            for number, mean in trainer.accelerator.gather(pairs).tolist():
                self.log_ratios[int(number)] = _known(round(mean, 4))

        watched = self.watched[mode]
        rows = [i for i, n in enumerate(numbers.tolist()) if n // self._group_size(mode) in watched.groups]
        if not rows:
            return
        clipped = torch.zeros_like(logps, dtype=torch.int8)
        for name, is_clipped in guidance.causes.items():
            clipped = clipped.masked_fill(is_clipped, CLIPPED.index(name.partition("_by_")[2]))
        part = torch.zeros_like(logps) if guidance.part is None else guidance.part
        columns = {"logps": logps, "teacher_logps": teacher, "part": part, "clipped": clipped}
        columns |= {"row": numbers, "advantage": batch["advantages"].reshape(len(numbers), -1).mean(1)}
        columns |= {name: batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
        columns |= {"teacher_index": batch["teacher_index"]} if "teacher_index" in batch else {}
        columns = {name: values[rows].cpu() for name, values in columns.items()}
        for i, row in enumerate(rows):
            length = int(columns["completion_mask"][i].sum())
            # Cloned: the padding isn't to be held
            kept: dict[str, Any] = {
                name: values[i : i + 1].clone()
                if values.dim() == 1 or "prompt" in name
                else values[i : i + 1, :length].clone()
                for name, values in columns.items()
            }
            if "teacher_top_ids" in batch:
                kept["named"] = [batch[f"teacher_top_{part}"][row][:, :NAMED].cpu() for part in ("ids", "logps")]
            watched.rows[int(kept["row"])] = kept

    def on_train_begin(self, args, state, control=None, **kwargs):
        """A run that begins anew, or goes on from a checkpoint, leaves no files of steps that are still to come."""
        if state.is_world_process_zero:
            for file in Path(args.output_dir, FOLDER).glob("rollouts_*.parquet"):
                if (step := file.stem.split("_")[1]).isdigit() and int(step) > state.global_step:
                    file.unlink()

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        mode, step = self.mode, state.global_step
        if args.log_completions:
            self.trainer.fill_column("teacher_log_ratio", self.log_ratios if self.is_in_table else {})
        if not self.watched[mode].rows or 0 < step - self.written[mode] < state.max_steps / FILES:
            return
        self.written[mode] = step
        name = f"rollouts_{step:05d}{'_eval' if mode == 'eval' else ''}.parquet"
        write_rollouts(list(self._describe(mode, step)), Path(args.output_dir, FOLDER, name))

    def _describe(self, mode, step):
        """The records of what is written, in the order of their numbers."""
        watched, size, bound = self.watched[mode], self._group_size(mode), self.trainer.args.success_reward
        groups: dict[int, list[int]] = {}
        for number in sorted(watched.rows):
            groups.setdefault(number // size, []).append(number)
        parts = {number: float(row["part"].sum()) for number, row in watched.rows.items()}
        lengths = {number: row["part"].size(1) for number, row in watched.rows.items()}
        means = {
            g: sum(parts[n] for n in of_group) / max(1, sum(lengths[n] for n in of_group))
            for g, of_group in groups.items()
        }
        rewards = {group: watched.rewards[group * size : (group + 1) * size] for group in groups}
        solved = {group: [None if x is None else x > bound for x in of_group] for group, of_group in rewards.items()}
        chosen = choose_groups(means, solved, step)
        # Of each group the row first in which the teacher's part is the largest, and then the others
        order = [sorted(groups[group], key=lambda number: -parts[number]) for group in chosen]
        tokens, kept = 0, []
        for number in (of_group[rank] for rank in range(size) for of_group in order if rank < len(of_group)):
            if not kept or tokens + lengths[number] <= TOKENS:
                tokens += lengths[number]
                kept.append(number)
        for number in sorted(kept):
            group, place = divmod(number, size)
            facts = {"step": step, "split": mode, "group": group, "kind": chosen[group], "rewards": rewards[group]}
            facts |= {"reward": rewards[group][place], "solved": solved[group][place]}
            yield facts | self._describe_row(watched.rows[number])

    def _describe_row(self, row):
        tokenizer = self.trainer.tokenizer
        names = ("row", "advantage", "logps", "teacher_logps", "part", "clipped")
        (record,) = describe_rollouts(row, tokenizer, {name: row[name] for name in names})
        if "teacher_index" in row:
            record["teacher"] = list(self.trainer.teacher_scorer.scorers)[int(row["teacher_index"])]
        if "named" in row and len(row["named"][0]):
            add_names(record, *row["named"], tokenizer)
        return record
