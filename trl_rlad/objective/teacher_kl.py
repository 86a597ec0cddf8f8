"""The divergence from the teacher, added to GRPO's loss: graded on the sampled token, or named by the teacher."""

import torch
from torch.nn.functional import huber_loss


def reverse_kl(
    per_token_logps: torch.Tensor, teacher_per_token_logps: torch.Tensor, clip: float | None = 1.0
) -> torch.Tensor:
    r"""
    Estimate the reverse divergence at each token that the student has sampled, for back-propagation.

    It is k2 of [KDRL](https://huggingface.co/papers/2506.02208), \\( d^2 / 2 \\) with \\( d = \log\pi_\theta -
    \log\pi_T \\): its gradient \\( d \, \nabla\log\pi_\theta \\) is in expectation that of \\( \text{KL}(\pi_\theta
    \,\|\, \pi_T) \\). Beyond `clip` it goes on in a straight line, as Huber's loss does, so that the weight of no
    token exceeds `clip`.

    Args:
        per_token_logps (`torch.Tensor` of shape `(B, T)`, floating point):
            Log-probabilities, in nats, of the sampled tokens under the student being trained.
        teacher_per_token_logps (`torch.Tensor` of shape `(B, T)`, same dtype):
            The same under the teacher.
        clip (`float` or `None`, *optional*, defaults to `1.0`):
            Bound on the weight, in nats. `None` applies none, as in KDRL.

    Returns:
        `torch.Tensor` of shape `(B, T)`, in nats, zero where the two agree and positive elsewhere.
    """
    delta = float("inf") if clip is None else clip
    return huber_loss(per_token_logps, teacher_per_token_logps, reduction="none", delta=delta)


def forward_kl(log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    r"""
    The forward divergence \\( \text{KL}(\pi_T \,\|\, \pi_\theta) \\) with all but the teacher's likeliest tokens in
    one bucket.

    By the data-processing inequality it is a lower bound of the divergence over the vocabulary, and equal to it if all
    tokens are given. Unlike anything that grades the sampled token, its gradient reaches a token that the student
    would never sample: on the logits it is \\( \pi_\theta - \pi_T \\).

    Args:
        log_probs (`torch.Tensor` of shape `(..., k)`, floating point):
            Log-probabilities, in nats, of the teacher's likeliest tokens under the student being trained.
        teacher_log_probs (`torch.Tensor` of shape `(..., k)`, same dtype):
            The same under the teacher. A token at `-inf` counts as not given.

    Returns:
        `torch.Tensor` of shape `(...)`, in nats.
    """
    given = teacher_log_probs.isfinite()
    teacher, log_probs = teacher_log_probs.exp(), log_probs.masked_fill(~given, 0.0)
    tiny = torch.finfo(log_probs.dtype).eps
    rest = (1.0 - (log_probs.exp() * given).sum(-1)).clamp(min=tiny)
    teacher_rest = (1.0 - teacher.sum(-1)).clamp(min=0.0)
    named = torch.xlogy(teacher, teacher) - teacher * log_probs
    return named.sum(-1) + torch.xlogy(teacher_rest, teacher_rest) - teacher_rest * rest.log()


def named_entropy(teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """
    The teacher's entropy with all but its likeliest tokens in one bucket: a lower bound, and exact if all tokens are
    given.

    Args:
        teacher_log_probs (`torch.Tensor` of shape `(..., k)`, floating point):
            Log-probabilities, in nats, of the likeliest tokens. A token at `-inf` counts as not given.

    Returns:
        `torch.Tensor` of shape `(...)`, in nats.
    """
    teacher = teacher_log_probs.exp()
    rest = (1.0 - teacher.sum(-1)).clamp(min=0.0)
    return -torch.xlogy(teacher, teacher).sum(-1) - torch.xlogy(rest, rest)
