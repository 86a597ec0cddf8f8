"""
The loss of the trainer on given log-probabilities: TRL's code on our anchor, against the paper's equations in float64.

TRL's forward pass is replaced by a leaf tensor, so that values and gradients can be compared token by token.
"""

import math

import pytest
import torch
from test_trrd import reference_log_ratio

from trl_rlad._trl.loss_call import LossCall


B, T = 6, 7
LOW, HIGH, BETA = 0.2, 0.28, 0.04


def make_batch(seed=0, **extra):
    """A ragged batch whose ratios leave the clip range on either side and whose third row has no advantage."""
    generator = torch.Generator().manual_seed(seed)
    old, teacher, ref = (-3 * torch.rand((B, T), generator=generator) - 0.05 for _ in range(3))
    lengths = torch.tensor([7, 1, 5, 3, 6, 2]).unsqueeze(1)
    mask = (torch.arange(T) < lengths).long()
    advantages = torch.tensor([1.2, -0.7, 0.0, 0.4, -1.5, 2.0])
    return {
        "prompt_ids": torch.ones(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": torch.full((B, T), 5),
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "teacher_per_token_logps": teacher,
        "teacher_mask": mask.bool() & (advantages != 0).unsqueeze(1),
        **extra,
    }


def make_logps(batch, seed=1):
    noise = torch.rand((B, T), generator=torch.Generator().manual_seed(seed)) - 0.5
    return (batch["old_per_token_logps"] + noise).requires_grad_()


def reference_loss(logps, batch, alpha, clip, beta=0.0, level="token", loss_type="grpo", weights=None):
    """Eq. 3-5 token by token, in float64. Returns the loss and its gradient with respect to `logps`."""
    logps = logps.detach().double().requires_grad_()
    batch = {"tool_mask": torch.ones(B, T), **batch}
    keys = ("old_per_token_logps", "teacher_per_token_logps", "ref_per_token_logps")
    old, teacher, ref = (batch[key].double() for key in keys)
    losses, sequences = [], []
    for i in range(B):
        tokens = [t for t in range(T) if batch["completion_mask"][i, t] and batch["tool_mask"][i, t]]
        log_ratios = [
            reference_log_ratio(logps[i, t], old[i, t], teacher[i, t], alpha, clip)
            if batch["teacher_mask"][i, t]
            else logps[i, t] - old[i, t]
            for t in tokens
        ]
        policy_log_ratios = [logps[i, t] - old[i, t] for t in tokens]
        if level == "sequence":
            log_ratios = [sum(log_ratios) / len(tokens)] * len(tokens)
            policy_log_ratios = [sum(policy_log_ratios) / len(tokens)] * len(tokens)
        advantage = batch["advantages"][i].double()
        sequence = []
        for t, log_ratio, policy_log_ratio in zip(tokens, log_ratios, policy_log_ratios, strict=True):
            ratio = log_ratio.exp()
            token = -torch.min(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
            token = token * (1.0 if weights is None else weights[i].item())
            log_ref = ref[i, t] - logps[i, t]
            token = token + beta * policy_log_ratio.exp() * (log_ref.exp() - log_ref - 1)
            sequence.append(token)
        losses += sequence
        sequences.append(sum(sequence) / len(tokens))
    loss = sum(sequences) / B if loss_type == "grpo" else sum(losses) / len(losses)
    loss.backward()
    return loss.detach(), logps.grad


def assert_equals_reference(trainer, batch, logps, **kwargs):
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    expected_loss, expected_grad = reference_loss(logps, batch, **kwargs)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logps.grad.double(), expected_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(("level", "loss_type"), [("token", "grpo"), ("token", "dapo"), ("sequence", "grpo")])
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_loss_and_gradient_equal_the_paper(make_trainer, alpha, clip, level, loss_type, beta):
    # With beta > 0 this also shows that the reference KL is weighted by the ratio to the old policy, not by TRRD
    batch = make_batch()
    logps = make_logps(batch)
    trainer = make_trainer(
        logps,
        alpha=alpha,
        teacher_log_ratio_clip=clip,
        importance_sampling_level=level,
        loss_type=loss_type,
        beta=beta,
    )
    kwargs = {"alpha": alpha, "clip": clip, "beta": beta, "level": level, "loss_type": loss_type}
    assert_equals_reference(trainer, batch, logps, **kwargs)
    assert trainer.beta == beta and type(trainer.beta) is float and trainer.args.use_bias_correction_kl


def test_without_old_log_probs_the_policy_is_its_own_old_policy(make_trainer):
    batch = make_batch()
    logps = make_logps(batch)
    trainer = make_trainer(logps)
    del batch["old_per_token_logps"]
    loss = trainer.compute_loss(trainer.model, batch)
    expected, _ = reference_loss(logps, {**batch, "old_per_token_logps": logps.detach()}, alpha=0.5, clip=1.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_students_log_probs_may_come_in_bfloat16(make_trainer):
    # as under FSDP2 with mixed precision
    batch = make_batch()
    logps = make_logps(batch).detach().bfloat16().requires_grad_()
    batch["old_per_token_logps"] = batch["old_per_token_logps"].bfloat16()
    trainer = make_trainer(logps)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    expected, _ = reference_loss(logps, batch, alpha=0.5, clip=1.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_teacher_has_its_say_on_the_very_token_it_scored(make_trainer, alpha):
    batch = make_batch()
    batch["teacher_per_token_logps"] = batch["old_per_token_logps"].clone()  # nothing is clipped
    other = {**batch, "teacher_per_token_logps": batch["teacher_per_token_logps"].clone()}
    other["teacher_per_token_logps"][4, 2] -= 0.1
    gradients = []
    for each in (batch, other):
        logps = batch["old_per_token_logps"].clone().requires_grad_()
        trainer = make_trainer(logps, alpha=alpha)
        trainer.compute_loss(trainer.model, each).backward()
        gradients.append(logps.grad.double())
    # Row 4 has A = -1.5, 6 tokens and a ratio of 1, which becomes exp((1 - alpha) * 0.1) at its token 2 alone
    expected = torch.zeros(B, T, dtype=torch.float64)
    expected[4, 2] = 1.5 / 6 / B * (math.exp((1 - alpha) * 0.1) - 1)
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-4, atol=1e-7)


def test_the_gradient_depends_on_the_teacher(make_trainer):
    batch = make_batch()
    gradients = []
    for teacher in (batch["teacher_per_token_logps"], batch["teacher_per_token_logps"] - 0.3):
        logps = make_logps(batch)
        trainer = make_trainer(logps)
        trainer.compute_loss(trainer.model, {**batch, "teacher_per_token_logps": teacher}).backward()
        gradients.append(logps.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("credit", [False, True])
def test_rows_without_advantage_contribute_nothing(make_trainer, loss_type, level, credit):
    batch = make_batch()
    batch["teacher_per_token_logps"][2] = float("nan")
    logps = make_logps(batch)
    trainer = make_trainer(logps, loss_type=loss_type, importance_sampling_level=level, teacher_credit=credit)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()
    assert not logps.grad[2].any() and logps.grad[[0, 1, 3, 4, 5]].any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_not_scoring_rows_without_advantage_changes_nothing(make_trainer, level):
    batch = make_batch()
    results = []
    for mask in (batch["teacher_mask"], batch["completion_mask"].bool()):
        logps = make_logps(batch)
        trainer = make_trainer(logps, importance_sampling_level=level)
        loss = trainer.compute_loss(trainer.model, {**batch, "teacher_mask": mask})
        loss.backward()
        results.append((loss, logps.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_an_all_masked_batch_still_backpropagates(make_trainer, loss_type):
    batch = make_batch()
    batch |= {key: torch.zeros_like(batch[key]) for key in ("completion_mask", "teacher_mask")}
    logps = make_logps(batch)
    trainer = make_trainer(logps, loss_type=loss_type)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0.0 and not logps.grad.any()


def test_tokens_of_tools_are_left_out(make_trainer):
    batch = make_batch()
    tool_mask = torch.ones(B, T, dtype=torch.long)
    tool_mask[:, 2:4] = 0
    logps = make_logps(batch)
    trainer = make_trainer(logps)
    trainer.compute_loss(trainer.model, {**batch, "tool_mask": tool_mask}).backward()
    assert not logps.grad[:, 2:4].any() and logps.grad.any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_with_tokens_of_tools_loss_and_gradient_equal_the_paper(make_trainer, level):
    # The reference KL is weighted by the ratio to the old policy, which at sequence level is a mean over the own
    # tokens
    tool_mask = torch.ones(B, T, dtype=torch.long)
    tool_mask[:, 2:4] = 0
    batch = make_batch(tool_mask=tool_mask)
    batch["teacher_mask"] &= tool_mask.bool()
    logps = make_logps(batch)
    trainer = make_trainer(logps, importance_sampling_level=level, beta=BETA)
    assert_equals_reference(trainer, batch, logps, alpha=0.5, clip=1.0, beta=BETA, level=level)


def test_off_policy_mask_asks_about_the_policy_not_the_teacher(make_trainer):
    # Rows 1 and 4 have A < 0. The policy hasn't moved, but the teacher finds the tokens 5 nats likelier, so that
    # log anchor - log pi is about 0.5: a mask on the anchor would drop them
    batch = make_batch()
    logps = batch["old_per_token_logps"].clone().requires_grad_()
    batch["teacher_per_token_logps"] = batch["old_per_token_logps"] + 5
    trainer = make_trainer(logps, off_policy_mask_threshold=0.3, epsilon=0.9)
    trainer.compute_loss(trainer.model, batch).backward()
    assert logps.grad[1].any() and logps.grad[4].any()


def test_off_policy_mask_drops_what_the_policy_has_left_and_the_anchor_has_not(make_trainer):
    # The policy has moved by 1 nat and the teacher has too: log anchor - log pi is 0.05
    batch = make_batch()
    logps = (batch["old_per_token_logps"] - 1.0).requires_grad_()
    batch["teacher_per_token_logps"] = batch["old_per_token_logps"] - 1.9
    trainer = make_trainer(logps, off_policy_mask_threshold=0.3)
    trainer.compute_loss(trainer.model, batch).backward()
    assert logps.grad.any(1).tolist() == [True, False, False, True, False, True]  # those with A > 0


def test_off_policy_mask_asks_the_sampler_where_it_is_another(make_trainer):
    # vLLM's log-probabilities of row 1 are 1 nat above the policy's, and those of row 4 the same
    batch = make_batch()
    logps = batch["old_per_token_logps"].clone().requires_grad_()
    batch["sampling_per_token_logps"] = batch["old_per_token_logps"].clone()
    batch["sampling_per_token_logps"][1] += 1.0
    batch["teacher_per_token_logps"] = batch["old_per_token_logps"]
    trainer = make_trainer(logps, off_policy_mask_threshold=0.3)
    trainer.compute_loss(trainer.model, batch).backward()
    assert logps.grad.any(1).tolist() == [True, False, False, True, True, True]


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_divergence_from_the_teacher_comes_beside_that_from_the_reference(make_trainer, alpha):
    # With both the loss is the sum: neither takes the other's place or coefficient
    batch = make_batch(teacher_kl_on=torch.ones(B, dtype=torch.bool))
    results, names = {}, {}
    for settings in ((0.0, 0.0), (BETA, 0.0), (0.0, 0.3), (BETA, 0.3)):
        logps = make_logps(batch)
        trainer = make_trainer(logps, alpha=alpha, beta=settings[0], teacher_kl_coef=settings[1])
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        results[settings] = torch.cat([loss.detach()[None], logps.grad.flatten()])
        names[settings] = {name for name, values in trainer._metrics["train"].items() if values}
    neither, reference, teacher, both = results.values()
    torch.testing.assert_close(both - neither, (reference - neither) + (teacher - neither), rtol=0, atol=1e-6)
    assert (reference - neither)[0] > 1e-3 and (teacher - neither)[0] > 1e-3
    # TRL's `kl` is of the reference alone
    assert [("kl" in each, "teacher/kl" in each) for each in names.values()] == [
        (False, False), (True, False), (False, True), (True, True)
    ]  # fmt: skip


def test_vllm_importance_correction_multiplies_the_trrd_term(make_trainer):
    # vLLM itself isn't installed here: the ratio that TRL would have put into the batch is given by hand
    batch = make_batch(importance_sampling_ratio=torch.tensor([[1.0], [0.5], [2.0], [0.0], [0.25], [1.5]]))
    logps = make_logps(batch)
    trainer = make_trainer(logps)
    trainer.use_vllm = True
    assert_equals_reference(
        trainer, batch, logps, alpha=0.5, clip=1.0, weights=batch["importance_sampling_ratio"][:, 0]
    )


def test_two_sided_clipping_bounds_the_trrd_ratio(make_trainer):
    batch = make_batch()
    batch["teacher_per_token_logps"] = batch["old_per_token_logps"] - 4  # ratios of exp(0.5 * 4) = 7.4 and more
    batch["advantages"] = -batch["advantages"].abs()
    logps = make_logps(batch)
    trainer = make_trainer(logps, delta=1.5, teacher_log_ratio_clip=None)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    # every ratio of a row with an advantage is cut at 1.5, so the loss is 1.5 |A| and the gradient is gone
    assert loss.item() == pytest.approx(1.5 * batch["advantages"].abs().sum().item() / B)
    assert not logps.grad.any()


@pytest.mark.parametrize("credit", [False, True])
def test_the_buffered_batch_is_not_written_to(make_trainer, credit):
    batch = make_batch()
    before = {key: value.clone() for key, value in batch.items()}
    trainer = make_trainer(make_logps(batch), beta=BETA, off_policy_mask_threshold=1.0, teacher_credit=credit)
    losses = [trainer.compute_loss(trainer.model, batch).item() for _ in range(2)]
    assert losses[0] == losses[1]
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], before[key]) for key in batch)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("has_tools", [False, True])
def test_metrics(make_trainer, level, has_tools):
    batch = make_batch()
    if has_tools:  # what a tool wrote is neither the policy's nor the teacher's
        batch["tool_mask"] = torch.ones(B, T, dtype=torch.long)
        batch["tool_mask"][:, 2:4] = 0
        batch["teacher_mask"] &= batch["tool_mask"].bool()
    logps = make_logps(batch)
    trainer = make_trainer(logps, importance_sampling_level=level)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    mask = batch["teacher_mask"]
    log_ratio = (logps.detach() - batch["teacher_per_token_logps"])[mask]
    assert metrics["teacher/log_ratio"] == pytest.approx(log_ratio.mean().item())
    assert metrics["teacher/clamped"] == pytest.approx((log_ratio.abs() > 1).float().mean().item())
    for side in ("high", "low"):
        by_policy, by_teacher = metrics[f"clip_ratio/{side}_by_policy"], metrics[f"clip_ratio/{side}_by_teacher"]
        assert by_policy + by_teacher == pytest.approx(metrics[f"clip_ratio/{side}_mean"])
    assert metrics["clip_ratio/high_by_teacher"] > 0


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_who_clips_is_logged_where_trl_says_how_much_is_clipped(make_trainer, loss_type):
    batch = make_batch()
    trainer = make_trainer(make_logps(batch), loss_type=loss_type)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    names = trainer._metrics["train"].keys()
    assert ("clip_ratio/high_by_teacher" in names) == ("clip_ratio/high_mean" in names)


def test_what_the_loss_writes_into_a_batch_is_seen_by_nobody_else(make_trainer):
    batch = make_batch()
    call = LossCall(make_trainer(), batch)
    call.batch["named_log_ratios"] = torch.zeros(1)
    assert "named_log_ratios" not in batch and "named_log_ratios" not in call.watched


def test_metrics_of_a_batch_without_teacher_are_left_out(make_trainer):
    batch = make_batch()
    batch["teacher_mask"] = torch.zeros_like(batch["teacher_mask"])
    trainer = make_trainer(make_logps(batch))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    logs = {}
    trainer.log(logs)
    assert logs["teacher/log_ratio"] is None and logs["clip_ratio/high_by_teacher"] == 0.0


def reference_credit(logps, batch, level):
    """GRPO in float64, the advantage of each token multiplied by exp(+-0.5 clamp(log pi_T - log pi_old, -1, 1))."""
    logps = logps.detach().double().requires_grad_()
    loss = 0.0
    for i in range(B):
        tokens = range(int(batch["completion_mask"][i].sum()))
        ratios = [(logps[i, t] - batch["old_per_token_logps"][i, t].double()).exp() for t in tokens]
        if level == "sequence":
            ratios = [torch.stack(ratios).log().mean().exp()] * len(tokens)
        for t, ratio in zip(tokens, ratios, strict=True):
            advantage = batch["advantages"][i].double()
            if batch["teacher_mask"][i, t]:
                teacher, old = (batch[f"{who}_per_token_logps"][i, t].item() for who in ("teacher", "old"))
                likes = math.exp(0.5 * min(max(teacher - old, -1.0), 1.0))
                advantage = advantage * likes if advantage > 0 else advantage / likes
            token = torch.min(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
            loss = loss - token / len(tokens) / B
    loss.backward()
    return loss.detach(), logps.grad


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_credit_goes_where_the_teacher_agrees_with_the_reward(make_trainer, level):
    batch = make_batch()
    logps = make_logps(batch)
    trainer = make_trainer(logps, teacher_credit=True, importance_sampling_level=level)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    expected_loss, expected_grad = reference_credit(logps, batch, level)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logps.grad.double(), expected_grad, rtol=1e-6, atol=1e-6)


def test_credit_without_disagreement_is_grpo(make_trainer):
    batch = make_batch()
    batch["teacher_per_token_logps"] = batch["old_per_token_logps"]
    gradients = []
    for settings in ({"teacher_credit": True}, {"alpha": 1.0}):
        logps = make_logps(batch)
        trainer = make_trainer(logps, **settings)
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append(logps.grad)
    assert torch.equal(*gradients)
