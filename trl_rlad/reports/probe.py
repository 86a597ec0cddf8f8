"""What rollouts that a teacher has read tell of it, before any training: pure functions of records."""

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..evaluation import pass_at_k
from ..rollouts import log_ratios


STUDY = Path(__file__).with_name("study.json")
ALPHAS = (0.3, 0.5, 0.7)
QUANTILES = (5, 25, 50, 75, 95)
SURE, UNLIKELY = 0.9, 0.1  # probabilities: the student's of its token, and the teacher's where the two contradict
TIE = 1e-4  # nats: less is rounding
SAME = 0.01  # nats a token
FEW = 8  # groups: the bootstrap of fewer says nothing of those that weren't drawn


class Estimate(NamedTuple):
    """A share or mean, its 95% interval by the bootstrap over prompts, and the number of `groups` that it was counted
    in. The interval is NaN below `FEW` groups, and the value where there is nothing to count."""

    value: float
    low: float
    high: float
    groups: int


def report(
    rollouts: list[dict],
    success_reward: float = 0.0,
    clip: float | None = 1.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    eos_token_ids: Iterable[int] = (),
    resamples: int = 1000,
) -> dict:
    r"""
    Describe a student, a task and a teacher by rollouts.

    Args:
        rollouts (`list[dict]`):
            A record for each completion, see [`~trl_rlad.rollout_log.describe_rollouts`]: `group` (number of its
            prompt), `reward` (`None` where none can judge: neither a success nor a failure), `advantage`, `ids`,
            `logps` and `teacher_logps` (in nats at each token, `None` where the teacher has no say), and if known
            `top1` (whether the token is the teacher's likeliest) and `entropy` (the teacher's, in nats).
        success_reward (`float`, *optional*, defaults to `0.0`):
            A completion has succeeded if its reward is higher.
        clip (`float`, *optional*, defaults to `1.0`):
            `teacher_log_ratio_clip`, in nats.
        epsilon_low (`float`, *optional*, defaults to `0.2`), epsilon_high (`float`, *optional*, defaults to `0.28`):
            Clipping bounds of the ratio.
        eos_token_ids (`Iterable[int]`, *optional*):
            Ids that end a completion.
        resamples (`int`, *optional*, defaults to `1000`):
            Number of draws of the bootstrap, of whole prompts with all their completions.

    Returns:
        `dict`: an [`Estimate`] for each figure, and the plain numbers `prompts`, `completions`, `tokens`,
        `tokens_without_say` and `gap_quantiles`, in nats. With \\( x = \log(\pi_S / \pi_T) \\) at a sampled token:

        - `mean@1`, `pass@k`; `signal` and `all_failed`, shares of the groups whose rewards differ and that have no
          success;
        - `gap`, the mean of \\( x \\); `gap_first`, `gap_eos`, `gap_rewarded`, `gap_punished`, at the first token,
          where a completion ends, and by the sign of the advantage; `beyond_clip`, the share with \\( |x| \\) above
          `clip`;
        - `discrimination`, how often of two completions of a group the better one has the lower mean of \\( x \\), so
          that the teacher likes it more than the student does; `teacher_auc` and `student_auc`, how often it is
          likelier, per token, to each alone; chance is .5;
        - `prefers_rewarded`, `prefers_punished`: how often the teacher likes a token more than the student, by the
          sign of the advantage; a tie counts as half;
        - `contradicted_failed`, `contradicted_succeeded`: share of the completions that did with a token that the
          student gives more than .9 and the teacher less than .1;
        - `top1`, `entropy`, and `student_entropy` (estimated by the mean of \\( -\log\pi_S \\));
        - `clip_high@alpha`, `clip_low@alpha`: shares of the rewarded and of the punished tokens that RLAD's ratio
          would clip on the first update.
    """
    groups: dict[int, list[dict]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout["group"], []).append(rollout)
    sums = [
        _sum_group(group, success_reward, clip, epsilon_low, epsilon_high, set(eos_token_ids))
        for group in groups.values()
    ]
    figures = estimate(sums, resamples)
    gaps = [x for rollout in rollouts for x in log_ratios(rollout) if x is not None]
    tokens = sum(len(rollout["ids"]) for rollout in rollouts)
    return {
        **figures,
        "prompts": len(groups),
        "completions": len(rollouts),
        "tokens": tokens,
        "tokens_without_say": tokens - len(gaps),
        "gap_quantiles": {q: float(np.percentile(gaps, q)) for q in QUANTILES} if gaps else {},
    }


def estimate(sums: list[dict[str, tuple[float, float]]], resamples: int = 1000) -> dict[str, Estimate]:
    """An [`Estimate`] of each figure from its sum and count in each group: whole groups are drawn again."""
    totals = np.array([list(group.values()) for group in sums])  # (groups, figures, 2)
    draws = np.random.default_rng(0).integers(len(totals), size=(resamples, len(totals)))
    counts = (totals[..., 1] > 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.divide(*totals.sum(0).T)
        drawn = np.divide(*np.moveaxis(totals[draws].sum(1), -1, 0))
    drawn[:, counts < FEW] = np.nan
    low, high = ([np.nanquantile(c, q) if np.isfinite(c).any() else np.nan for c in drawn.T] for q in (0.025, 0.975))
    rows = zip(sums[0], values.tolist(), map(float, low), map(float, high), counts.tolist(), strict=True)
    return {name: Estimate(*row) for name, *row in rows}


def widen(share: Estimate) -> Estimate:
    """A share with its interval, of 0% and 100% by the rule of three: the bootstrap can't draw what it hasn't seen."""
    value, low, high, groups = share
    if groups >= FEW and value in (0.0, 1.0):
        low, high = max(value - 3 / groups, 0.0), min(value + 3 / groups, 1.0)
    return Estimate(value, low, high, groups)


def _sum_group(
    group, success_reward, clip, epsilon_low, epsilon_high, eos_token_ids
) -> dict[str, tuple[float, float]]:
    """Sum and count of each figure in one group: of any set of groups, a figure is the ratio of the two."""
    sums = {}

    def add(name, values):
        values = [value for value in values if value is not None]
        sums[name] = float(sum(values)), float(len(values))

    rewards, k = [rollout["reward"] for rollout in group], len(group)
    judged = [reward for reward in rewards if reward is not None]
    wins = sum(reward > success_reward for reward in judged)
    add("mean@1", [reward > success_reward for reward in judged])
    add("pass@k", [pass_at_k(k, wins, k)] if len(judged) == k else [])
    add("signal", [len(set(judged)) > 1])
    add("all_failed", [wins == 0] if judged else [])

    gaps = [log_ratios(rollout) for rollout in group]
    known = [[x for x in row if x is not None] for row in gaps]
    sides = [
        [x for row, rollout in zip(known, group, strict=True) if sign * rollout["advantage"] > 0 for x in row]
        for sign in (1, -1)
    ]
    add("gap", sum(known, []))
    add("gap_first", [row[0] for row in gaps if row])
    add(
        "gap_eos", [r[-1] for r, rollout in zip(gaps, group, strict=True) if r and rollout["ids"][-1] in eos_token_ids]
    )
    for name, side in zip(("rewarded", "punished"), sides, strict=True):
        add(f"gap_{name}", side)
        add(f"prefers_{name}", [_is_lower(x, 0.0) for x in side])
    bound = np.inf if clip is None else clip
    add("beyond_clip", [abs(x) > bound for x in sum(known, [])])

    means = {
        "discrimination": [-np.mean(row) if row else None for row in known],
        "teacher_auc": [_mean(rollout["teacher_logps"]) for rollout in group],
        "student_auc": [_mean(rollout["logps"]) for rollout in group],
    }
    for name, scores in means.items():
        pairs = [
            (i, j) if rewards[i] > rewards[j] else (j, i)
            for i, j in combinations([i for i in range(k) if rewards[i] is not None], 2)
            if rewards[i] != rewards[j]
        ]
        add(name, [_is_lower(scores[j], scores[i]) for i, j in pairs if None not in (scores[i], scores[j])])

    for name, has_succeeded in (("failed", False), ("succeeded", True)):
        rows = [row for row in group if row["reward"] in judged and (row["reward"] > success_reward) == has_succeeded]
        add(f"contradicted_{name}", [any(map(_contradicts, row["logps"], row["teacher_logps"])) for row in rows])
    for name in ("top1", "entropy"):
        add(name, [value for rollout in group for value in rollout.get(name, [])])
    add("student_entropy", [-logp for rollout in group for logp in rollout["logps"]])

    for alpha in ALPHAS:
        high, low = (np.exp((1 - alpha) * np.clip(side, -bound, bound)) for side in sides)
        add(f"clip_high@{alpha}", high > 1 + epsilon_high)
        add(f"clip_low@{alpha}", low < 1 - epsilon_low)
    return sums


def _is_lower(x, y):
    """1, 0, or for a tie 1/2."""
    return 0.5 if abs(x - y) < TIE else float(x < y)


def _mean(logps):
    values = [logp for logp in logps if logp is not None]
    return np.mean(values) if values else None


def _contradicts(logp, teacher_logp):
    return teacher_logp is not None and logp > np.log(SURE) and teacher_logp < np.log(UNLIKELY)
