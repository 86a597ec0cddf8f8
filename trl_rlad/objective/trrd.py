"""The Trust Region Ratio Distillation objective (TRRD) of [RLAD](https://huggingface.co/papers/2602.22495)."""

import torch
from torch import nn


class TRRDLoss(nn.Module):
    r"""
    The anchor to which TRRD compares the policy, in the place of GRPO's old policy.

    RLAD ([paper](https://huggingface.co/papers/2602.22495), Eq. 3 and 5) replaces GRPO's likelihood ratio by

    $$ \log r = \alpha \, (\log\pi_\theta - \log\pi_\text{old}) + (1 - \alpha) \, (\log\pi_\theta - \log\pi_T) $$

    which is \\( \log\pi_\theta - \log\text{anchor} \\) with the geometric mixture \\( \log\text{anchor} = \alpha
    \log\pi_\text{old} + (1 - \alpha) \log\pi_T \\). So the module returns the anchor, and whatever GRPO does with the
    old log-probabilities (clipping, aggregation, metrics) then holds for TRRD as it stands.

    Appendix B clamps the student-teacher log-ratio to \\( [-c, c] \\). That is the same as bringing the teacher's
    log-probability to within \\( c \\) of the student's, and outside this band the token keeps the gradient of its
    GRPO factor alone, weighted by \\( \alpha \\).

    Erratum: a sentence in section 4.1 of the paper exchanges the two ends of \\( \alpha \\). Eq. 3, Eq. 5 and Appendix
    C agree with each other and with this module: 1 is GRPO, 0 compares with the teacher alone.

    Args:
        alpha (`float`, *optional*, defaults to `0.5`):
            Weight of the old policy in the anchor, in `[0, 1]`. At `1.0` the anchor is `old_per_token_logps` itself.
        teacher_log_ratio_clip (`float`, *optional*, defaults to `1.0`):
            Bound \\( c \\) on \\( |\log\pi_\theta - \log\pi_T| \\) in nats. `None` applies no bound.

    Raises:
        `ValueError`: if one of the two is out of its range.

    Example:

    ```python
    >>> import torch
    >>> from trl_rlad import TRRDLoss

    >>> old, teacher = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-0.5, -6.0]])
    >>> anchor, diagnostics = TRRDLoss(alpha=0.5)(old, old, teacher, torch.ones(1, 2))
    >>> anchor  # the second token is brought to -2 - 1 = -3 before it is mixed
    tensor([[-0.7500, -2.5000]])
    ```
    """

    def __init__(self, alpha: float = 0.5, teacher_log_ratio_clip: float | None = 1.0):
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"`alpha` must be in [0, 1] (1: GRPO, 0: the teacher alone), but is {alpha}.")
        if teacher_log_ratio_clip is not None and not teacher_log_ratio_clip > 0.0:
            raise ValueError(f"`teacher_log_ratio_clip` must be positive or `None`, but is {teacher_log_ratio_clip}.")
        self.alpha = alpha
        self.teacher_log_ratio_clip = teacher_log_ratio_clip

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, teacher_log_ratio_clip={self.teacher_log_ratio_clip}"

    def forward(
        self,
        per_token_logps: torch.Tensor,
        old_per_token_logps: torch.Tensor,
        teacher_per_token_logps: torch.Tensor,
        mask: torch.Tensor,
        teacher_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        r"""
        Args:
            per_token_logps (`torch.Tensor` of shape `(B, T)`, floating point):
                Log-probabilities, in nats, of the sampled tokens under the student being trained.
            old_per_token_logps (`torch.Tensor` of shape `(B, T)`, same dtype):
                The same under the student that sampled them.
            teacher_per_token_logps (`torch.Tensor` of shape `(B, T)`, same dtype):
                The same under the teacher. Read only where `mask` is set.
            mask (`torch.Tensor` of shape `(B, T)`, bool or 0/1):
                Tokens that the teacher has scored. Elsewhere the anchor is `old_per_token_logps`.
            teacher_weight (`torch.Tensor` of shape `(B, 1)`, *optional*):
                Factor in `[0, 1]` of the teacher's exponent `1 - alpha` in each row. `None` takes 1.

        Returns:
            `tuple[torch.Tensor, dict[str, torch.Tensor]]`:
                The anchor, of shape `(B, T)`, differentiable with respect to `per_token_logps` where the clamp is
                active; and per-token diagnostics of shape `(B, T)`, zero outside `mask`: `log_ratio`, the unclamped
                \\( \log\pi_\theta - \log\pi_T \\) in nats, and `clamped`, 1 where the clamp is active.

        Raises:
            `ValueError`: if the shapes or dtypes differ.
        """
        tensors = (per_token_logps, old_per_token_logps, teacher_per_token_logps)
        shapes = [tuple(t.shape) for t in (*tensors, mask)]
        dtypes = [t.dtype for t in tensors]
        if len(set(shapes)) > 1 or len(set(dtypes)) > 1:
            raise ValueError(
                "`per_token_logps`, `old_per_token_logps`, `teacher_per_token_logps` and `mask` must share one shape, "
                f"and the first three one dtype, but they have shapes {shapes} and dtypes {dtypes}."
            )

        mask = mask.bool()
        if self.alpha == 1.0:  # the teacher isn't read, whatever it holds
            zero = torch.zeros_like(old_per_token_logps)
            return old_per_token_logps, {"log_ratio": zero, "clamped": zero}

        log_ratio = (per_token_logps.detach() - teacher_per_token_logps).masked_fill(~mask, 0.0)
        clip = float("inf") if self.teacher_log_ratio_clip is None else self.teacher_log_ratio_clip
        teacher = teacher_per_token_logps.clamp(per_token_logps - clip, per_token_logps + clip)
        # `lerp` returns its ends exactly: the teacher at alpha = 0, and the old policy wherever the teacher equals it
        alpha = self.alpha if teacher_weight is None else 1.0 - (1.0 - self.alpha) * teacher_weight
        anchor = torch.where(mask, torch.lerp(teacher, old_per_token_logps, alpha), old_per_token_logps)
        return anchor, {"log_ratio": log_ratio, "clamped": (log_ratio.abs() > clip).to(log_ratio.dtype)}
