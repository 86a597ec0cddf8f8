"""What student and teacher make of each token of a rollout: as records, and into the folder of a run."""

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .runs import CLIPPED, FOLDER


GROUPS = 4  # of one generation batch: enough to see what happens, and a few hundred KB each


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
    batch: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    columns: dict[str, torch.Tensor],
    rows: list[int] | None = None,
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
        rows (`list[int]`, *optional*):
            Which rows. `None` takes all.

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
    for row in range(len(completions)) if rows is None else rows:
        ids = completions[row]
        record = {"prompt": tokenizer.decode(prompts[row]), "ids": ids, "tokens": split_text(ids, tokenizer)}
        for name, values in columns.items():
            value = values[row]
            value = list(map(_known, value[: len(ids)])) if isinstance(value, list) else _known(value)
            record[name] = value
        records.append(record)
    return records


def _known(value):
    return None if value != value else value


class RolloutLog(TrainerCallback):
    """
    Writes with `log_completions`, beside TRL's tables, what student and teacher make of each token of a few groups,
    for `trl-rlad view`; and gives those tables a column `teacher_log_ratio`.

    The groups are the first ones with signal of the last generation batch, those of the main process. They go to
    `rollouts/rollouts_STEP.parquet` in the run's folder, one row for each completion: see [`describe_rollouts`].
    STEP is that of the log; what student and teacher make of a completion is of the last loss before it.

    Args:
        trainer ([`RLADTrainer`]):
            Its guide calls `choose` and `record`.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.is_in_table = False  # whether TRL's table has the rows of this generation batch, and not an evaluation's
        self._forget()

    def _forget(self):
        # All by the row in the generation batch of all processes
        self.rewards: dict[int, float | None] = {}  # of the chosen ones
        self.log_ratios: dict[int, float | None] = {}  # means of all
        self.records: dict[int, dict] = {}  # of the chosen ones

    def choose(self, batch: dict, rewards: torch.Tensor) -> dict:
        """Number the rows of a generation batch, `rollout`, and choose what is to be kept. `rewards` are of shape
        `(B,)`."""
        self.is_in_table = self.trainer.model.training
        if not self.is_in_table:
            return batch
        self._forget()
        advantages = batch["advantages"].reshape(len(rewards), -1)
        numbers = torch.arange(len(rewards), device=advantages.device)
        numbers += len(rewards) * self.trainer.accelerator.process_index
        if self.trainer.accelerator.is_main_process:
            groups = numbers // self.trainer.num_generations
            with_signal = groups[(advantages != 0).any(1)].unique().tolist()[:GROUPS]
            rows = [row for row, group in enumerate(groups.tolist()) if group in with_signal]
            self.rewards = {int(numbers[row]): _known(float(rewards[row])) for row in rows}
        return {**batch, "rollout": numbers}

    def record(self, per_token_logps: torch.Tensor, causes: dict[str, torch.Tensor], batch: dict):
        """
        Keep what is wanted of a micro-batch. Called by all processes at once.

        Args:
            per_token_logps (`torch.Tensor` of shape `(B, T)`):
                Log-probabilities under the student, in nats.
            causes (`dict[str, torch.Tensor]`):
                What the clipping drops, see [`~trl_rlad.objective.clipping.clip_causes`].
            batch (`dict`):
                The micro-batch, with the numbers that `choose` has given to its rows.
        """
        if "rollout" not in batch:
            return
        trainer, logps = self.trainer, per_token_logps.detach().float()
        teacher = torch.full_like(logps, float("nan"))
        if "teacher_per_token_logps" in batch:
            teacher = torch.where(batch["teacher_mask"], batch["teacher_per_token_logps"], teacher)
        means = (logps - teacher).nanmean(1)
        for number, mean in trainer.accelerator.gather(torch.stack([batch["rollout"].float(), means], dim=1)).tolist():
            self.log_ratios[int(number)] = _known(round(mean, 4))

        numbers = batch["rollout"].tolist()
        rows = [row for row, number in enumerate(numbers) if number in self.rewards]
        if not rows:
            return
        clipped = torch.zeros_like(logps, dtype=torch.long)
        for name, is_clipped in causes.items():
            clipped = clipped.masked_fill(is_clipped, CLIPPED.index(name.partition("_by_")[2]))
        columns = {
            "row": batch["rollout"],
            "advantage": batch["advantages"].reshape(len(numbers), -1).mean(1),
            "logps": logps,
            "teacher_logps": teacher,
            "clipped": clipped,
        }
        for record in describe_rollouts(batch, trainer.tokenizer, columns, rows):
            number = record["row"]
            group = number // trainer.num_generations
            self.records[number] = {"group": group, **record, "reward": self.rewards[number]}

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.trainer.fill_column("teacher_log_ratio", self.log_ratios if self.is_in_table else {})
        if self.records:
            path = Path(args.output_dir, FOLDER, f"{FOLDER}_{state.global_step:05d}.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            records = [{"step": state.global_step, **self.records[number]} for number in sorted(self.records)]
            pq.write_table(pa.Table.from_pylist(records), path)
