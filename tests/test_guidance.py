"""`guide` and `Objective` without any trainer, on values worked out by hand."""

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from trl_rlad.objective.clipping import Clipping, clip_causes, sequence_log_ratio
from trl_rlad.objective.guidance import Guidance, Scores, guide, kl_mask
from trl_rlad.objective.schedule import Objective


OBJECTIVE = Objective(
    alpha=0.5,
    teacher_log_ratio_clip=1.0,
    teacher_credit=False,
    teacher_kl_coef=0.0,
    teacher_kl_coef_final=None,
    teacher_kl="reverse",
    teacher_top_k=2,
    teacher_kl_on="all",
    distillation_fraction=0.0,
)
# Two completions, the first rewarded; the teacher hasn't scored the last token of the second
LOGPS = torch.tensor([[-1.0, -2.0], [-0.5, -1.0]], requires_grad=True)
OLD = torch.tensor([[-1.0, -2.4], [-0.5, -1.0]])
TEACHER = torch.tensor([[-0.5, -6.0], [-1.3, 0.0]])
MASK = torch.tensor([[True, True], [True, False]])
ADVANTAGES = torch.tensor([2.0, -1.0])
SCORES = Scores(TEACHER, MASK, kl_on=torch.tensor([False, True]))


def run(objective, scores=SCORES, clipping=None, progress=0.0, advantages=ADVANTAGES):
    return guide(objective.at(progress), LOGPS, OLD, scores, advantages, clipping)


def test_the_ratio_is_to_a_mixture_of_the_old_policy_and_the_teacher():
    guidance = run(OBJECTIVE)
    # (-1 - .5) / 2; the teacher's -6 is brought to -2 - 1 = -3; (-.5 - 1.3) / 2; the old policy's without a score
    torch.testing.assert_close(guidance.anchor, torch.tensor([[-0.75, -2.7], [-0.9, -1.0]]))
    assert guidance.advantages is None and guidance.penalty is None
    log_ratio, weights = guidance.tokens["teacher/log_ratio"]
    torch.testing.assert_close(log_ratio, torch.tensor([[-0.5, 4.0], [0.8, 0.0]]))
    assert weights is MASK and guidance.tokens["teacher/clamped"][0].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert guidance.tokens["teacher/log_ratio_rewarded"][1].tolist() == [[True, True], [False, False]]
    assert guidance.tokens["teacher/log_ratio_punished"][1].tolist() == [[False, False], [True, False]]


def test_alpha_1_changes_nothing():
    assert run(replace(OBJECTIVE, alpha=1.0)) == Guidance()
    assert run(replace(OBJECTIVE, alpha=1.0), scores=None) == Guidance()


def test_the_part_of_the_teacher_is_by_how_much_it_changes_the_loss():
    clipping = Clipping(0.2, 0.28, "token", MASK.float())
    # The objective with the anchor of the first test, less that with the old policy, in each token: 2 exp(-0.25) -
    # 2 exp(0), ...
    ratios = (LOGPS - torch.tensor([[-0.75, -2.7], [-0.9, -1.0]])).exp(), (LOGPS - OLD).exp()
    free = [ratio * ADVANTAGES[:, None] for ratio in ratios]
    expected = (free[0] - free[1]).abs()
    torch.testing.assert_close(run(OBJECTIVE).part, expected)
    assert expected[0, 1] > 0.8 and expected[1, 1] == 0.0  # where the teacher has scored nothing
    # What is clipped is cut: 2 * 1.28 and not 2 * exp(0.7) where the anchor is far below
    clipped = [
        torch.min(x, ratio.clamp(0.8, 1.28) * ADVANTAGES[:, None]) for x, ratio in zip(free, ratios, strict=True)
    ]
    torch.testing.assert_close(run(OBJECTIVE, clipping=clipping).part, (clipped[0] - clipped[1]).abs())
    # A divergence adds itself
    both = run(replace(OBJECTIVE, teacher_kl_coef=0.5))
    torch.testing.assert_close(both.part, expected + both.penalty.abs())
    assert both.penalty[1, 0] > 0.0
    # With credit it is the advantage that changes; while distilling the divergence is all there is
    credited = run(replace(OBJECTIVE, teacher_credit=True))
    torch.testing.assert_close(credited.part, (ratios[1] * (credited.advantages - ADVANTAGES[:, None])).abs())
    distilling = run(replace(OBJECTIVE, distillation_fraction=0.5))
    torch.testing.assert_close(distilling.part, distilling.penalty)
    # And of a sequence all tokens have the same
    whole = run(OBJECTIVE, clipping=clipping._replace(level="sequence")).part
    assert whole.shape == LOGPS.shape and (whole == whole[:, :1]).all() and (whole > 0.0).all()


def test_half_of_the_teachers_weight_is_half_of_its_exponent():
    anchor = run(OBJECTIVE, SCORES._replace(weight=torch.tensor([[0.5], [0.0]]))).anchor
    torch.testing.assert_close(anchor, torch.tensor([[-0.875, -2.55], [-0.5, -1.0]]))


def test_a_rows_weight_is_of_the_teachers_exponent_and_not_of_the_old_policys():
    # At alpha = 0.5 the two are the same. Here the teacher's is 0.8 * 0.5 in the first row, and 0.8 in the second
    anchor = run(replace(OBJECTIVE, alpha=0.2), SCORES._replace(weight=torch.tensor([[0.5], [1.0]]))).anchor
    torch.testing.assert_close(anchor, torch.tensor([[-0.8, -2.64], [-1.14, -1.0]]))


def test_credit_weighs_the_advantages_and_leaves_the_ratio():
    guidance = run(replace(OBJECTIVE, teacher_credit=True))
    # By (anchor / old policy) where rewarded, its inverse where punished; the teacher is bounded around the old policy
    expected = [[2 * math.exp(0.25), 2 * math.exp(-0.5)], [-math.exp(0.4), -1.0]]
    torch.testing.assert_close(guidance.advantages, torch.tensor(expected))
    assert guidance.anchor is None and not guidance.advantages.requires_grad


def test_the_divergence_is_on_the_completions_that_have_it():
    kl = replace(OBJECTIVE, alpha=1.0, teacher_kl_coef=0.3, teacher_log_ratio_clip=None)
    guidance = run(kl, SCORES._replace(weight=torch.tensor([[1.0], [0.5]])))
    # k2 of -0.5 - -1.3 = 0.8: 0.32, times 0.3 and the weight of its row
    torch.testing.assert_close(guidance.penalty, torch.tensor([[0.0, 0.0], [0.3 * 0.5 * 0.32, 0.0]]))
    (gradient,) = torch.autograd.grad(guidance.penalty.sum(), LOGPS)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [0.3 * 0.5 * 0.8, 0.0]]))
    value, mask = guidance.tokens["teacher/kl"]  # without coefficient and weight
    assert value.tolist() == [[0.0, 0.0], [pytest.approx(0.32), 0.0]] and mask.sum() == 1


def test_named_tokens_are_compared_by_the_forward_divergence():
    kl = replace(OBJECTIVE, alpha=1.0, teacher_kl_coef=1.0, teacher_kl="forward")
    top = torch.tensor([[0.6, 0.1]]).log()
    # Of the one token with the divergence: the student gives the sampled one e^-0.5, and these as much as it and half
    scores = SCORES._replace(top_logps=top, named_log_ratios=torch.tensor([[-1.0, -2.0]]))
    student = [math.exp(-1.5), math.exp(-2.5)]
    rest = 1 - sum(student)
    expected = 0.6 * math.log(0.6 / student[0]) + 0.1 * math.log(0.1 / student[1]) + 0.3 * math.log(0.3 / rest)
    torch.testing.assert_close(run(kl, scores).penalty, torch.tensor([[0.0, 0.0], [expected, 0.0]]))


def test_distillation_takes_the_advantages_away_and_leaves_the_callers_alone():
    guidance = run(replace(OBJECTIVE, distillation_fraction=0.5))
    assert guidance.advantages.tolist() == [0.0, 0.0] and ADVANTAGES.tolist() == [2.0, -1.0]
    assert guidance.anchor is None and guidance.causes == {} and guidance.tokens.keys() == {"teacher/kl"}
    # of coefficient 1 on all completions, bounded: |4| - 1/2
    torch.testing.assert_close(guidance.penalty, torch.tensor([[0.125, 3.5], [0.32, 0.0]]))
    assert run(replace(OBJECTIVE, distillation_fraction=0.5), progress=0.5).anchor is not None


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_is_clipped_and_by_whom(level):
    guidance = run(OBJECTIVE, clipping=Clipping(0.2, 0.28, level, torch.ones(2, 2)))
    # Log-ratios to the anchor -.25, .7; .4, 0, and to the old policy 0, .4; 0, 0. Clipped above log 1.28 = .247
    expected = {"token": ([[0, 0], [0, 0]], [[0, 1], [0, 0]]), "sequence": ([[0], [0]], [[0], [0]])}[level]
    assert guidance.causes["high_by_teacher"].int().tolist() == expected[0]
    assert guidance.causes["high_by_policy"].int().tolist() == expected[1]
    assert guidance.tokens["clip_ratio/high_by_policy"][1].shape == (2, 2 if level == "token" else 1)


@pytest.mark.parametrize(
    ("settings", "progress", "expected"),
    [
        ({}, 0.3, {"ratio": True, "kl_coef": 0.0, "asks_teacher": True}),
        ({"alpha": 1.0}, 0.3, {"ratio": False, "asks_teacher": False}),
        ({"teacher_credit": True}, 0.3, {"ratio": False, "credit": True, "asks_teacher": True}),
        ({"alpha": 1.0, "teacher_kl_coef": 0.4}, 1.0, {"kl_coef": 0.4, "top_k": 0, "asks_teacher": True}),
        ({"teacher_kl_coef": 0.4, "teacher_kl_coef_final": 0.0}, 0.75, {"kl_coef": pytest.approx(0.1)}),
        # not yet in the loss, but perhaps before the batch has been used up
        ({"alpha": 1.0, "teacher_kl_coef_final": 0.2}, 0.0, {"kl_coef": 0.0, "has_kl": True, "asks_teacher": True}),
        (
            {"distillation_fraction": 0.4},
            0.39,
            {"distilling": True, "ratio": False, "kl_coef": 1.0, "scores_advantages": True},
        ),
        ({"distillation_fraction": 0.4}, 0.4, {"distilling": False, "ratio": True, "kl_coef": 0.0}),
        ({"alpha": 1.0, "distillation_fraction": 0.4}, 0.4, {"asks_teacher": False}),
        ({"alpha": 1.0, "distillation_fraction": 1.0}, 1.0, {"distilling": True, "asks_teacher": True}),
        ({"teacher_kl_coef": 0.4, "teacher_kl_coef_final": 0.2}, 0.5, {"kl_coef": pytest.approx(0.3)}),
        ({"teacher_kl_on": "failed"}, 0.0, {"kl_on": "failed"}),
        ({"teacher_kl": "forward"}, 0.0, {"top_k": 0}),
        ({"teacher_kl": "forward", "teacher_kl_coef": 0.1, "teacher_kl_coef_final": 0.0}, 1.0, {"top_k": 0}),
        ({"teacher_kl": "forward", "teacher_kl_coef": 0.1}, 0.0, {"top_k": 2}),
    ],
)
def test_terms(settings, progress, expected):
    terms = replace(OBJECTIVE, **settings).at(progress)
    assert {name: getattr(terms, name) for name in expected} == expected


def test_which_tokens_have_the_divergence():
    failed = torch.tensor([False, True])
    kl = replace(OBJECTIVE, teacher_kl_coef=0.1, distillation_fraction=0.5)
    assert kl_mask(kl.at(0.0), MASK, failed).tolist() == MASK.tolist()
    assert kl_mask(kl.at(0.5), MASK, failed).tolist() == [[False, False], [True, False]]


def test_the_objective_of_a_configuration():
    assert Objective.from_config(SimpleNamespace(**asdict(OBJECTIVE), learning_rate=1.0)) == OBJECTIVE


def test_the_bound_on_the_teacher_is_that_of_the_settings():
    bounded = replace(OBJECTIVE, teacher_log_ratio_clip=0.5, teacher_kl_coef=1.0)
    guidance = run(bounded)
    # The teacher's -6 is brought to -2.5 and its -1.3 to -1
    torch.testing.assert_close(guidance.anchor, torch.tensor([[-0.75, -2.45], [-0.75, -1.0]]))
    # 0.5 * (0.8 - 0.5 / 2)
    torch.testing.assert_close(guidance.penalty, torch.tensor([[0.0, 0.0], [0.275, 0.0]]))
    assert {"teacher/kl", "teacher/log_ratio", "teacher/clamped"} <= guidance.tokens.keys()


def test_without_a_reward_a_token_is_neither_rewarded_nor_punished():
    advantages = torch.tensor([0.0, 0.5])
    tokens = run(OBJECTIVE, advantages=advantages).tokens
    assert tokens["teacher/log_ratio_rewarded"][1].tolist() == [[False, False], [True, False]]
    assert not tokens["teacher/log_ratio_punished"][1].any()
    credit = run(replace(OBJECTIVE, teacher_credit=True), advantages=advantages)
    torch.testing.assert_close(credit.advantages, torch.tensor([[0.0, 0.0], [0.5 * math.exp(-0.4), 0.5]]))


@pytest.mark.parametrize("credit", [False, True])
def test_advantages_of_tokens_are_taken_as_those_of_completions(credit):
    objective, clipping = replace(OBJECTIVE, teacher_credit=credit), Clipping(0.2, 0.28, "token", MASK.float())
    expected = run(objective, clipping=clipping)
    guidance = run(objective, clipping=clipping, advantages=ADVANTAGES.unsqueeze(1).expand(2, 2))
    torch.testing.assert_close(guidance._asdict(), expected._asdict())


def test_credit_with_a_divergence_is_clipped_by_the_policy_alone():
    objective = replace(OBJECTIVE, teacher_credit=True, teacher_kl_coef=1.0)
    guidance = run(objective, clipping=Clipping(0.2, 0.28, "token", torch.ones(2, 2)))
    torch.testing.assert_close(guidance.penalty, torch.tensor([[0.0, 0.0], [0.32, 0.0]]))
    assert {"teacher/kl", "teacher/log_ratio"} <= guidance.tokens.keys()
    assert {name: mask.sum() for name, mask in guidance.causes.items() if mask.any()} == {"high_by_policy": 1}
    assert guidance.causes["high_by_policy"][0, 1]


def test_what_the_teacher_alone_clips():
    clipping = Clipping(0.2, 0.28, "token", MASK.float())
    guidance = run(OBJECTIVE, clipping=clipping, advantages=-ADVANTAGES)
    # Log-ratios to the anchor -.25, .7; .4, 0. Clipped below log .8 = -.223 where punished, above log 1.28 = .247 else
    assert guidance.causes["low_by_teacher"].tolist() == [[True, False], [False, False]]
    assert guidance.causes["high_by_teacher"].tolist() == [[False, False], [True, False]]
    assert not guidance.causes["low_by_policy"].any() and not guidance.causes["high_by_policy"].any()
    assert guidance.tokens["clip_ratio/high_by_teacher"][1] is clipping.mask and "teacher/clamped" in guidance.tokens


def test_credit_has_the_teacher_clip_nothing():
    objective, clipping = replace(OBJECTIVE, teacher_credit=True), Clipping(0.2, 0.28, "token", MASK.float())
    causes = run(objective, clipping=clipping, advantages=-ADVANTAGES).causes
    assert causes and not any(mask.any() for mask in causes.values()), "as the ratio is the policy's own"


def test_what_is_at_the_bound_is_not_clipped():
    zero, advantages = torch.zeros(2, 1), torch.tensor([[1.0], [-1.0]])
    assert not any(mask.any() for mask in clip_causes(zero, zero, advantages, 0.0, 0.0).values())
    causes = clip_causes(advantages, zero, advantages, 0.0, 0.0)
    assert causes["high_by_teacher"].tolist() == [[True], [False]]
    assert causes["low_by_teacher"].tolist() == [[False], [True]]


def test_the_log_ratio_of_a_sequence_is_the_mean_over_its_tokens():
    log_ratio = torch.tensor([[1.0, 2.0, 6.0], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert sequence_log_ratio(log_ratio, mask).tolist() == [[3.0], [0.5], [0.0]]


def test_each_tokens_own_names_are_compared_or_if_there_are_none_the_sampled_one():
    kl = replace(OBJECTIVE, alpha=1.0, teacher_kl_coef=1.0, teacher_kl="forward")
    top = torch.tensor([[0.6, 0.1], [0.5, 0.2], [0.3, 0.3]]).log()
    ratios = torch.tensor([[-1.0, -2.0], [-0.5, -1.0], [-1.0, -0.8]])
    scores = SCORES._replace(kl_on=torch.tensor([True, True]))
    penalty = run(kl, scores._replace(top_logps=top, named_log_ratios=ratios)).penalty
    expected = torch.zeros(2, 2)
    for ratio, named, (row, token) in zip(ratios.tolist(), top.exp(), [(0, 0), (0, 1), (1, 0)], strict=True):
        teacher = named.tolist()
        student = [math.exp(x + LOGPS[row, token].item()) for x in ratio]
        pairs = zip([*teacher, 1 - sum(teacher)], [*student, 1 - sum(student)], strict=True)
        expected[row, token] = sum(p * math.log(p / q) for p, q in pairs)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(run(kl, scores._replace(top_logps=top)).penalty, run(kl, scores).penalty)
