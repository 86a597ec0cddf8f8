"""The divergence from the teacher: on exact distributions, in the trainer's loss, and on the rows it is for."""

import math

import pytest
import tiny
import torch
from peft import LoraConfig
from test_loss import BETA, B, make_batch, make_logps
from test_teacher_scorer import make_batch as make_scoring_batch
from test_teacher_scorer import naive_log_probs
from transformers import AutoModelForCausalLM

from trl_rlad import RLADTrainer
from trl_rlad.objective.teacher_kl import forward_kl, named_entropy, reverse_kl


@pytest.mark.parametrize(
    ("clip", "student", "teacher", "value", "gradient"),
    [
        (None, -1.0, -1.5, 0.125, 0.5),  # x = log student - log teacher = 0.5: x^2 / 2 and x
        (None, -4.0, -1.0, 4.5, -3.0),  # x = -3: pulled up
        (1.0, -1.0, -1.5, 0.125, 0.5),
        (1.0, -4.0, -1.0, 2.5, -1.0),  # |x| - 1/2 and the sign
        (2.0, -1.0, -6.0, 8.0, 2.0),  # 2 * (5 - 1) and the bound
        (1.0, -1.0, -1.0, 0.0, 0.0),
    ],
)
def test_hand_worked_sampled_tokens(clip, student, teacher, value, gradient):
    student = torch.tensor([[student]], dtype=torch.float64, requires_grad=True)
    kl = reverse_kl(student, torch.tensor([[teacher]], dtype=torch.float64), clip)
    kl.backward()
    assert kl.item() == pytest.approx(value) and student.grad.item() == pytest.approx(gradient)


def make_distributions(vocabulary=5):
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = (torch.randn(vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.requires_grad_(), teacher_logits.log_softmax(0)


def expected_k2(logits, teacher):
    """Expectation over tokens sampled from the student, which isn't differentiated through."""
    student = logits.log_softmax(0)
    return (student.detach().exp() * reverse_kl(student, teacher, None)).sum()


def test_the_gradient_of_k2_is_that_of_the_exact_reverse_divergence():
    logits, teacher = make_distributions()
    (gradient,) = torch.autograd.grad(expected_k2(logits, teacher), logits)
    student = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits)
    torch.testing.assert_close(gradient, exact)
    (other,) = torch.autograd.grad(expected_k2(logits, teacher.flip(0)), logits)
    assert (gradient - other).abs().max() > 0.01


def test_all_tokens_named_give_the_exact_forward_divergence():
    logits, teacher = make_distributions()
    order = torch.tensor([3, 0, 4, 1, 2])
    kl = forward_kl(logits.log_softmax(0)[order], teacher[order])
    exact = (teacher.exp() * (teacher - logits.log_softmax(0))).sum()
    torch.testing.assert_close(kl, exact)
    (gradient,) = torch.autograd.grad(kl, logits)
    torch.testing.assert_close(gradient, logits.softmax(0) - teacher.exp())


@pytest.mark.parametrize("k", [1, 4, 16])
def test_the_rest_goes_into_one_bucket(k):
    logits, teacher = make_distributions(20)
    top = teacher.topk(k)
    kl = forward_kl(logits.log_softmax(0)[top.indices], top.values)
    # The definition, with the bucket as a token of its own
    inside = torch.zeros(20, dtype=torch.bool).index_fill(0, top.indices, True)
    p, q = teacher.exp(), logits.softmax(0)
    p, q = (torch.cat([each[inside], each[~inside].sum()[None]]) for each in (p, q))
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(torch.autograd.grad(kl, logits), torch.autograd.grad(expected, logits))
    assert 0 < kl < (teacher.exp() * (teacher - logits.log_softmax(0))).sum()  # a lower bound of the whole


def test_hand_worked_named_tokens():
    student = torch.tensor([0.5, 0.25]).log().requires_grad_()
    kl = forward_kl(student, torch.tensor([0.75, 0.125]).log())
    # 3/4 log(3/2) + 1/8 log(1/2) + 1/8 log(1/2)
    assert kl.item() == pytest.approx(0.75 * 0.4054651 - 0.25 * 0.6931472)
    kl.backward()
    # -p + p_rest * q / q_rest: -3/4 + 1/8 * 2 and -1/8 + 1/8 * 1
    assert student.grad.tolist() == pytest.approx([-0.5, 0.0])


def test_a_token_that_is_not_to_be_named_counts_into_the_rest():
    logits, teacher = make_distributions()
    log_probs = logits.log_softmax(0)
    hidden = teacher[[0, 2, 1]].clone()
    hidden[2] = -float("inf")
    kl = forward_kl(log_probs[[0, 2, 1]], hidden)
    torch.testing.assert_close(kl, forward_kl(log_probs[[0, 2]], teacher[[0, 2]]))
    assert torch.autograd.grad(kl, logits)[0].isfinite().all()


@pytest.mark.parametrize("student", [[0.0, -60.0], [-60.0, 0.0], [-1e-9, -30.0]])
@pytest.mark.parametrize("teacher", [[0.0, -60.0], [-1e-9, -30.0], [-0.7, -0.7], [-float("inf"), -float("inf")]])
def test_sure_students_and_teachers_give_finite_numbers(student, teacher):
    student = torch.tensor(student, requires_grad=True)
    kl = forward_kl(student, torch.tensor(teacher))
    kl.backward()
    assert kl.isfinite() and kl > -1e-6 and student.grad.isfinite().all()


def reference_kdrl(logps, batch, coef, clip, loss_type, beta, low=0.2, high=0.28):
    """GRPO's loss plus a divergence from the teacher, token by token in float64, with its gradient."""
    logps = logps.detach().double().requires_grad_()
    sequences = []
    for i in range(B):
        tokens = []
        for t in range(int(batch["completion_mask"][i].sum())):
            log_ratio = logps[i, t] - batch["old_per_token_logps"][i, t].double()
            ratio, advantage = log_ratio.exp(), batch["advantages"][i].double()
            loss = -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            log_ref = batch["ref_per_token_logps"][i, t].double() - logps[i, t]
            loss = loss + beta * ratio * (log_ref.exp() - log_ref - 1)
            if batch["teacher_mask"][i, t] and batch["teacher_kl_on"][i]:
                x = logps[i, t] - batch["teacher_per_token_logps"][i, t].double()
                is_far = clip is not None and abs(x) > clip
                loss = loss + coef * (clip * (abs(x) - clip / 2) if is_far else x * x / 2)
            tokens.append(loss)
        sequences.append(tokens)
    if loss_type == "grpo":
        loss = sum(sum(tokens) / len(tokens) for tokens in sequences) / B
    elif loss_type == "dr_grpo":
        loss = sum(sum(tokens) for tokens in sequences) / (B * 8)  # tiny's max_completion_length
    else:
        loss = sum(sum(tokens) for tokens in sequences) / sum(len(tokens) for tokens in sequences)
    loss.backward()
    return loss.detach(), logps.grad


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_alpha_one_with_a_teacher_kl_is_kdrl(make_trainer, clip, loss_type, beta):
    batch = make_batch()
    batch["teacher_mask"] = batch["completion_mask"].bool()  # also where there is no advantage
    batch["teacher_mask"][0, 3] = False
    batch["teacher_per_token_logps"][0, 3] = float("nan")
    batch["teacher_kl_on"] = torch.tensor([True, True, True, False, True, False])
    logps = make_logps(batch)
    trainer = make_trainer(
        logps, alpha=1.0, teacher_kl_coef=0.3, teacher_log_ratio_clip=clip, loss_type=loss_type, beta=beta
    )
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    expected, gradient = reference_kdrl(logps, batch, 0.3, clip, loss_type, beta)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logps.grad.double(), gradient, rtol=1e-6, atol=1e-6)
    metrics = trainer._metrics["eval" if not trainer.model.training else "train"]
    mask = batch["teacher_mask"] & batch["teacher_kl_on"].unsqueeze(1)
    x = (logps.detach() - batch["teacher_per_token_logps"])[mask].abs().double()
    divergence = x**2 / 2 if clip is None else torch.where(x > clip, clip * (x - clip / 2), x**2 / 2)
    assert ("kl" in metrics) == (beta > 0.0) and metrics["teacher/kl"] == [pytest.approx(divergence.mean().item())]
    assert trainer.beta == beta and type(trainer.beta) is float


def test_trrd_and_a_teacher_kl_add_up(make_trainer):
    batch = make_batch() | {"teacher_kl_on": torch.ones(B, dtype=torch.bool)}
    results = []
    for alpha, coef, beta in ((0.5, 0.3, BETA), (0.5, 0.0, BETA), (1.0, 0.3, BETA), (1.0, 0.0, BETA)):
        logps = make_logps(batch)
        trainer = make_trainer(logps, alpha=alpha, teacher_kl_coef=coef, beta=beta)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        results.append((loss.detach(), logps.grad))
    (both, both_grad), (trrd, trrd_grad), (kdrl, kdrl_grad), (grpo, grpo_grad) = results
    torch.testing.assert_close(both, trrd + kdrl - grpo)
    torch.testing.assert_close(both_grad, trrd_grad + kdrl_grad - grpo_grad)


REWARDS = torch.tensor([[0.0], [0.5], [0.0], [1.0], [0.0], [0.0], [-1.0], [float("nan")]])


@pytest.mark.parametrize(
    ("rows", "success_reward", "expected"),
    [
        ("all", 0.0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("failed", 0.0, [1, 0, 1, 0, 1, 1, 1, 0]),  # what wasn't judged hasn't failed
        ("failed", 0.5, [1, 1, 1, 0, 1, 1, 1, 0]),  # a reward of 0.5 is not higher than 0.5
    ],
)
def test_rows(make_trainer, rows, success_reward, expected):
    trainer = make_trainer(alpha=1.0, teacher_kl_coef=0.1, teacher_kl_on=rows, success_reward=success_reward)
    assert trainer.guide.select_for_kl(REWARDS).int().tolist() == expected


def test_rows_go_by_the_weighted_sum_of_the_rewards(make_trainer):
    trainer = make_trainer(alpha=1.0, teacher_kl_coef=0.1, teacher_kl_on="failed")
    trainer.reward_weights = torch.tensor([1.0, 0.0])
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert trainer.guide.select_for_kl(rewards).tolist() == [False, True, False, True]


def test_a_completion_that_one_of_two_functions_judges_succeeds_or_fails_by_that(make_trainer):
    trainer = make_trainer(alpha=1.0, teacher_kl_coef=0.1, teacher_kl_on="failed")
    trainer.reward_weights = torch.ones(2)
    rewards = torch.tensor([[1.0, math.nan], [math.nan, 1.0], [0.0, math.nan], [math.nan, math.nan]])
    assert trainer.total_reward(rewards).tolist() == pytest.approx([1.0, 1.0, 0.0, math.nan], nan_ok=True)
    assert trainer.guide.select_for_kl(rewards).tolist() == [False, False, True, False]


def make_run(student_path, teacher_path, output_dir, **kwargs):
    args = tiny.make_config(output_dir, **kwargs)
    return RLADTrainer(student_path, tiny.reward, args, tiny.make_dataset(), teacher_model=teacher_path)


def divergence(teacher_path, student_path):
    """KL(teacher || student) over the tokens they share, on rows of any tokens."""
    batch = make_scoring_batch(rows=40)
    mask = batch["completion_mask"].bool()
    teacher, student = (naive_log_probs(path, batch, 1.0)[mask][:, :32] for path in (teacher_path, student_path))
    teacher = teacher.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean().item()


@pytest.mark.parametrize("estimator", ["reverse", "forward"])
def test_pure_distillation_brings_the_student_to_the_teacher(estimator, tmp_path, student_path, teacher_path):
    # No reward at all: all rows have A = 0, are scored all the same, and the divergence falls
    trainer = make_run(
        student_path,
        teacher_path,
        tmp_path,
        alpha=1.0,
        distillation_fraction=1.0,
        teacher_kl=estimator,
        teacher_log_ratio_clip=None,
        max_steps=30,
        per_device_train_batch_size=16,
    )
    expected = tiny.expect_metrics(trainer)
    trainer.train()
    trainer.save_model(tmp_path / "student")
    logged = [log["teacher/kl"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx([each["teacher/kl"] for each in expected], rel=1e-3) and len(logged) == 30
    # It is about halved; a student that learns of other tokens keeps it
    assert divergence(teacher_path, tmp_path / "student") < 0.65 * divergence(teacher_path, student_path)


def test_rows_without_advantage_are_scored_only_for_the_divergence(tmp_path, student_path, teacher_path):
    scored = {}
    for coef, success_reward in ((0.0, 0.0), (0.1, 9.0), (0.1, -9.0)):
        trainer = make_run(
            student_path,
            teacher_path,
            tmp_path / str(coef),
            teacher_kl_coef=coef,
            teacher_kl_on="failed",
            success_reward=success_reward,
            max_steps=0,
        )
        trainer.reward_weights = torch.tensor([0.0])  # no row has an advantage, and all rewards are 0
        batch = trainer._generate_and_score_completions([tiny.make_dataset()[0]] * 4)
        scored[coef, success_reward] = (batch["teacher_mask"] == batch["completion_mask"].bool()).all().item()
        assert scored[coef, success_reward] or not batch["teacher_mask"].any()
    assert scored == {(0.0, 0.0): False, (0.1, 9.0): True, (0.1, -9.0): False}


def naive_forward_kl(student, teacher, batch, k, temperature):
    """Token by token in float64, from plain forward passes over unpadded rows: mean over tokens, then over rows."""
    rows = []
    for i in range(len(batch["completion_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        ids = torch.cat([prompt, completion])[None]
        q, p = (
            (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature).softmax(-1)
            for model in (student, teacher)
        )
        tokens = []
        for q_t, p_t in zip(q, p.detach(), strict=True):
            top = p_t.topk(k).indices
            top = top[top < 32]  # the ids beyond are the teacher's alone
            named = (p_t[top] * (p_t[top] / q_t[top]).log()).sum()
            rest, q_rest = 1 - p_t[top].sum(), 1 - q_t[top].sum()
            tokens.append(named + rest * (rest / q_rest).log())
        rows.append(batch["teacher_kl_on"][i] * batch["teacher_weight"][i] * sum(tokens) / len(tokens))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_with_named_tokens_equals_a_naive_twin(
    temperature, checkpointing, lora, tmp_path, student_path, teacher_path
):
    args = tiny.make_config(
        tmp_path,
        alpha=1.0,
        teacher_kl_coef=0.5,
        teacher_kl="forward",
        teacher_top_k=5,
        teacher_kl_on="failed",
        success_reward=0.5,
        reward_weights=[1.0, 0.0],
        temperature=temperature,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=8,
    )
    dataset = tiny.make_dataset().map(
        lambda row, i: {"teacher_weight": [1.0, 0.25, None, 0.5][i % 4]}, with_indices=True
    )
    peft_config = LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False) if lora else None
    rewards = [lambda completions, **kwargs: [0.0, 1.0, 0.2, 1.0] * (len(completions) // 4), tiny.reward]
    trainer = RLADTrainer(student_path, rewards, args, dataset, teacher_model=teacher_path, peft_config=peft_config)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [dataset[i] for i in (0, 1) for _ in range(4)]
    batch = trainer._prepare_inputs(rows)
    assert batch["teacher_kl_on"].sum() == 4 and sorted(set(batch["teacher_weight"].tolist())) == [0.25, 1.0]
    trainer.compute_loss(trainer.model, batch | {"advantages": 0 * batch["advantages"]}).backward()
    gradients = {name: p.grad.double() for name, p in trainer.model.named_parameters() if p.grad is not None}

    teacher = AutoModelForCausalLM.from_pretrained(teacher_path).double()
    trainer.model.zero_grad()
    student = trainer.model.double().eval()
    base = student.get_base_model() if lora else student
    del base.forward  # TRL's fused head
    kl = naive_forward_kl(student, teacher, batch, 5, temperature)
    (0.5 * kl).backward()
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())


def test_where_the_student_never_goes_only_a_named_token_pulls():
    # Three tokens; the student gives the teacher's favourite, 2, one chance in a million, and always samples 0
    logits = torch.tensor([14.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.05, 0.05, 0.9], dtype=torch.float64).log()
    log_probs = logits.log_softmax(0)
    (graded,) = torch.autograd.grad(reverse_kl(log_probs[0], teacher[0], None), logits, retain_graph=True)
    (named,) = torch.autograd.grad(forward_kl(log_probs[2:], teacher[2:]), logits)
    assert abs(graded[2]) < 1e-5 < 0.89 < -named[2]


def test_entropy_of_the_named_tokens():
    named = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.5, 0.0]]).log()  # the rest: 0.25, 0 and, as one is at -inf, 0.5
    # 0.5 log 2 + 2 * 0.25 log 4 = 1.5 log 2
    assert named_entropy(named).tolist() == pytest.approx([1.5 * math.log(2), 0.0, math.log(2)], abs=1e-6)


def test_what_rounding_leaves_above_one_is_no_rest():
    teacher = torch.tensor([[0.6, 0.4001]]).log()
    expected = -0.6 * math.log(0.6) - 0.4001 * math.log(0.4001)
    assert named_entropy(teacher).item() == pytest.approx(expected)
    assert forward_kl(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)


def test_rows_are_apart_from_each_other_and_have_any_shape():
    student, teacher = (torch.randn(2, 3, 5).log_softmax(-1)[..., :3] for _ in range(2))
    for function, given in ((forward_kl, (student, teacher)), (named_entropy, (teacher,))):
        alone = [[function(*(tensor[i, j] for tensor in given)) for j in range(3)] for i in range(2)]
        torch.testing.assert_close(function(*given), torch.stack([torch.stack(row) for row in alone]))


def test_the_bound_of_the_paper_is_the_default():
    assert reverse_kl(torch.tensor([0.0]), torch.tensor([-3.0])).item() == 2.5  # 1 * (3 - 1 / 2)
