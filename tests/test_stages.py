"""
First distillation, then reinforcement; and where a teacher is believed: `distillation_fraction` and `teacher_weight`.
"""

import asyncio

import pytest
import tiny
import torch
from accelerate import PartialState
from test_loss import B, make_batch, make_logps, reference_loss
from transformers import TrainerState
from trl import GRPOConfig, GRPOTrainer

from trl_rlad import RLADTrainer
from trl_rlad._trl.seam import Rollouts
from trl_rlad.checkpoints import RunRecord


def train(student_path, teacher_path, output_dir, dataset=None, resume=None, **kwargs):
    args = tiny.make_config(output_dir, **{"max_steps": 4, "learning_rate": 1e-3, **kwargs})
    teacher = teacher_path if args.needs_teacher else None
    trainer = RLADTrainer(student_path, tiny.reward, args, dataset or tiny.make_dataset(), teacher_model=teacher)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name):
    return [log.get(name) for log in trainer.state.log_history if "loss" in log]


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


MOVING = {"alpha": 1.0, "teacher_kl_coef": 0.4, "teacher_kl_coef_final": 0.0}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_coefficient_moves_in_a_straight_line(accumulation, tmp_path, student_path, teacher_path):
    # With each update, of however many micro-batches; over an epoch as over a given number of steps
    kwargs = {"gradient_accumulation_steps": accumulation, "max_steps": -1, "num_train_epochs": 1, **MOVING}
    trainer = train(student_path, teacher_path, tmp_path, tiny.make_dataset(4 * accumulation), **kwargs)
    assert logged(trainer, "teacher/kl_coef") == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_a_resumed_run_has_its_coefficient(tmp_path, student_path, teacher_path):
    kwargs = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, **MOVING}
    whole = train(student_path, teacher_path, tmp_path / "whole", **kwargs)
    path = tmp_path / "whole" / "checkpoint-2"
    resumed = train(student_path, teacher_path, tmp_path / "resumed", resume=path, **kwargs)
    assert logged(whole, "teacher/kl_coef")[2:] == pytest.approx([0.2, 0.1])
    for name in ("teacher/kl_coef", "teacher/kl", "loss"):
        assert logged(resumed, name) == logged(whole, name), name


def test_both_ends_of_the_line_are_exact(tmp_path):
    config = tiny.make_config(tmp_path, teacher_kl_coef=0.3, teacher_kl_coef_final=0.1)
    assert (config.objective.at(0.0).kl_coef, config.objective.at(1.0).kl_coef) == (0.3, 0.1)
    assert tiny.make_config(tmp_path, teacher_kl_coef=0.3).objective.at(0.7).kl_coef == 0.3


def test_a_teacher_that_has_a_say_later_is_there_from_the_start(tmp_path, student_path, teacher_path):
    trainer = train(student_path, teacher_path, tmp_path, alpha=1.0, teacher_kl_coef_final=0.1)
    assert logged(trainer, "teacher/kl_coef") == pytest.approx([0.0, 0.025, 0.05, 0.075])
    assert logged(trainer, "teacher/kl")[0] is None and logged(trainer, "teacher/kl")[1] > 0.0


@pytest.mark.parametrize("estimator", ["reverse", "forward"])
def test_distillation_is_distillation(estimator, tmp_path, student_path, teacher_path):
    # In its stage, whatever else is set, the same as a divergence of coefficient 1 with all rewards at zero
    settings = {"teacher_kl": estimator, "num_iterations": 2}
    stage = {"distillation_fraction": 1.0, "teacher_kl_on": "failed", "beta": 0.02, "max_steps": 4}
    args = tiny.make_config(tmp_path, learning_rate=1e-3, **stage, **settings)
    staged = RLADTrainer(student_path, tiny.reward, args, tiny.make_dataset(), teacher_model=teacher_path)
    expected = tiny.expect_metrics(staged)
    staged.train()
    assert logged(staged, "teacher/kl") == pytest.approx([each["teacher/kl"] for each in expected], rel=1e-3)
    plain = train(
        student_path,
        teacher_path,
        tmp_path,
        alpha=1.0,
        teacher_kl_coef=1.0,
        reward_weights=[0.0],
        beta=0.02,
        **settings,
    )
    assert logged(staged, "loss") == logged(plain, "loss") and logged(staged, "teacher/kl_coef") == [1.0] * 4
    assert all(torch.equal(*pair) for pair in zip(weights(staged), weights(plain), strict=True))
    assert any(logged(staged, "reward"))  # which is still measured


def test_pure_distillation_needs_no_reward(tmp_path, student_path, teacher_path):
    args = tiny.make_config(tmp_path, max_steps=4, learning_rate=1e-3, distillation_fraction=1.0)
    plain = train(student_path, teacher_path, tmp_path, distillation_fraction=1.0)
    trainer = RLADTrainer(student_path, None, args, tiny.make_dataset(), teacher_model=teacher_path)
    trainer.train()
    assert all(torch.equal(*pair) for pair in zip(weights(trainer), weights(plain), strict=True))
    assert logged(trainer, "reward") == [0.0] * 4
    args = tiny.make_config(tmp_path, distillation_fraction=0.9)
    with pytest.raises(ValueError, match="`reward_funcs`"):
        RLADTrainer(student_path, None, args, tiny.make_dataset(), teacher_model=teacher_path)


def test_what_has_succeeded_is_distilled_too_before_the_failures_alone_are(tmp_path, student_path, teacher_path):
    settings = {"alpha": 1.0, "distillation_fraction": 0.5, "teacher_kl_coef": 0.1, "teacher_kl_on": "failed"}
    config = tiny.make_config(tmp_path, success_reward=-1.0, max_steps=2, **settings)
    trainer = RLADTrainer(student_path, tiny.reward, config, tiny.make_dataset(), teacher_model=teacher_path)
    batches = tiny.watch_batches(trainer)
    trainer.train()
    distilled, trained = (batch for batch, _ in batches)
    assert torch.equal(distilled["teacher_mask"], distilled["completion_mask"].bool())
    assert not distilled["teacher_kl_on"].any() and not trained["teacher_mask"].any()


def test_distil_then_reinforce(tmp_path, student_path, teacher_path):
    kwargs = {"alpha": 1.0, "distillation_fraction": 0.5, "max_steps": 6, "teacher_kl": "forward"}
    args, scores, is_there = tiny.make_config(tmp_path, **kwargs), [], []

    async def reward(completion_ids, **kwargs):  # beside which a teacher that is asked scores
        await asyncio.sleep(0)
        is_there.append(trainer.teacher_scorer.teachers[""].model is not None)
        return tiny.reward(completion_ids)

    trainer = RLADTrainer(student_path, reward, args, tiny.make_dataset(), teacher_model=teacher_path)
    teacher = trainer.teacher_scorer.teachers[""]
    score = teacher.score
    teacher.score = lambda *args: scores.append(trainer.state.global_step) or score(*args)
    trainer.train()
    assert logged(trainer, "teacher/kl_coef") == [1.0] * 3 + [0.0] * 3
    assert [kl is not None for kl in logged(trainer, "teacher/kl")] == [True] * 3 + [False] * 3
    assert teacher.model is None and trainer.teacher_scorer.calls == 3
    # The reward has the second half to itself: the teacher was let go, and is asked nothing more
    assert set(scores) == {0, 1, 2} and is_there == [True] * 4 + [False] * 2
    # The second half is GRPO
    assert [time is not None for time in logged(trainer, "teacher/scoring_time")] == [True] * 3 + [False] * 3


def test_the_second_stage_is_grpo_bit_for_bit(tmp_path, student_path, teacher_path):
    # A distillation of which no row is believed leaves the student as it was
    dataset = tiny.make_dataset().add_column("teacher_weight", [0.0] * 32)
    kwargs = {"max_steps": 4, "learning_rate": 1e-3}
    settings = {"alpha": 1.0, "distillation_fraction": 0.25, "trim_padding": False}
    trainer = train(student_path, teacher_path, tmp_path, dataset, **settings, **kwargs)
    assert logged(trainer, "grad_norm")[0] == 0.0
    grpo = GRPOTrainer(
        student_path, tiny.reward, tiny.make_config(tmp_path, GRPOConfig, **kwargs), tiny.make_dataset()
    )
    compute_loss, calls = grpo.compute_loss, []

    def skip_the_first(*args, **kwargs):
        calls.append(compute_loss(*args, **kwargs))
        return calls[-1] * 0.0 if len(calls) == 1 else calls[-1]

    grpo.compute_loss = skip_the_first
    grpo.train()
    assert all(torch.equal(*pair) for pair in zip(weights(trainer), weights(grpo), strict=True))


def test_distil_then_rlad_with_batches_across_the_border(tmp_path, student_path, teacher_path):
    # A generation batch lasts two steps, and the border is in the middle of one
    kwargs = {"distillation_fraction": 0.5, "max_steps": 6, "num_iterations": 2, "teacher_kl_coef": 0.3}
    trainer = train(student_path, teacher_path, tmp_path, teacher_kl_on="failed", success_reward=0.4, **kwargs)
    assert logged(trainer, "teacher/kl_coef") == [1.0] * 3 + [0.3] * 3
    assert all(ratio is not None for ratio in logged(trainer, "teacher/log_ratio")[3:])
    assert logged(trainer, "teacher/log_ratio")[:3] == [None] * 3


def test_a_resumed_run_is_in_its_stage(tmp_path, student_path, teacher_path):
    kwargs = {"distillation_fraction": 0.5, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    kwargs |= {"teacher_kl": "forward", "alpha": 1.0}
    whole = train(student_path, teacher_path, tmp_path / "whole", **kwargs)
    for checkpoint in (2, 4):
        path = tmp_path / "whole" / f"checkpoint-{checkpoint}"
        resumed = train(student_path, teacher_path, tmp_path / "resumed", resume=path, **kwargs)
        for name in ("loss", "teacher/kl_coef", "teacher/kl"):
            assert logged(resumed, name) == logged(whole, name), name
        assert all(torch.equal(*pair) for pair in zip(weights(resumed), weights(whole), strict=True))


def test_a_phase_that_comes_back_with_more_steps_is_said(tmp_path, student_path, teacher_path, caplog):
    kwargs = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "distillation_fraction": 0.5}
    train(student_path, teacher_path, tmp_path, **kwargs)
    resumed = train(
        student_path, teacher_path, tmp_path, resume=tmp_path / "checkpoint-2", **kwargs | {"max_steps": 5}
    )
    assert logged(resumed, "teacher/kl_coef") == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert "Step 2 was one of 2 when the checkpoint was saved, and is one of 5 now." in caplog.text


@pytest.mark.parametrize(
    ("settings", "steps", "says"),
    [
        ({"distillation_fraction": 0.5}, (2, 4, 8), True),
        ({"distillation_fraction": 0.5}, (2, 4, 4), False),
        ({"distillation_fraction": 0.5}, (4, 5, 6), False),  # both are behind distillation
        ({"distillation_fraction": 0.5}, (4, 8, 5), False),
        (MOVING, (2, 4, 5), True),
        ({}, (2, 4, 8), False),
        ({"distillation_fraction": 0.5}, (0, None, 8), False),  # nothing is gone on from
    ],
)
def test_which_phases_come_back(settings, steps, says, tmp_path, caplog):
    PartialState()
    args, (step, before, now) = tiny.make_config(tmp_path, **settings), steps
    record = RunRecord(args, {})
    record.before = before and (tmp_path, {"max_steps": before})
    record.on_train_begin(args, TrainerState(global_step=step, max_steps=now), None)
    assert ("falls back to an earlier phase" in caplog.text) == says


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_weight_scales_the_teachers_exponent(make_trainer, loss_type, level):
    weight = torch.tensor([1.0, 0.5, 1.0, 0.0, 0.25, 0.75])
    batch = make_batch()
    logps = make_logps(batch)
    trainer = make_trainer(logps, loss_type=loss_type, importance_sampling_level=level)
    trainer.compute_loss(trainer.model, {**batch, "teacher_weight": weight}).backward()
    # A row of weight w is a row at alpha = 1 - w / 2: gradients add up over rows
    expected = torch.zeros_like(logps, dtype=torch.float64)
    for row, w in enumerate(weight.tolist()):
        kwargs = {"alpha": 1 - 0.5 * w, "clip": 1.0, "level": level, "loss_type": loss_type}
        expected[row] = reference_loss(logps, batch, **kwargs)[1][row]
    torch.testing.assert_close(logps.grad.double(), expected, rtol=1e-6, atol=1e-6)
    assert B == len(weight)


@pytest.mark.parametrize("settings", [{}, {"teacher_credit": True}, {"teacher_kl_coef": 0.3}])
def test_rows_of_weight_zero_are_grpo_bit_for_bit(settings, tmp_path, student_path, teacher_path):
    kwargs = {"num_iterations": 2, "max_steps": 6}
    dataset = tiny.make_dataset().add_column("teacher_weight", [0.0] * 32)
    rlad = train(student_path, teacher_path, tmp_path, dataset, **kwargs, **settings)
    grpo = train(student_path, teacher_path, tmp_path, alpha=1.0, **kwargs)
    assert logged(rlad, "loss") == logged(grpo, "loss")
    assert all(torch.equal(*pair) for pair in zip(weights(rlad), weights(grpo), strict=True))


def test_our_columns_stay_when_unused_ones_are_removed(tmp_path, student_path, teacher_path):
    dataset = tiny.make_dataset().add_column("teacher_weight", [0.0] * 32).add_column("other", [0] * 32)
    rlad = train(student_path, teacher_path, tmp_path, dataset, remove_unused_columns=True)
    assert {"teacher_id", "teacher_prompt", "teacher_weight"} <= set(rlad._signature_columns)
    grpo = train(student_path, teacher_path, tmp_path, alpha=1.0)
    assert logged(rlad, "loss") == logged(grpo, "loss") and any(logged(grpo, "loss"))


def test_rows_of_weight_zero_are_not_scored(tmp_path, student_path, teacher_path):
    dataset = tiny.make_dataset().map(lambda row, i: {"teacher_weight": 0.1 * (i % 2)}, with_indices=True)
    trainer = train(student_path, teacher_path, tmp_path, dataset, teacher_kl_coef=0.1, max_steps=0)
    batch = trainer._generate_and_score_completions([dataset[i] for i in (0, 1) for _ in range(4)])
    assert batch["teacher_mask"].any(1).tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_weight_out_of_range_is_refused_before_training(weight, tmp_path, student_path, teacher_path):
    dataset = tiny.make_dataset().add_column("teacher_weight", [1.0] * 31 + [weight])
    config = tiny.make_config(tmp_path)
    with pytest.raises(ValueError, match=rf"column `teacher_weight` must be in \[0, 1\] .*but row 31 has {weight}"):
        RLADTrainer(student_path, tiny.reward, config, dataset, teacher_model=teacher_path)


def test_a_streamed_weight_is_refused_when_it_comes(tmp_path, student_path, teacher_path):
    dataset = tiny.make_dataset().add_column("teacher_weight", [2.0] * 32).to_iterable_dataset()
    with pytest.raises(ValueError, match="column `teacher_weight` must be in"):
        train(student_path, teacher_path, tmp_path, dataset)


def test_a_missing_weight_is_one(tmp_path, student_path, teacher_path):
    dataset = tiny.make_dataset().add_column("teacher_weight", [None, 1.0] * 16)
    with_column = train(student_path, teacher_path, tmp_path, dataset)
    without = train(student_path, teacher_path, tmp_path)
    assert all(torch.equal(*pair) for pair in zip(weights(with_column), weights(without), strict=True))


def test_what_the_teacher_is_asked_before_advantages_are_known(make_trainer, monkeypatch):
    # All that may be wanted: not what a tool has written, nor rows of weight 0; each row by its own prompt
    trainer, asked = make_trainer(teacher_kl_coef=0.1, teacher_kl="forward", teacher_top_k=3), []
    monkeypatch.setattr(trainer.teacher_scorer, "begin", lambda *args: asked.extend(args))
    rollouts = Rollouts([[5], [6], [7]], [[8, 9, 10], [11, 12], [13]], [[1, 0, 1], [1, 1], [1]])
    rows = [{"teacher_prompt": "w5 w6"}, {"teacher_weight": 0.0}, {"teacher_weight": None}]
    trainer.guide.begin(rollouts, [{"prompt": "w1", **row} for row in rows])
    masks = [[1, 0, 1], [0, 0], [1]]
    assert asked == [[[9, 10], [6], [7]], rollouts.completion_ids, masks, 3, None]
