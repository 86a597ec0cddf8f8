"""The objective on plain tensors, against Eq. 3-5 and Appendix B written out again in float64."""

import math

import pytest
import torch

from trl_rlad import TRRDLoss
from trl_rlad.objective.clipping import clip_causes, sequence_log_ratio


def reference_log_ratio(current, old, teacher, alpha, clip):
    """Eq. 5 for one token, with the clamp of Appendix B, in float64."""
    student_teacher = current - teacher
    if clip is not None:
        student_teacher = torch.clamp(student_teacher, -clip, clip)
    return alpha * (current - old) + (1 - alpha) * student_teacher


def random_logps(shape=(5, 7), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    current, old, teacher = (-3 * torch.rand(shape, generator=generator, dtype=dtype) - 0.01 for _ in range(3))
    lengths = torch.randint(0, shape[1] + 1, (shape[0], 1), generator=generator)
    return current, old, teacher, (torch.arange(shape[1]) < lengths).long()


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("clip", [None, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients_equal_the_paper(alpha, clip, seed):
    current, old, teacher, mask = random_logps(seed=seed)
    current.requires_grad_()
    anchor, _ = TRRDLoss(alpha, clip)(current, old, teacher, mask)
    weights = torch.rand(current.shape, generator=torch.Generator().manual_seed(2))
    (weights * (current - anchor).exp()).sum().backward()

    twin = current.detach().double().requires_grad_()
    expected = reference_log_ratio(twin, old.double(), teacher.double(), alpha, clip)
    expected = torch.where(mask.bool(), expected, twin - old.double())
    (weights.double() * expected.exp()).sum().backward()

    # An anchor of about 3 nats has a float32 spacing of 2.4e-7
    torch.testing.assert_close((current - anchor).double(), expected, rtol=1e-6, atol=5e-7)
    torch.testing.assert_close(current.grad.double(), twin.grad, rtol=1e-6, atol=1e-6)


def test_gradcheck():
    current, old, teacher, mask = random_logps(dtype=torch.float64)
    loss = TRRDLoss(0.4, 0.7)
    torch.autograd.gradcheck(lambda x: loss(x, old, teacher, mask)[0], current.requires_grad_())


def test_hand_worked_token():
    current, old, teacher = torch.tensor([[-1.0]]), torch.tensor([[-1.2]]), torch.tensor([[-1.6]])
    anchor, diagnostics = TRRDLoss(0.5)(current, old, teacher, torch.ones(1, 1))
    # log r = 0.5 * (-1 + 1.2) + 0.5 * (-1 + 1.6) = 0.1 + 0.3 = 0.4, so the anchor is -1.4
    torch.testing.assert_close(anchor, torch.tensor([[-1.4]]))
    torch.testing.assert_close(diagnostics["log_ratio"], torch.tensor([[0.6]]))
    assert diagnostics["clamped"].item() == 0


@pytest.mark.parametrize(
    ("teacher", "log_ratio", "gradient", "clamped"),
    [
        (-3.5, 0.5, 0.5, 1),  # log pi_S/pi_T = 1.5 is clamped to 1: log r = 0.5 * 0 + 0.5 * 1, and 1 - alpha is lost
        (-3.0, 0.5, 1.0, 0),  # on the edge, log pi_S/pi_T = 1 exactly: still the full gradient
        (-2.5, 0.25, 1.0, 0),  # 0.5 * 0.5
        (-1.5, -0.25, 1.0, 0),
        (-1.0, -0.5, 1.0, 0),  # the lower edge
        (-0.5, -0.5, 0.5, 1),
    ],
)
def test_clamp_edges(teacher, log_ratio, gradient, clamped):
    current = torch.tensor([[-2.0]], requires_grad=True)
    anchor, diagnostics = TRRDLoss(0.5, 1.0)(
        current, torch.tensor([[-2.0]]), torch.tensor([[teacher]]), torch.ones(1, 1)
    )
    ratio = current - anchor
    ratio.backward()
    assert ratio.item() == log_ratio
    assert current.grad.item() == gradient
    assert diagnostics["clamped"].item() == clamped


def test_where_the_teacher_alone_clips():
    # On the first update log r = 0.5 * log(pi_S/pi_T); it is clipped beyond ln(1.28) / 0.5 = 0.4937 for A > 0 and
    # below ln(0.8) / 0.5 = -0.4463 for A < 0
    student_teacher = torch.tensor([[0.493, 0.495, -0.446, -0.447]])
    current = torch.full((1, 4), -2.0)
    anchor, _ = TRRDLoss(0.5)(current, current, current - student_teacher, torch.ones(1, 4))
    for advantage, name, expected in ((1.0, "high", [0, 1, 0, 0]), (-1.0, "low", [0, 0, 0, 1])):
        causes = clip_causes(current - anchor, torch.zeros(1, 4), torch.tensor([[advantage]]), 0.2, 0.28)
        assert causes.pop(f"{name}_by_teacher").int().tolist() == [expected]
        assert not any(mask.any() for mask in causes.values())


def test_clip_causes_tells_policy_from_teacher():
    # ratios above 1.28, which the policy ratio exceeds too, exceeds alone (then nothing is clipped), or doesn't
    log_ratio = torch.tensor([[1.3, 1.0, 1.3, 0.7, 1.0, 0.7]]).log()
    policy_log_ratio = torch.tensor([[1.3, 1.3, 1.0, 0.7, 0.7, 1.0]]).log()
    causes = clip_causes(log_ratio, policy_log_ratio, torch.tensor([[1.0]]), 0.2, 0.28)
    assert {name: mask.int().tolist()[0] for name, mask in causes.items()} == {
        "high_by_policy": [1, 0, 0, 0, 0, 0],
        "high_by_teacher": [0, 0, 1, 0, 0, 0],
        "low_by_policy": [0] * 6,
        "low_by_teacher": [0] * 6,
    }
    causes = clip_causes(log_ratio, policy_log_ratio, torch.tensor([[-1.0]]), 0.2, 0.28)
    assert causes["low_by_policy"].int().tolist() == [[0, 0, 0, 1, 0, 0]]
    assert causes["low_by_teacher"].int().tolist() == [[0, 0, 0, 0, 0, 1]]
    # The two bounds are not alike: 0.75 is below 1 - 0.2, and above 1 - 0.28
    between = torch.tensor([[0.75]]).log()
    causes = clip_causes(between, between, torch.tensor([[-1.0]]), 0.2, 0.28)
    assert [name for name, mask in causes.items() if mask.any()] == ["low_by_policy"]
    nothing = clip_causes(log_ratio, policy_log_ratio, torch.tensor([[0.0]]), 0.2, 0.28)
    assert not any(mask.any() for mask in nothing.values())


@pytest.mark.parametrize("clip", [None, 1.0])
def test_alpha_one_is_the_old_policy_itself(clip):
    current, old, _, mask = random_logps()
    anchor, diagnostics = TRRDLoss(1.0, clip)(current, old, torch.full_like(old, float("nan")), mask)
    assert anchor is old
    assert not diagnostics["log_ratio"].any() and not diagnostics["clamped"].any()


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.77, 1.0])
def test_a_teacher_equal_to_the_old_policy_is_grpo_bit_for_bit(alpha):
    _, old, _, mask = random_logps()
    current = old + 0.3 * torch.rand(old.shape)
    assert torch.equal(TRRDLoss(alpha)(current, old, old.clone(), mask)[0], old)


def test_alpha_zero_is_the_teacher_itself():
    current, old, teacher, mask = random_logps()
    anchor, _ = TRRDLoss(0.0, None)(current, old, teacher, mask)
    assert torch.equal(anchor, torch.where(mask.bool(), teacher, old))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_outside_the_mask_the_teacher_is_not_read(garbage):
    current, old, teacher, mask = random_logps()
    current.requires_grad_()
    anchor, diagnostics = TRRDLoss(0.5)(current, old, teacher.masked_fill(mask == 0, garbage), mask)
    (current - anchor).exp().sum().backward()
    assert torch.equal(anchor[mask == 0], old[mask == 0])
    assert current.grad.isfinite().all()
    assert all(value.isfinite().all() and not value[mask == 0].any() for value in diagnostics.values())


def test_attributes_may_move():
    current, old, teacher, mask = random_logps()
    moved = TRRDLoss(0.5, 1.0)
    moved.alpha, moved.teacher_log_ratio_clip = 0.25, None
    assert torch.equal(moved(current, old, teacher, mask)[0], TRRDLoss(0.25, None)(current, old, teacher, mask)[0])
    assert repr(moved) == "TRRDLoss(alpha=0.25, teacher_log_ratio_clip=None)"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c, o, t, m: (c, o, t[:, :-1], m),
        lambda c, o, t, m: (c, o, t.double(), m),
        lambda c, o, t, m: (c, o, t, m[:, :1]),
    ],
)
def test_mismatched_tensors_are_refused(spoil):
    with pytest.raises(ValueError, match="one shape"):
        TRRDLoss()(*spoil(*random_logps()))


def test_sequence_log_ratio():
    log_ratio = torch.tensor([[0.2, 0.4, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert sequence_log_ratio(log_ratio, mask).tolist() == [[pytest.approx((0.2 + 0.4) / 2)], [0.0]]
    assert math.isfinite(sequence_log_ratio(log_ratio, mask).sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((1.01,), r"`alpha` must be in \[0, 1\] .*, but is 1.01"),
        ((-0.01,), "`alpha` .* but is -0.01"),
        ((0.5, 0.0), "`teacher_log_ratio_clip` must be positive or `None`, but is 0.0"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TRRDLoss(*settings)


def test_diagnostics_are_of_the_dtype_of_the_scores():
    current, old, teacher, mask = random_logps(dtype=torch.float64)
    assert {value.dtype for value in TRRDLoss()(current, old, teacher, mask)[1].values()} == {torch.float64}
