"""What a teacher's scores make of the loss, by a pure function: it logs nothing and writes to no argument."""

from typing import NamedTuple

import torch

from .clipping import Clipping, clip_causes, sequence_log_ratio
from .schedule import Terms
from .teacher_kl import forward_kl, reverse_kl
from .trrd import TRRDLoss


class Scores(NamedTuple):
    """What the teacher makes of a micro-batch, in nats and `float32`. `N` tokens have the divergence ([`kl_mask`])."""

    logps: torch.Tensor  # (B, T), of the sampled tokens
    mask: torch.Tensor  # (B, T), bool: tokens that the teacher has scored
    kl_on: torch.Tensor | None = None  # (B,), bool: completions that have the divergence
    top_logps: torch.Tensor | None = None  # (N, k), of its likeliest tokens, if it names them
    named_log_ratios: torch.Tensor | None = None  # (N, k), the student's log p(named) - log p(sampled)
    weight: torch.Tensor | None = None  # (B, 1), factor in [0, 1] of all that the teacher adds


class Guidance(NamedTuple):
    """What changes in GRPO's loss of a micro-batch. Left at `None`, nothing does."""

    # (B, T), what the policy is compared with in the place of the old policy; with gradient where the clamp is active
    anchor: torch.Tensor | None = None
    advantages: torch.Tensor | None = None  # (B,) or (B, T), in the place of the reward's
    penalty: torch.Tensor | None = None  # (B, T), added to the loss of each token, as the KL from a reference model is
    tokens: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # values to look at, and the weights of their means
    causes: dict[str, torch.Tensor] = {}  # what the clipping drops, see `clip_causes`
    part: torch.Tensor | None = None  # (B, T), by how much the teacher changes each token's loss; not negative


def kl_mask(terms: Terms, mask: torch.Tensor, kl_on: torch.Tensor) -> torch.Tensor:
    """Tokens whose divergence is in the loss, bool of shape `(B, T)`: `mask` and `kl_on` are those of [`Scores`]."""
    return mask if terms.distilling else mask & kl_on.unsqueeze(1)


def guide(
    terms: Terms,
    per_token_logps: torch.Tensor,
    old_per_token_logps: torch.Tensor,
    scores: Scores | None,
    advantages: torch.Tensor,
    clipping: Clipping | None = None,
) -> Guidance:
    r"""
    What the terms of the objective change in GRPO's loss of a micro-batch.

    Args:
        terms ([`Terms`]):
            Terms of the objective at this step.
        per_token_logps (`torch.Tensor` of shape `(B, T)`, floating point):
            Log-probabilities, in nats, of the sampled tokens under the student being trained.
        old_per_token_logps (`torch.Tensor` of shape `(B, T)`, floating point):
            The same under the student that sampled them.
        scores ([`Scores`] or `None`):
            The teacher's. `None` without a teacher.
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`):
            Advantages by the reward.
        clipping ([`Clipping`], *optional*):
            How the loss clips. `None` if it doesn't.

    Returns:
        [`Guidance`]: differentiable with respect to `per_token_logps`.
    """
    # Under FSDP2 with bf16 the student's log-probabilities come out in bf16: the teacher is compared in float32
    logps, old_logps = per_token_logps.float(), old_per_token_logps.float()
    tokens: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    penalty = anchor = None
    if scores is not None and scores.kl_on is not None and terms.kl_coef != 0.0:
        mask = kl_mask(terms, scores.mask, scores.kl_on)
        kl = _divergence(terms, logps, scores, mask)
        tokens["teacher/kl"] = kl.detach(), mask
        penalty = terms.kl_coef * (1.0 if scores.weight is None else scores.weight) * kl
    part = None if penalty is None else penalty.detach().abs()
    if terms.distilling:  # whatever the reward says
        return Guidance(None, torch.zeros_like(advantages), penalty, tokens, part=part)

    by_token = two_dimensional(advantages)
    if scores is not None and (terms.ratio or terms.credit):
        trrd = TRRDLoss(terms.alpha, terms.teacher_log_ratio_clip)
        # Credit is for what was sampled, however the student moves on
        compared = old_logps if terms.credit else logps
        anchor, diagnostics = trrd(compared, old_logps, scores.logps, scores.mask, scores.weight)
        tokens |= {f"teacher/{name}": (values, scores.mask) for name, values in diagnostics.items()}
        for name, is_side in (("rewarded", by_token > 0), ("punished", by_token < 0)):
            tokens[f"teacher/log_ratio_{name}"] = diagnostics["log_ratio"], scores.mask & is_side
    if terms.credit and anchor is not None:
        # A rewarded token counts for more where the teacher likes it better, a punished one for less
        credited = by_token * ((anchor - old_logps) * by_token.sign()).exp()
        part = _add_change(part, logps - old_logps, logps - old_logps, credited, by_token, clipping)
        causes = _causes(logps, old_logps, None, by_token, clipping)
        return Guidance(None, credited, penalty, tokens, causes, part)
    causes = _causes(logps, old_logps, anchor, by_token, clipping)
    if clipping is not None and anchor is not None:
        weights = clipping.mask if clipping.level == "token" else torch.ones_like(causes["low_by_policy"])
        tokens |= {f"clip_ratio/{name}": (is_clipped, weights) for name, is_clipped in causes.items()}
    if anchor is not None:
        part = _add_change(part, logps - anchor, logps - old_logps, by_token, by_token, clipping)
    return Guidance(anchor, None, penalty, tokens, causes, part)


def _divergence(terms, logps, scores, mask):
    """The divergence from the teacher `(B, T)` in nats, zero outside of `mask`."""
    if scores.top_logps is None or scores.named_log_ratios is None:
        kl = reverse_kl(logps[mask], scores.logps[mask], terms.teacher_log_ratio_clip)
    else:
        kl = forward_kl(scores.named_log_ratios + logps[mask].unsqueeze(-1), scores.top_logps)
    return torch.zeros_like(logps).masked_scatter(mask, kl)


def _causes(logps, old_logps, anchor, advantages, clipping):
    if clipping is None:
        return {}
    log_ratios = [(logps - other).detach() for other in (old_logps if anchor is None else anchor, old_logps)]
    if clipping.level == "sequence":
        log_ratios = [sequence_log_ratio(log_ratio, clipping.mask) for log_ratio in log_ratios]
    return clip_causes(*log_ratios, advantages, clipping.epsilon_low, clipping.epsilon_high)


def _add_change(part, log_ratio, policy_log_ratio, advantages, policy_advantages, clipping):
    """`part`, and by how much GRPO's objective of each token is another one than the policy's alone, `(B, T)`."""
    change = _objective(log_ratio, advantages, clipping) - _objective(policy_log_ratio, policy_advantages, clipping)
    return change.detach().abs().expand_as(log_ratio) + (0.0 if part is None else part)


def _objective(log_ratio, advantages, clipping):
    if clipping is None:
        return log_ratio.exp() * advantages
    if clipping.level == "sequence":
        log_ratio = sequence_log_ratio(log_ratio, clipping.mask)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clipping.epsilon_low, 1 + clipping.epsilon_high)
    return torch.min(ratio * advantages, clipped * advantages)


def two_dimensional(advantages: torch.Tensor) -> torch.Tensor:
    """Advantages that can be multiplied with `(B, T)`."""
    return advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
