"""What the probe makes of given rollouts, worked out by hand, and of real ones."""

from math import isnan, log

import pytest

from trl_rlad.probe import report


EOS = 1


def rollout(group, reward, advantage, logps, teacher_logps, ids=None, **columns):
    ids = ids or [5] * (len(logps) - 1) + [EOS]
    return {
        "group": group,
        "reward": reward,
        "advantage": advantage,
        "logps": logps,
        "teacher_logps": teacher_logps,
        "ids": ids,
    } | columns


ROLLOUTS = [
    # gaps 0.3 and -2, mean -0.85
    rollout(0, 1.0, 1.0, [-1.0, -3.0], [-1.3, -1.0], top1=[1.0, 0.0], entropy=[0.2, 0.4]),
    # gaps 2.5, at a token that the student gives 0.95 and the teacher 0.078, and, cut before its end, none known
    rollout(
        0, 0.0, -1.0, [log(0.95), -2.0], [log(0.95) - 2.5, None], ids=[5, 6], top1=[0.0, None], entropy=[0.9, None]
    ),
    # of a group without success or signal: gap 0
    rollout(1, 0.0, 0.0, [-1.0], [-1.0], top1=[1.0], entropy=[0.1]),
    rollout(1, 0.0, 0.0, [-1.0], [-1.0], top1=[1.0], entropy=[0.1]),
]


def test_figures_by_hand():
    figures = report(ROLLOUTS, eos_token_ids=[EOS])
    expected = {
        "mean@1": 1 / 4,
        "pass@k": 1 / 2,
        "signal": 1 / 2,
        "all_failed": 1 / 2,
        "gap": (0.3 - 2.0 + 2.5 + 0.0 + 0.0) / 5,
        "gap_first": (0.3 + 2.5 + 0.0 + 0.0) / 4,
        "gap_eos": (-2.0 + 0.0 + 0.0) / 3,
        "gap_rewarded": (0.3 - 2.0) / 2,
        "gap_punished": 2.5,
        "prefers_rewarded": 1 / 2,
        "prefers_punished": 0.0,
        "beyond_clip": 2 / 5,
        "discrimination": 1.0,  # -0.85 < 2.5
        "teacher_auc": 1.0,  # means -1.15 and -2.55
        "student_auc": 0.0,  # means -2 and -1.03: the student is surer of what fails
        "contradicted_failed": 1 / 3,
        "contradicted_succeeded": 0.0,
        "top1": 3 / 5,
        "entropy": (0.2 + 0.4 + 0.9 + 0.1 + 0.1) / 5,
        "student_entropy": (1.0 + 3.0 - log(0.95) + 2.0 + 1.0 + 1.0) / 6,
        # e^(0.7 * 0.3) = 1.23 < 1.28, and at alpha = 0 it would be 1.35
        "clip_high@0.3": 0.0,
        # the punished gap is positive, and the lower bound is for negative ones
        "clip_low@0.5": 0.0,
    }
    assert {name: figures[name].value for name in expected} == pytest.approx(expected)
    assert (figures["prompts"], figures["completions"], figures["tokens"], figures["tokens_without_say"]) == (
        2,
        4,
        6,
        1,
    )
    assert figures["gap_quantiles"][50] == 0.0
    # Of two prompts, a quarter of the draws has the first twice and a quarter the second
    assert figures["mean@1"][1:] == (0.0, 0.5)


def test_clip_shares_by_hand():
    rewarded = rollout(0, 1.0, 1.0, [-1.0] * 3, [-1.3, -1.6, -9.0])  # gaps 0.3, 0.6 and, bounded, 1
    punished = rollout(0, 0.0, -1.0, [-2.0] * 2, [-1.6, -1.4])  # gaps -0.4 and -0.6
    figures = report([rewarded, punished])
    # exp(0.7 * (0.3, 0.6, 1)) = 1.23, 1.52, 2.01; exp(0.5 * ...) = 1.16, 1.35, 1.65; exp(0.3 * ...) = 1.09, 1.20, 1.35
    assert [figures[f"clip_high@{alpha}"].value for alpha in (0.3, 0.5, 0.7)] == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    # exp(-0.7 * (0.4, 0.6)) = 0.76, 0.66; exp(-0.5 * ...) = 0.82, 0.74; exp(-0.3 * ...) = 0.89, 0.84
    assert [figures[f"clip_low@{alpha}"].value for alpha in (0.3, 0.5, 0.7)] == pytest.approx([1.0, 1 / 2, 0.0])


def test_a_teacher_that_is_the_student_is_no_better_than_chance():
    rollouts = [rollout(0, float(i), i - 1.0, [-i - 0.1], [-i - 0.1 + 1e-6 * i]) for i in range(3)]
    figures = report(rollouts)
    for name in ("discrimination", "prefers_rewarded", "prefers_punished"):
        assert figures[name] == (0.5, 0.5, 0.5)
    assert figures["gap"].value == pytest.approx(0.0, abs=1e-5)
    assert figures["teacher_auc"].value == 0.0  # it is surer of what is worse, as the student is


def test_nothing_to_compare_is_not_a_number():
    figures = report([rollout(0, 1.0, 0.0, [-1.0], [None])])
    assert all(isnan(value) for name in ("gap", "discrimination", "contradicted_failed") for value in figures[name])
