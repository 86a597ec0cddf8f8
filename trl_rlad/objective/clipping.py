"""Which tokens GRPO's clipping drops from the gradient, and because of whom."""

from typing import NamedTuple

import torch


class Clipping(NamedTuple):
    """How the loss clips its ratio: it is kept in `[1 - epsilon_low, 1 + epsilon_high]`."""

    epsilon_low: float
    epsilon_high: float
    level: str  # what has a ratio, each "token" or each "sequence"
    mask: torch.Tensor  # (B, T), tokens that enter the loss


def sequence_log_ratio(log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Mean of the per-token log-ratios of each sequence, as in [GSPO](https://huggingface.co/papers/2507.18071).

    Args:
        log_ratio (`torch.Tensor` of shape `(B, T)`):
            Per-token log-ratios in nats.
        mask (`torch.Tensor` of shape `(B, T)`):
            Tokens that enter the loss.

    Returns:
        `torch.Tensor` of shape `(B, 1)`.
    """
    return ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)


def clip_causes(
    log_ratio: torch.Tensor,
    policy_log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
) -> dict[str, torch.Tensor]:
    """
    Which tokens (or sequences) the clipping drops from the gradient, by the sign of the advantage and by cause.

    Args:
        log_ratio (`torch.Tensor` of shape `(B, T)` or `(B, 1)`):
            Log of the TRRD ratio.
        policy_log_ratio (`torch.Tensor`, same shape):
            Log of the plain GRPO ratio.
        advantages (`torch.Tensor` of shape `(B, 1)` or `(B, T)`):
            Advantages.
        epsilon_low (`float`), epsilon_high (`float`):
            Clipping bounds: the ratio is kept in `[1 - epsilon_low, 1 + epsilon_high]`.

    Returns:
        `dict[str, torch.Tensor]`:
            Boolean masks of the shape of `log_ratio`: `"high_by_policy"` and `"low_by_policy"` where the GRPO ratio
            would be clipped as well, `"high_by_teacher"` and `"low_by_teacher"` where only the teacher makes it so.
            `"high"` is the upper bound, for positive advantages, `"low"` the lower bound, for negative ones.
    """
    ratio, policy_ratio = log_ratio.exp(), policy_log_ratio.exp()
    high, policy_high = (ratio > 1 + epsilon_high) & (advantages > 0), policy_ratio > 1 + epsilon_high
    low, policy_low = (ratio < 1 - epsilon_low) & (advantages < 0), policy_ratio < 1 - epsilon_low
    return {
        "high_by_policy": high & policy_high,
        "high_by_teacher": high & ~policy_high,
        "low_by_policy": low & policy_low,
        "low_by_teacher": low & ~policy_low,
    }
