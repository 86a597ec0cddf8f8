"""One call of TRL's loss: what is substituted in it, and whether TRL has read it."""

from typing import Any

import torch

from ..objective.clipping import sequence_log_ratio
from ..objective.guidance import Guidance
from .names import loss_mask


def loss_is_patched(problem: str) -> RuntimeError:
    """The error of a step that would leave the teacher out of the loss, though it is to be in it."""
    return RuntimeError(
        f"This would not be training with a teacher: {problem}. Likely causes are a library that patches TRL (such as "
        "Unsloth), a mixin with a loss of its own, or a TRL newer than those tried. Train without it, or set "
        "`alpha=1.0` without a `teacher_kl_coef` or `distillation_fraction`."
    )


class _Watched(dict):
    """The batch that TRL's loss receives. It knows which of the substituted values TRL has not read, by `[]` or `get`.
    That a value was read doesn't tell what was made of it."""

    def __init__(self, batch: dict):
        super().__init__(batch)
        self.unread: set[str] = set()

    def substitute(self, key: str, value: Any):
        self.unread.add(key)
        self[key] = value

    def __getitem__(self, key):
        self.unread.discard(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.unread.discard(key)
        return super().get(key, default)


# TRL adds `self.beta * per_token_kl` to the loss of each token, before it averages over tokens in the way of the loss
# type (there are five ways). This is the one place where a term of ours is averaged as TRL averages, without a copy of
# its code. So for the length of one call `self.beta` is a number that
# - is `!= 0.0`, whatever the user's `beta` is, since TRL leaves the product out otherwise;
# - multiplies the KL from the reference model by the user's `beta` and a weight (`LossCall._correct_reference_kl`);
# - adds the penalty to this product.
# TRL then reads `ref_per_token_logps` and logs a metric `kl`, also where there is no reference model: `LossCall` gives
# it a reference that is the student itself, at a KL of 0, and takes the metric back.
class _Beta(float):
    weight: torch.Tensor | float = 1.0
    penalty: torch.Tensor | float = 0.0
    is_used = False

    def __ne__(self, other):
        return True

    def __mul__(self, per_token_kl):
        self.is_used = True
        return float(self) * self.weight * per_token_kl + self.penalty


class LossCall:
    """
    What [`Guidance`] substitutes in one call of TRL's loss on a micro-batch, `inputs`.

    There are two copies of it, as TRL hands out the same buffered dict again with `num_iterations` above 1: `batch` is
    ours, to read and to write into, and `watched` is TRL's alone, so that what is read there, TRL has read. The
    trainer's `beta` and `args.use_bias_correction_kl` may be replaced until `restore` is called.
    """

    def __init__(self, trainer: Any, inputs: dict):
        self.trainer = trainer
        self.batch, self.watched = dict(inputs), _Watched(inputs)
        self.has_asked = False  # whether the loss has asked for the student's log-probabilities
        self.users_beta, self.use_bias_correction_kl = trainer.beta, trainer.args.use_bias_correction_kl

    def substitute(self, guidance: Guidance, per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor):
        """Put what the guidance changes where TRL will read it."""
        if guidance.advantages is not None:
            self.watched.substitute("advantages", guidance.advantages)
        if guidance.penalty is not None:
            # Unwatched: without a reference model it is there for `_Beta` alone
            self.watched.setdefault("ref_per_token_logps", per_token_logps.detach())
            self._replace_beta().penalty = guidance.penalty
        if guidance.anchor is not None:
            # The off-policy mask asks how far the policy has drifted, not how far the teacher is. TRL reads it only if
            # that mask is on, so it is unwatched.
            self.watched.setdefault("sampling_per_token_logps", old_per_token_logps)
            self.watched.substitute("old_per_token_logps", guidance.anchor)
            self._correct_reference_kl(per_token_logps - old_per_token_logps)

    def _replace_beta(self) -> _Beta:
        if not isinstance(self.trainer.beta, _Beta):
            self.trainer.beta = _Beta(self.trainer.beta)
        return self.trainer.beta

    def _correct_reference_kl(self, policy_log_ratio):
        # `use_bias_correction_kl` weights the reference KL by the ratio of the loss, to turn an expectation under the
        # old policy into one under the current policy. With an anchor that ratio is not an importance weight anymore.
        trainer = self.trainer
        if self.users_beta != 0.0 and self.use_bias_correction_kl:
            if trainer.importance_sampling_level == "sequence":
                policy_log_ratio = sequence_log_ratio(policy_log_ratio, loss_mask(self.batch))
            self._replace_beta().weight = policy_log_ratio.exp()
            trainer.args.use_bias_correction_kl = False

    def check(self):
        """
        Take back what TRL has logged of a reference model that isn't there.

        Raises:
            `RuntimeError`: unless TRL's loss has read all that was substituted.
        """
        trainer, beta = self.trainer, self.trainer.beta
        if self.watched.unread or isinstance(beta, _Beta) and not beta.is_used:
            raise loss_is_patched("the loss did not read what the teacher had put into it")
        if isinstance(beta, _Beta) and self.users_beta == 0.0:
            metrics = trainer._metrics["train" if trainer.model.training else "eval"]
            metrics["kl"].pop()
            if not metrics["kl"]:  # none that a reward function has logged by this name
                del metrics["kl"]

    def restore(self):
        """Put the trainer's `beta` and its setting back."""
        self.trainer.beta, self.trainer.args.use_bias_correction_kl = self.users_beta, self.use_bias_correction_kl
