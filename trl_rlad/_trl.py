"""
The only module that touches what TRL keeps private. `tests/test_trl_contract.py` pins every name used here.

- `GRPOTrainer._generate_and_score_completions`: its dict is shuffled, split and buffered; what is added goes along.
- `GRPOTrainer._tokenize_prompts`, which returns token ids first.
- `GRPOTrainer._generate`, which returns token ids of prompts and completions, the masks of tools, and with them images.
- `GRPOTrainer._calculate_rewards`, which returns the rewards of all processes, a column for each reward function.
- `GRPOTrainer._compute_loss`, and in it the one call of `_get_per_token_logps_and_entropies` (a 3-tuple since 1.7) that
  comes before `inputs.get("old_per_token_logps")` and `inputs.get("sampling_per_token_logps", old)` are read, and
  `self.beta * per_token_kl`, which it adds to the loss of each token if `self.beta != 0.0`.
- `GRPOTrainer._prepare_inputs`, which shuffles a generation batch and cuts it into the micro-batches of
  `_buffered_inputs`, of which it returns number `_step % steps_per_generation`; and the calls of
  `_get_per_token_logps_and_entropies` with a `batch_size`, for the log-probabilities of the old policy and the reference.
- `Trainer._get_grad_norm`, which is called before the optimizer's step.
- `GRPOTrainer._entropy_bonus_enabled`, `aux_loss_enabled`, `top_entropy_quantile` and `pad_to_multiple_of`.
- `GRPOTrainer._logs`, whose `prompt` and `extra` are columns of the table of completions.
- `GRPOTrainer._metrics`, `_tokenizer`, `_is_vlm`, `eos_token_ids`, `importance_sampling_level`, `epsilon_low` and
  `epsilon_high`; `_tag_names`, `_name` and `_paper`, which feed the model card.
- The inputs beside the tokens that the student's forward pass is given for images, and `split_pixel_values_by_grid`.
- `trl.trainer.utils`: `add_fused_lm_head` (since 1.15), `create_model_from_path`, `get_config_model_id`,
  `get_comet_experiment_url`, `get_trackio_space_url`, `is_async_callable`, `maybe_gather_lm_head_ctx`, `use_adapter`, `split_pixel_values_by_grid` and its opposite;
  `trl.models.prepare_fsdp`.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from math import gcd, isfinite
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_wandb_available
from trl import GRPOTrainer
from trl.models import prepare_fsdp
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    get_comet_experiment_url,
    get_config_model_id,
    get_trackio_space_url,
    is_async_callable,
    split_pixel_values_by_grid,
    unsplit_pixel_values_by_grid,
    use_adapter,
)
from trl.trainer.utils import maybe_gather_lm_head_ctx as gather_lm_head

from .packing import micro_batches
from .padding import IMAGES, merge, select, trim
from .trrd import sequence_log_ratio


__all__ = [
    "GuidedGRPOTrainer",
    "add_fused_lm_head",
    "create_model_from_path",
    "gather_lm_head",
    "get_config_model_id",
    "logit_scale",
    "patched",
    "prepare_fsdp",
    "run_links",
    "split_images",
    "use_adapter",
]

# The loss types that clip the ratio, for which TRL logs `clip_ratio/*`
CLIPPED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def logit_scale(text_config: PretrainedConfig) -> float:
    """What a model of this configuration multiplies its logits by, as TRL's fused LM head reads it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text_config, name, None) is not None:
            return getattr(text_config, name)
    scaling = getattr(text_config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if text_config.model_type == "hyperclovax" else 1 / scaling


def run_links() -> dict[str, str]:
    """Where the run that is being logged can be looked at, by the name of the service."""
    links = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        links["Weights & Biases"] = wandb.run and wandb.run.url
    return {name: url for name, url in links.items() if url}


# What TRL hands to a vision-language model beside the tokens
IMAGE_INPUTS = IMAGES | {"token_type_ids", "mm_token_type_ids"}


def split_images(batch: dict) -> list[dict[str, torch.Tensor]]:
    """
    What each row of a batch hands to a vision-language model beside its tokens, on the CPU.

    Rows whose tensors have the same shapes but for the first dimension are put together by concatenation. The token
    types, of one dimension, are those of the row's own tokens, without padding. A row without images has nothing.
    """
    num_images = batch.get("num_images") or [0] * len(batch["prompt_ids"])
    is_token = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).bool()
    inputs = {name: value for name, value in split_pixel_values_by_grid(batch).items() if name in IMAGE_INPUTS}

    def take(name, row):
        if name.endswith("token_type_ids"):
            return inputs[name][row][is_token[row]].cpu()
        # A list has the images of each row; a tensor, all rows' images, padded to the same number
        return inputs[name][row if isinstance(inputs[name], list) else slice(row, row + 1)].cpu()

    return [{name: take(name, row) for name in inputs} if count else {} for row, count in enumerate(num_images)]


class _Beta(float):
    """A `beta` whose product with the per-token KL is weighted, and has a penalty of our own added."""

    weight: torch.Tensor | float = 1.0
    penalty: torch.Tensor | float = 0.0
    is_used = False

    def __ne__(self, other):  # TRL leaves the product out at 0
        return True

    def __mul__(self, per_token_kl):
        self.is_used = True
        return float(self) * self.weight * per_token_kl + self.penalty


def patched(problem: str) -> RuntimeError:
    """The error of a step in which the teacher would have no say, though it was to have one."""
    return RuntimeError(
        f"This would not be training with a teacher: {problem}. Likely causes are a library that patches TRL (such as "
        "Unsloth), a mixin with a loss of its own, or a TRL newer than those tried. Train without it, or set `alpha=1.0` "
        "without a `teacher_kl_coef` or `distillation_fraction`."
    )


class _LossBatch(dict):
    """The loss's own copy of a batch, which knows what was put into it and not read since."""

    def __init__(self, batch: dict):
        super().__init__(batch)
        self.unread: set[str] = set()

    def __setitem__(self, key, value):
        self.unread.add(key)
        super().__setitem__(key, value)

    def __getitem__(self, key):
        self.unread.discard(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.unread.discard(key)
        return super().get(key, default)


class GuidedGRPOTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with five places to hold on to: what a rollout batch is given along, what is seen of the forward
    pass, which log-probabilities the policy is compared with, what is added to the loss of each token, and what is seen of
    all this. Left alone, they change nothing, not even a bit. With `trims_padding` the student's passes run on micro-batches of similar lengths without
    the padding of the others.
    """

    model: PreTrainedModel
    num_generations: int
    _logs: dict[str, Any]
    trims_padding = False
    # Whether the loss is more than GRPO's, so that a step in which nobody asks is an error
    is_guided = False

    generation_time = 0.0  # seconds that the last generation batch took, tools included

    _has_guided = False  # whether the loss of this step has come by here
    _loss_batch = None  # the batch of the loss being computed, until its log-probabilities are known
    # Those of this process: token ids of prompts and completions, and if there are any, masks of tools, and images
    _rollouts, _images = None, None
    _rows, _rewards_per_func = None, None  # those of the generation batch being made; the rewards of all processes

    def extend_rollout(self, batch: dict, rewards_per_func: torch.Tensor, rows: list[dict]) -> dict:
        """
        Return `batch`, a whole generation batch with its advantages, with batch-first tensors added. `rewards_per_func`
        are the rewards of all processes, a row for each completion and a column for each reward function; `rows` are the
        dataset's rows, one for each completion of this process.
        """
        return batch

    def watch_forward(self, model: torch.nn.Module, batch: dict) -> AbstractContextManager:
        """
        Return a context for the forward pass of the loss on `batch`, the loss's own copy: what is seen there may be added.
        """
        return nullcontext()

    def get_anchor(
        self, per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor, batch: dict
    ) -> torch.Tensor | None:
        """
        Return the log-probabilities to compare `per_token_logps` with, or `None` for those of the old policy. `batch` is
        the loss's own copy: its `advantages` may be replaced.
        """
        return None

    def get_penalty(self, per_token_logps: torch.Tensor, batch: dict) -> torch.Tensor | None:
        """Return what is added to the loss of each token, as the reference KL is, or `None` for nothing."""
        return None

    def after_generation(
        self,
        rows: list[dict],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        tool_mask: list[list[int]] | None,
    ):
        """Told of this process's rollouts, of text only, when they are there, with the dataset's rows they belong to."""

    def see_tokens(
        self,
        per_token_logps: torch.Tensor,
        old_per_token_logps: torch.Tensor,
        anchor: torch.Tensor | None,
        batch: dict,
    ):
        """Look at what the loss compares in a micro-batch, `(B, T)` each. `anchor` is what `get_anchor` returned."""

    def during_rewards(
        self,
        rows: list[dict],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        tool_mask: list[list[int]] | None,
    ) -> AbstractContextManager:
        """
        Return a context in which asynchronous reward functions run, given this process's rollouts, of text only, and the
        dataset's rows that they belong to. A process that waits for another one in there may wait forever.
        """
        return nullcontext()

    def _generate(self, prompts):
        start = time.perf_counter()
        outputs = super()._generate(prompts)
        self.generation_time = time.perf_counter() - start
        self.log_value("generation_time", self.generation_time)
        *self._rollouts, _, _, _, self._images, _ = outputs
        if self._images is None and self._rows is not None:  # else they don't come by the teacher, which is said later
            self.after_generation(self._rows, *self._rollouts)
        return outputs

    def _calculate_rewards(self, inputs, *args, **kwargs):
        is_waiting = any(map(is_async_callable, self.reward_funcs)) and self._images is None
        with self.during_rewards(inputs, *self._rollouts) if is_waiting else nullcontext():
            self._rewards_per_func = rewards = super()._calculate_rewards(inputs, *args, **kwargs)
        if rewards.isinf().any():  # TRL would make an advantage of 0 or of 3e38 of it
            name = self.reward_func_names[rewards.isinf().any(0).nonzero()[0].item()]
            raise FloatingPointError(
                f"The reward function `{name}` has returned an infinite reward. Let it return a number, or `None` where it "
                "can't judge."
            )
        return rewards

    def _generate_and_score_completions(self, inputs):
        self._rows = inputs
        batch = super()._generate_and_score_completions(inputs)
        return self.extend_rollout(batch, self._rewards_per_func, inputs)

    def training_step(self, *args, **kwargs):
        self._has_guided = False
        loss = super().training_step(*args, **kwargs)
        if self.is_guided and not self._has_guided:
            raise patched("the loss never asked for the student's log-probabilities through `RLADTrainer`")
        return loss

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.trims_padding and self._buffered_inputs is not before:
            steps = self.args.steps_per_generation
            batch = merge([split_pixel_values_by_grid(micro_batch) for micro_batch in self._buffered_inputs])
            rows = len(batch["advantages"]) // steps
            window = rows * gcd(steps, self.args.gradient_accumulation_steps) if self._order_is_free else rows
            self._buffered_inputs = self._cut(batch, rows, window)
            inputs = self._buffered_inputs[self._step % steps]
        return inputs

    @property
    def _order_is_free(self):
        # Within an optimizer step, unless the loss has something that depends on which rows share a micro-batch: a mean
        # over its tokens (BNPO, the entropy bonus), a quantile of its entropies, or its load of the experts
        return not (
            self.loss_type == "bnpo"
            or self._entropy_bonus_enabled
            or self.top_entropy_quantile < 1.0
            or self.aux_loss_enabled
        )

    def _cut(self, batch, rows, window):
        """Micro-batches of `rows` of similar lengths, each without the padding of the others."""
        lengths = (batch[f"{part}_mask"].sum(1).tolist() for part in ("prompt", "completion"))
        cuts = micro_batches(*lengths, rows, window)
        return [trim(unsplit_pixel_values_by_grid(select(batch, cut)), self.pad_to_multiple_of or 1) for cut in cuts]

    def _compute_loss(self, model, inputs):
        # A copy: with several iterations or accumulation steps, TRL hands out the same buffered dict again
        self._loss_batch = batch = _LossBatch(inputs)
        beta, use_bias_correction_kl = self.beta, self.args.use_bias_correction_kl
        try:
            loss = super()._compute_loss(model, batch)
            if batch.unread or isinstance(self.beta, _Beta) and not self.beta.is_used:
                raise patched("the loss did not read what the teacher had put into it")
            if self.beta is not beta and beta == 0.0:  # TRL has logged a KL, of 0, to a reference that isn't there
                metrics = self._metrics["train" if self.model.training else "eval"]
                metrics["kl"].pop()
                if not metrics["kl"]:  # none that a reward function has logged by this name
                    del metrics["kl"]
            if self.model.training and not loss.isfinite():
                raise self._not_finite("loss")
            return loss
        finally:
            self._loss_batch = None
            self.beta, self.args.use_bias_correction_kl = beta, use_bias_correction_kl

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        # With float16 the scaler skips a step like this; DeepSpeed has made its update
        if self.args.fp16 or self.accelerator.distributed_type == DistributedType.DEEPSPEED or isfinite(norm):
            return norm
        raise self._not_finite("gradient")

    def _not_finite(self, what):
        """The error of a step that would leave no student."""
        return FloatingPointError(
            f"The {what} of step {self.state.global_step + 1} isn't finite. Training stops before the update, with the student "
            "as it was. The cause may be too high a `learning_rate`, or a teacher far from the student without a "
            "`teacher_log_ratio_clip`."
        )

    def _score_trimmed(self, model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs):
        """The log-probabilities of a generation batch, from as many forward passes as TRL's."""
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "prompt_mask": attention_mask[:, :-logits_to_keep],
            "completion_mask": attention_mask[:, -logits_to_keep:],
            "row": torch.arange(len(input_ids), device=input_ids.device),
            **{key: value for key, value in kwargs.items() if value is not None},
        }
        logps, rows = [], []
        for part in self._cut(split_pixel_values_by_grid(batch), batch_size, window=len(input_ids)):
            rows.append(part.pop("row"))
            part.pop("prompt_mask")
            width = part.pop("completion_mask").size(1)
            outputs = super()._get_per_token_logps_and_entropies(model, logits_to_keep=width, **part)
            logps.append(pad(outputs[0], (0, logits_to_keep - width)))
        return torch.cat(logps)[torch.cat(rows).argsort()], None, None

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self.trims_padding and kwargs.get("batch_size") is not None:
            return self._score_trimmed(model, *args, **kwargs)
        batch, self._loss_batch = self._loss_batch, None
        with nullcontext() if batch is None else self.watch_forward(model, batch):
            outputs = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if batch is not None:
            self._has_guided = True
            per_token_logps = outputs[0]
            if self.model.training and torch.is_grad_enabled() and not per_token_logps.requires_grad:
                raise patched("the student's log-probabilities carry no gradient")
            old_per_token_logps = batch.get("old_per_token_logps")
            if old_per_token_logps is None:  # on-policy without vLLM, TRL saves the forward pass
                old_per_token_logps = per_token_logps.detach()
            penalty = self.get_penalty(per_token_logps, batch)
            anchor = self.get_anchor(per_token_logps, old_per_token_logps, batch)
            self.see_tokens(per_token_logps, old_per_token_logps, anchor, batch)
            if penalty is not None:
                batch.setdefault("ref_per_token_logps", per_token_logps.detach())  # without one, a KL of 0
                self.beta = _Beta(self.beta)
                self.beta.penalty = penalty
            if anchor is not None:
                # The off-policy mask asks how far the policy has drifted, not how far the teacher is
                batch.setdefault("sampling_per_token_logps", old_per_token_logps)
                batch["old_per_token_logps"] = anchor
                self._correct_reference_kl(per_token_logps - old_per_token_logps, batch)
        return outputs

    def _correct_reference_kl(self, policy_log_ratio, batch):
        # `use_bias_correction_kl` weights the reference KL by the ratio of the loss, to turn an expectation under the
        # old policy into one under the current policy. With an anchor that ratio is not an importance weight anymore.
        if float(self.beta) != 0.0 and self.args.use_bias_correction_kl:
            if self.importance_sampling_level == "sequence":
                policy_log_ratio = sequence_log_ratio(policy_log_ratio, self.loss_mask(batch))
            if not isinstance(self.beta, _Beta):
                self.beta = _Beta(self.beta)
            self.beta.weight = policy_log_ratio.exp()
            self.args.use_bias_correction_kl = False

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

    @staticmethod
    def loss_mask(batch: dict) -> torch.Tensor:
        """Tokens that enter the loss, `(B, T)`: not padding, and not written by a tool."""
        mask = batch["completion_mask"]
        return mask * batch["tool_mask"] if "tool_mask" in batch else mask

    def log_means(self, metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]):
        """Log the mean over all processes of each metric, given as its values and their weights."""
        totals = torch.stack([torch.stack([(v * w).sum(), w.sum()]) for v, w in metrics.values()]).float()
        totals = self.accelerator.reduce(totals, reduction="sum").tolist()
        for name, (total, count) in zip(metrics, totals, strict=True):
            self.log_value(name, total / count if count else float("nan"))  # TRL leaves NaN out of means

    def log_value(self, name: str, value: float):
        """Log a metric that all processes agree on."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def fill_column(self, name: str, values: dict[int, float | None]):
        """Fill a column of the table that `log_completions` writes, by the number of the row; `None` where there is none."""
        self._logs["extra"][name] = [values.get(row) for row in range(len(self._logs["prompt"]))]
