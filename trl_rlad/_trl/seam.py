"""The seam to TRL's GRPOTrainer: the methods that are overridden, and the four hooks that they call."""

import time
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from math import isfinite
from traceback import walk_tb
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOTrainer

from ..objective.guidance import Guidance
from .loss_call import LossCall, loss_is_patched
from .names import is_async_callable
from .trimming import TrimmingGRPOTrainer


class Rollouts(NamedTuple):
    """This process's rollouts of a generation batch, one list of token ids for each, without padding."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    tool_mask: list[list[int]] | None  # 0 where a tool has written, else 1


class Guide:
    """
    What a [`GuidedGRPOTrainer`] asks, in this order. This one leaves the loss bit for bit GRPO's.

    Once in each generation batch, in training and in evaluation:

    1. `begin`, when completions have been generated, unless there are images
    2. `finish`, when advantages are known, before TRL shuffles the batch and cuts it into micro-batches

    and once in each micro-batch:

    3. `watch_forward`, around the student's forward pass
    4. `guide`, after it
    """

    # Whether the loss is more than GRPO's, so that a step in which `guide` isn't called is an error
    is_required = False

    def begin(self, rollouts: Rollouts, rows: list[dict]) -> AbstractContextManager:
        """Returns a context in which asynchronous reward functions run: a process that waits for another one in there
        may wait forever. `rows` are the dataset's, one for each rollout."""
        return nullcontext()

    def finish(self, batch: dict, rewards_per_func: torch.Tensor, rows: list[dict]) -> dict:
        """Returns `batch`, a generation batch of this process, with batch-first tensors added. `rewards_per_func` are
        the rewards of all processes, `(B of all, functions)`."""
        return batch

    def watch_forward(self, model: torch.nn.Module, batch: dict) -> AbstractContextManager:
        """Returns a context for the forward pass, from which `batch`, a micro-batch, may be written into."""
        return nullcontext()

    def guide(self, per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor, batch: dict) -> Guidance:
        """Returns what is to change in the loss of a micro-batch that compares these log-probabilities, `(B, T)`."""
        return Guidance()


@dataclass
class _GenerationCall:
    """One call of TRL's generation: what its methods hand to each other."""

    rows: list[dict]
    early: AbstractContextManager = field(default_factory=nullcontext)  # what `Guide.begin` returned
    rewards_per_func: torch.Tensor | None = None


class GuidedGRPOTrainer(TrimmingGRPOTrainer):
    """[`~trl.GRPOTrainer`] that asks a [`Guide`], its attribute `guide`, what to change in the loss."""

    model: PreTrainedModel
    num_generations: int
    _logs: dict[str, Any]

    guide: Guide = Guide()
    own_columns: tuple[str, ...] = ()  # of a dataset, kept beside TRL's with `remove_unused_columns=True`
    generation_time = 0.0  # seconds that the last generation batch took, tools included

    _generation_call: _GenerationCall | None = None
    _loss_call: LossCall | None = None
    _has_guided = False  # whether the loss of this step has come to `guide`

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*self._signature_columns, *self.own_columns]

    def _generate_and_score_completions(self, inputs):
        self._generation_call = call = _GenerationCall(inputs)
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self._generation_call = None
        return self.guide.finish(batch, call.rewards_per_func, inputs)

    def _generate(self, prompts):
        start = time.perf_counter()
        outputs = super()._generate(prompts)
        self.generation_time = time.perf_counter() - start
        self.log_value("generation_time", self.generation_time)
        prompt_ids, completion_ids, tool_mask, *_, images, _ = outputs
        # Without a call, somebody else makes the rollouts: `guide` will miss the teacher's scores, and say so
        if self._generation_call is not None and images is None:
            rollouts = Rollouts(prompt_ids, completion_ids, tool_mask)
            self._generation_call.early = self.guide.begin(rollouts, self._generation_call.rows)
        return outputs

    def _calculate_rewards(self, inputs, *args, **kwargs):
        call = self._generation_call or _GenerationCall(inputs)
        try:
            with call.early if any(map(is_async_callable, self.reward_funcs)) else nullcontext():
                call.rewards_per_func = rewards = super()._calculate_rewards(inputs, *args, **kwargs)
        except TypeError as error:
            *_, (frame, _) = walk_tb(error.__traceback__)
            if frame.f_globals["__name__"] != GRPOTrainer.__module__:  # but within a function
                raise
            raise TypeError(
                f"A reward function (`{'`, `'.join(self.reward_func_names)}`) has returned something else than a list "
                f"with a number, or `None`, for each completion: {error}."
            ) from None
        if rewards.isinf().any():  # TRL would make an advantage of 0 or of 3e38 of it
            name = self.reward_func_names[rewards.isinf().any(0).nonzero()[0].item()]
            raise FloatingPointError(
                f"The reward function `{name}` has returned an infinite reward. Let it return a number, or `None` "
                "where it can't judge."
            )
        return rewards

    def training_step(self, *args, **kwargs):
        self._has_guided = False
        loss = super().training_step(*args, **kwargs)
        # Only here is it noticed that a mixin's loss has never made a `LossCall`
        if self.guide.is_required and not self._has_guided:
            raise loss_is_patched("the loss never asked for the student's log-probabilities through `RLADTrainer`")
        return loss

    def _compute_loss(self, model, inputs):
        self._loss_call = call = LossCall(self, inputs)
        try:
            loss = super()._compute_loss(model, call.watched)
            call.check()
        finally:
            self._loss_call = None
            call.restore()
        if self.model.training and not loss.isfinite():
            raise self._not_finite("loss")
        return loss

    # TRL's loss asks for the student's log-probabilities once, and only then reads the old ones, the advantages and
    # `beta`. So within this call all is known that guidance depends on, and nothing is read yet that it changes: here
    # it goes in.
    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        call = self._loss_call
        if call is None or call.has_asked:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        call.has_asked = True
        with self.guide.watch_forward(model, call.batch):
            outputs = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._has_guided = True
        per_token_logps = outputs[0]
        if self.model.training and torch.is_grad_enabled() and not per_token_logps.requires_grad:
            raise loss_is_patched("the student's log-probabilities carry no gradient")
        old_per_token_logps = call.batch.get("old_per_token_logps")
        if old_per_token_logps is None:  # the rollouts are the current policy's, and TRL saves the forward pass
            old_per_token_logps = per_token_logps.detach()
        guidance = self.guide.guide(per_token_logps, old_per_token_logps, call.batch)
        call.substitute(guidance, per_token_logps, old_per_token_logps)
        return outputs

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        # With float16 the scaler skips a step like this; DeepSpeed has made its update
        if self.args.fp16 or self.accelerator.distributed_type == DistributedType.DEEPSPEED or isfinite(norm):
            return norm
        raise self._not_finite("gradient")

    def _not_finite(self, what):
        """The error of a step that would leave no student."""
        return FloatingPointError(
            f"The {what} of step {self.state.global_step + 1} isn't finite. Training stops before the update, with "
            "the student as it was. The cause may be too high a `learning_rate`, or a teacher far from the student "
            "without a `teacher_log_ratio_clip`."
        )

    def tokenize_prompts(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts, one for each row of this process's batch, as they are made for generation."""
        return self._tokenize_prompts(deepcopy(prompts))[0]  # TRL may write into messages

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return self._tokenizer

    @property
    def is_vision_language_model(self) -> bool:
        """Whether prompts are processed for a vision-language model."""
        return self._is_vlm

    def total_reward(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        """Rewards `(B,)` of all processes, the weighted sums of the reward functions'. NaN where none can judge."""
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func)).nansum(1)
        return rewards.masked_fill(rewards_per_func.isnan().all(1), float("nan"))

    def of_this_process(self, values: torch.Tensor) -> torch.Tensor:
        """This process's rows of values of all processes."""
        size = len(values) // self.accelerator.num_processes
        return values[self.accelerator.process_index * size :][:size]

    def log_means(self, metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]):
        """Log the mean over all processes of each metric, given as its values and their weights. All processes call it
        at once, with the same names in the same order."""
        if not metrics:
            return
        totals = torch.stack([torch.stack([(v * w).sum(), w.sum()]) for v, w in metrics.values()]).float()
        totals = self.accelerator.reduce(totals, reduction="sum").tolist()
        for name, (total, count) in zip(metrics, totals, strict=True):
            self.log_value(name, total / count if count else float("nan"))  # TRL leaves NaN out of means

    def log_value(self, name: str, value: float):
        """Log a metric that all processes agree on."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def last_value(self, name: str) -> float:
        """What was logged last of a metric."""
        return self._metrics["train" if self.model.training else "eval"][name][-1]

    def fill_column(self, name: str, values: dict[int, float | None]):
        """Fill a column of the table that `log_completions` writes, by the number of the row, else with `None`."""
        self._logs["extra"][name] = [values.get(row) for row in range(len(self._logs["prompt"]))]
