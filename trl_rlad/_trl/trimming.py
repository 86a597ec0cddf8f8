"""The student's passes without the padding of the generation batch, with or without a teacher: `trim_padding`."""

from functools import cached_property
from math import gcd

import torch
from accelerate.logging import get_logger
from torch.nn.functional import pad
from trl import GRPOTrainer

from ..packing import micro_batches
from ..trials import longest_input, made_up_tokens, rotates_by_length, tolerance
from .names import split_pixel_values_by_grid, unsplit_pixel_values_by_grid
from .padding import merge, select, trim


logger = get_logger(__name__)


class TrimmingGRPOTrainer(GRPOTrainer):
    """[`~trl.GRPOTrainer`] that, with `args.trim_padding`, runs the student on micro-batches of similar lengths, each
    without the padding of the others. Without it, nothing changes."""

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before and self._trims:
            steps = self.args.steps_per_generation
            batch = merge([split_pixel_values_by_grid(micro_batch) for micro_batch in self._buffered_inputs])
            size = len(batch["advantages"]) // steps
            window = size * gcd(steps, self.args.gradient_accumulation_steps) if self._order_is_free else size
            self._buffered_inputs = self._cut(batch, size, window)
            inputs = self._buffered_inputs[self._step % steps]
        return inputs

    @cached_property
    @torch.no_grad()
    def _trims(self):
        """Whether the student runs without padding. It is tried when the first rollouts are there, as a sharded
        student can't run before training has begun."""
        if not self.args.trim_padding:
            return False
        model, device, was_training = self.model, self.accelerator.device, self.model.training
        student = self.accelerator.unwrap_model(model)
        bound, tokens = tolerance(student, self.accelerator), made_up_tokens(9, student.config)
        left = int(min(23, max(0, longest_input(student.config) - len(tokens) - 3)))

        def score(left, right):
            ids, mask = (pad(x, (left, right))[None].to(device) for x in (tokens, torch.ones_like(tokens)))
            return super(TrimmingGRPOTrainer, self)._get_per_token_logps_and_entropies(model, ids, mask, 4 + right)[0]

        model.eval()
        try:
            differs = not (score(left, 3)[:, :4] - score(0, 0)).abs().mean() <= bound
            differs = differs or rotates_by_length(model, student.config, float("inf"), bound, device)
        finally:
            model.train(was_training)
        if differs:
            logger.warning(
                "`trim_padding` is off: what this student makes of a row depends on the padding beside it, so that "
                "the old policy and the new one could only be compared at the same width. With padding, TRL does so."
            )
        return not differs

    @property
    def _order_is_free(self):
        # Within an optimizer step, unless the loss has something that depends on which rows share a micro-batch: a
        # mean over its tokens (BNPO, the entropy bonus), a quantile of its entropies, or its load of the experts
        return not (
            self.loss_type == "bnpo"
            or self._entropy_bonus_enabled
            or self.top_entropy_quantile < 1.0
            or self.aux_loss_enabled
            or self._has_own_loss
        )

    @property
    def _has_own_loss(self):
        """Whether a subclass, a mixin or a patch has a loss of which nothing is known here."""
        losses = [
            vars(owner)[name]
            for owner in (self, *type(self).__mro__)
            for name in ("compute_loss", "_compute_loss")
            if name in vars(owner)
        ]
        return any(loss.__module__.partition(".")[0] not in ("transformers", "trl", "trl_rlad") for loss in losses)

    def _cut(self, batch, size, window):
        """Micro-batches of `size` rows of similar lengths, each without the padding of the others."""
        lengths = (batch[f"{part}_mask"].sum(1).tolist() for part in ("prompt", "completion"))
        cuts = micro_batches(*lengths, size, window)
        return [trim(unsplit_pixel_values_by_grid(select(batch, cut)), self.pad_to_multiple_of or 1) for cut in cuts]

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        # TRL names a `batch_size` where it needs no gradient: for the log-probabilities of the old policy and the
        # reference
        if kwargs.get("batch_size") is not None and self._trims:
            return self._student_logps(model, *args, **kwargs)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _student_logps(self, model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs):
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
