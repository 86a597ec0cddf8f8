"""What could go wrong without a word: judged by what is trained, logged and said."""

import json
import resource
import shutil
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from test_loss import make_batch, make_logps
from test_teacher_scorer import CountingTeacher
from test_teacher_scorer import make_batch as make_rows
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MambaConfig,
    Qwen3_5Config,
    TrainerCallback,
    TrainerState,
)

from trl_rlad import RLADTrainer
from trl_rlad.checkpoints import RunRecord, last_checkpoint
from trl_rlad.scoring import watchdog
from trl_rlad.teachers.loading import find_non_finite
from trl_rlad.trials import longest_input


def make_trainer(student, teacher, folder, reward=tiny.reward, callbacks=None, eval_dataset=None, **kwargs):
    args = tiny.make_config(folder, **kwargs)
    return RLADTrainer(
        student, reward, args, tiny.make_dataset(), eval_dataset, callbacks=callbacks, teacher_model=teacher
    )


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


# Rewards of `None`


def test_what_a_reward_function_cannot_judge_is_no_failure(student_path, teacher_path, tmp_path):
    def sometimes(completions, **kwargs):  # right, not judged, right, not judged, of one prompt; then never judged
        return [1.0 if i % 8 in (0, 2) else None for i in range(len(completions))]

    def half(completions, **kwargs):
        return [float(i % 2) for i in range(len(completions))]

    trainer = make_trainer(
        student_path,
        teacher_path,
        tmp_path,
        [sometimes, half],
        eval_dataset=tiny.make_dataset(4),
        num_generations_eval=4,
        per_device_eval_batch_size=8,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/sometimes/pass@1"] == 1.0
    assert "eval_rewards/sometimes/pass@4" not in metrics  # no prompt has four that are judged
    assert (metrics["eval_rewards/half/pass@1"], metrics["eval_rewards/half/pass@4"]) == (0.5, 1.0)


def test_only_what_is_known_to_have_failed_counts_as_failed(make_trainer):
    trainer = make_trainer(teacher_kl_coef=0.1, teacher_kl_on="failed")
    nan = float("nan")
    rewards = torch.tensor([[1.0], [0.0], [nan], [-1.0]])
    assert trainer.guide.select_for_kl(rewards).tolist() == [False, True, False, True]


def test_a_reward_that_never_succeeds_is_said_so(student_path, teacher_path, tmp_path, caplog):
    kwargs = {"teacher_kl_coef": 0.1, "teacher_kl_on": "failed", "max_steps": 12}
    make_trainer(student_path, teacher_path, tmp_path, success_reward=7.0, **kwargs).train()
    assert caplog.text.count("No completion of 10 generation batches has a reward above `success_reward=7.0`") == 1
    caplog.clear()
    make_trainer(student_path, teacher_path, tmp_path, **kwargs).train()
    assert "generation batches" not in caplog.text


def test_what_is_at_the_bound_has_not_succeeded_and_one_success_is_enough(make_trainer, caplog):
    kwargs = {"teacher_kl_coef": 0.1, "teacher_kl_on": "failed", "success_reward": 0.5}
    bad, good = torch.full((4, 1), 0.5), torch.tensor([[0.0], [0.0], [0.0], [0.6]])
    for batches, says in (([bad] * 10, True), ([bad] * 9, False), ([good] + [bad] * 30, False)):
        caplog.clear()
        guide = make_trainer(**kwargs).guide
        for rewards in batches:
            assert guide.select_for_kl(rewards).tolist() == (rewards[:, 0] <= 0.5).tolist()
        assert ("`success_reward=0.5`" in caplog.text and "highest is 0.5" in caplog.text) == says


def test_success_is_judged_by_the_weighted_sum_of_all_reward_functions(student_path, teacher_path, tmp_path):
    kwargs = {"reward_weights": [1.0, -2.0], "success_reward": 0.5, "teacher_kl_coef": 0.1, "teacher_kl_on": "failed"}
    trainer = make_trainer(student_path, teacher_path, tmp_path, [tiny.reward, tiny.reward], **kwargs)
    nan = float("nan")
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.4], [nan, -0.4], [nan, 0.4]])  # in all 1, 0.2, 0.8 and -0.8
    assert trainer.guide.select_for_kl(rewards).tolist() == [False, True, False, True]


# Settings that move


class Raise(TrainerCallback):
    """Sets the coefficient of the divergence at a step."""

    def __init__(self, step, **values):
        self.step, self.values = step, values

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            vars(args).update(self.values)


@pytest.mark.parametrize("estimator", ["reverse", "forward"])
def test_a_coefficient_that_rises_within_a_generation_batch(estimator, student_path, teacher_path, tmp_path):
    # With two iterations, batches are made before steps 0, 2 and 4: the rise at step 1 is felt from step 2 on
    kwargs = {"num_iterations": 2, "max_steps": 6, "teacher_kl": estimator}
    callbacks = [Raise(1, teacher_kl_coef=0.5)]
    trainer = make_trainer(student_path, teacher_path, tmp_path, callbacks=callbacks, **kwargs)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert ["teacher/kl" in log for log in logs] == [False, False, True, True, True, True]
    plain = make_trainer(student_path, teacher_path, tmp_path, **kwargs)
    plain.train()
    assert losses(trainer)[:2] == losses(plain)[:2] and losses(trainer)[2] != losses(plain)[2]


def test_a_coefficient_that_rises_without_a_teacher(student_path, tmp_path):
    trainer = make_trainer(student_path, None, tmp_path, alpha=1.0, callbacks=[Raise(1, teacher_kl_coef=0.5)])
    with pytest.raises(RuntimeError, match="made without a teacher.*`teacher_model`"):
        trainer.train()


def test_the_teacher_stops_naming_when_nothing_is_left_to_name(student_path, teacher_path, tmp_path):
    trainer = make_trainer(
        student_path,
        teacher_path,
        tmp_path,
        alpha=0.5,
        distillation_fraction=0.4,
        teacher_kl="forward",
        max_steps=5,
    )
    score, asked = trainer.teacher_scorer.score, []

    def watch(batch, mask, top_k, *others):
        asked.append(top_k)
        return score(batch, mask, top_k, *others)

    trainer.teacher_scorer.score = watch
    trainer.train()
    assert asked == [8, 8, 0, 0, 0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"teacher_kl_on": "failed"}, "`teacher_kl_on` has no effect without a divergence"),
        ({"teacher_kl": "forward", "teacher_top_k": 4}, "`teacher_kl`, `teacher_top_k` has no effect"),
        ({"save_strategy": "steps", "save_steps": 3, "num_iterations": 2}, "Choose a multiple of 2"),
        ({"save_strategy": "steps", "save_steps": 2, "steps_per_generation": 4, "num_iterations": 3,
          "gradient_accumulation_steps": 2}, "Choose a multiple of 6"),
        ({"teacher_kl_on": "failed", "distillation_fraction": 0.5}, "no effect without a divergence after dist"),
        ({"teacher_kl_on": "failed", "distillation_fraction": 1.0, "teacher_kl_coef": 1.0}, "without a divergence af"),
        ({"teacher_kl_on": "failed", "distillation_fraction": 0.5, "teacher_kl_coef": 1.0}, None),
        ({"teacher_kl_coef": 1.0, "teacher_top_k": 4}, '`teacher_top_k` has no effect without `teacher_kl="forward"`'),
        ({"teacher_kl_coef": 1.0, "teacher_kl": "forward", "teacher_top_k": 4}, None),
        ({"distillation_fraction": 1.0, "alpha": 0.3}, "`alpha` has no effect without any training after"),
        ({"distillation_fraction": 1.0, "teacher_credit": True, "teacher_kl_coef": 0.1, "teacher_kl_coef_final": 0.2},
         "`teacher_credit`, `teacher_kl_coef`, `teacher_kl_coef_final` has no effect without any training after"),
        ({"distillation_fraction": 1.0, "alpha": 1.0, "teacher_log_ratio_clip": None}, None),
        ({"distillation_fraction": 1.0, "teacher_kl": "forward", "teacher_log_ratio_clip": None},
         "`teacher_log_ratio_clip` has no effect without a term in which the teacher grades"),
        ({"teacher_kl_coef": 1.0, "alpha": 1.0, "teacher_kl": "forward", "teacher_log_ratio_clip": 2.0}, "grades"),
        ({"distillation_fraction": 0.9, "alpha": 0.3, "teacher_kl": "forward", "teacher_log_ratio_clip": 2.0}, None),
        ({"on_teacher_failure": "grpo"}, "`on_teacher_failure` has no effect without `teacher_server_urls`"),
        ({"on_teacher_failure": "grpo", "teacher_server_urls": "http://localhost"}, None),
        ({"teacher_kl_on": "failed", "teacher_kl_coef_final": 0.5}, None),
        ({"save_strategy": "steps", "save_steps": 4, "num_iterations": 2}, None),
        ({"save_strategy": "steps", "save_steps": 0.5, "num_iterations": 2}, None),
    ],
)  # fmt: skip
def test_what_is_only_warned_about(kwargs, message, tmp_path, recwarn):
    tiny.make_config(tmp_path, **kwargs)
    said = [str(w.message) for w in recwarn if "no effect" in str(w.message) or "multiple of" in str(w.message)]
    assert bool(said) == (message is not None) and (not said or message in said[0])


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("kwargs", "warns"),
    [
        ({"distillation_fraction": 0.5}, True),
        ({"teacher_kl_coef": 0.5, "teacher_kl_coef_final": 0.0}, True),
        ({"distillation_fraction": 0.5, "metric_for_best_model": "eval_loss"}, True),
        ({"distillation_fraction": 0.5, "metric_for_best_model": "reward"}, False),
        ({"distillation_fraction": 0.5, "load_best_model_at_end": False}, False),
        ({"distillation_fraction": 0.5, "load_best_model_at_end": False, "metric_for_best_model": "loss"}, True),
        ({"distillation_fraction": 1.0}, False),
        ({"teacher_kl_coef": 0.5}, False),
    ],
)
def test_that_the_best_loss_is_of_another_phase_is_said(kwargs, warns, tmp_path, recwarn):
    tiny.make_config(tmp_path, eval_steps=1, lr_scheduler_type="constant", **BEST | kwargs)
    assert warns == any("made of other terms at the beginning" in str(warning.message) for warning in recwarn)


# Metrics


def test_a_users_metric_named_kl_stays(student_path, teacher_path, tmp_path):
    def reward(completion_ids, log_metric, **kwargs):
        log_metric("kl", 7.0)
        return tiny.reward(completion_ids)

    trainer = make_trainer(student_path, teacher_path, tmp_path, reward, teacher_kl_coef=0.1, num_iterations=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    # Logged with each generation batch, and by TRL not in between
    assert [log.get("kl") for log in logs] == [7.0, None, 7.0, None, 7.0]


# Teachers


def test_a_teacher_that_is_put_back_to_training_has_no_dropout(student_path, tmp_path):
    teacher = tiny.make_model(1)
    teacher.config.attention_dropout = 0.5
    for layer in teacher.model.layers:
        layer.self_attn.attention_dropout = 0.5
    teacher.config._name_or_path = student_path  # its tokenizer
    trainer = make_trainer(student_path, teacher, tmp_path)
    rows = [torch.arange(4, 9)], [torch.arange(9, 20)]
    scorer = trainer.teacher_scorer.teachers[""]
    with scorer.placed():
        expected = scorer.score(*rows)[0].logps
    teacher.train()
    with scorer.placed():
        assert torch.equal(scorer.score(*rows)[0].logps, expected)


def test_a_rollout_longer_than_the_teachers_positions(student_path, tmp_path):
    # A stream isn't looked at beforehand
    teacher = tiny.save_model(tmp_path / "teacher", seed=1, positions=9)
    args = tiny.make_config(tmp_path)
    dataset = tiny.make_dataset().to_iterable_dataset()
    trainer = RLADTrainer(student_path, tiny.reward, args, dataset, teacher_model=teacher)
    with pytest.raises(ValueError, match=r"A rollout has 1\d tokens .* knows only 9 positions. Lower `max_comp"):
        trainer.train()


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, 4096),
        ({"rope_type": "default", "rope_theta": 1e4}, 4096),
        # by the positions of the model times the factor, which the config may or may not have taken into account
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        ({"full_attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}, 16384),
    ],
)
def test_the_longest_text_that_a_model_can_read(rope, expected, student_path):
    config = AutoConfig.from_pretrained(student_path)
    config.rope_parameters = rope
    assert longest_input(config) == expected


def test_a_model_without_positions_reads_anything():
    assert longest_input(MambaConfig()) == float("inf")


def test_the_positions_of_a_vision_language_model_are_those_of_its_text():
    assert longest_input(Qwen3_5Config(text_config={"max_position_embeddings": 77})) == 77


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = torch.nn.Linear(2, 2)
    assert find_non_finite(model) == []
    model.weight.data[0, 1] = value
    assert find_non_finite(model) == ["weight"]


def test_the_teacher_is_found_where_it_is_said_to_be(student_path, tmp_path):
    tiny.save_model(tmp_path / "family" / "small", seed=1)
    kwargs = {"subfolder": "small"}
    trainer = make_trainer(student_path, str(tmp_path / "family"), tmp_path, teacher_model_init_kwargs=kwargs)
    assert len(trainer.teacher_scorer.teachers[""].tokenizer) == 32


def test_trusting_the_students_code_is_not_trusting_the_teachers(student_path, teacher_path, tmp_path):
    teacher = make_trainer(student_path, teacher_path, tmp_path, trust_remote_code=True).teacher_scorer.teachers[""]
    assert not teacher.init_kwargs.get("trust_remote_code") and "trust_remote_code" not in teacher.hub_kwargs
    kwargs = {"trust_remote_code": True}
    teacher = make_trainer(
        student_path, teacher_path, tmp_path, teacher_model_init_kwargs=kwargs
    ).teacher_scorer.teachers[""]
    assert teacher.init_kwargs["trust_remote_code"] and teacher.hub_kwargs["trust_remote_code"]


# Steps that would leave no student


@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
def test_an_infinite_reward_stops_training(bad, student_path, teacher_path, tmp_path):
    def broken_reward(completion_ids, trainer_state, **kwargs):
        rewards = tiny.reward(completion_ids)
        return [bad, *rewards[1:]] if trainer_state.global_step == 2 else rewards

    trainer = make_trainer(student_path, teacher_path, tmp_path, [tiny.reward, broken_reward])
    with pytest.raises(FloatingPointError, match="`broken_reward` has returned an infinite reward.*`None`"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("bad", [1.0, None, [1.0, "good", 1.0, 1.0]], ids=["a number", "nothing", "a word"])
def test_a_reward_function_that_returns_no_list_of_numbers_is_named(bad, student_path, teacher_path, tmp_path):
    def mean_reward(**kwargs):
        return bad

    trainer = make_trainer(student_path, teacher_path, tmp_path, [mean_reward])
    with pytest.raises(TypeError, match="A reward function .`mean_reward`. has returned something else than a list"):
        trainer.train()


def test_an_error_within_a_reward_function_is_its_own(student_path, teacher_path, tmp_path):
    def broken_reward(completions, **kwargs):
        return [len(None) for _ in completions]

    trainer = make_trainer(student_path, teacher_path, tmp_path, [broken_reward])
    with pytest.raises(TypeError, match=r"^object of type 'NoneType' has no len\(\)$"):
        trainer.train()


def test_a_loss_that_is_not_finite_stops_training_before_the_update(student_path, teacher_path, tmp_path):
    trainer = make_trainer(student_path, teacher_path, tmp_path, teacher_kl_coef=0.1)
    guide, weights = trainer.guide.guide, []

    def poisoned(*args):
        guidance = guide(*args)
        if trainer.state.global_step == 2:
            weights.extend(p.detach().clone() for p in trainer.model.parameters())
            guidance.penalty[0, 0] = float("nan")
        return guidance

    trainer.guide.guide = poisoned
    with pytest.raises(FloatingPointError, match="loss of step 3 isn't finite. Training stops before the update"):
        trainer.train()
    assert all(torch.equal(*pair) for pair in zip(weights, trainer.model.parameters(), strict=True))


def test_a_far_teacher_without_a_bound_stops_training_before_the_update(student_path, tmp_path):
    teacher = tiny.save_model(tmp_path / "teacher", seed=1, scale=30.0)  # of extreme logits
    trainer = make_trainer(student_path, teacher, tmp_path, alpha=0.0, teacher_log_ratio_clip=None)
    with pytest.raises(FloatingPointError, match="isn't finite.*without a `teacher_log_ratio_clip`"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_gradient_that_overflows_in_float16_is_left_to_its_scaler(student_path, teacher_path, tmp_path, monkeypatch):
    trainer = make_trainer(student_path, teacher_path, tmp_path)
    monkeypatch.setattr("transformers.Trainer._get_grad_norm", lambda self, *args, **kwargs: float("inf"))
    with pytest.raises(FloatingPointError, match="gradient of step 1 isn't finite"):
        trainer._get_grad_norm(trainer.model)
    trainer.args.fp16 = True
    assert trainer._get_grad_norm(trainer.model) == float("inf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_no_evaluation(bad, make_trainer):
    batch = make_batch()
    batch["advantages"] = torch.full_like(batch["advantages"], bad)
    trainer = make_trainer(make_logps(batch))
    trainer.model.eval()
    assert not trainer.compute_loss(trainer.model, batch).isfinite()
    trainer.model.train()
    with pytest.raises(FloatingPointError, match="loss of step 1 isn't finite"):
        trainer.compute_loss(trainer.model, batch)


# Resumption


def test_a_torn_checkpoint_is_passed_over(student_path, teacher_path, tmp_path):
    kwargs = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(student_path, teacher_path, tmp_path, **kwargs)
    trainer.train()
    expected = [p.detach().clone() for p in trainer.model.parameters()]
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()  # the last file that is written
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"epoch": 1')
    resumed = make_trainer(student_path, teacher_path, tmp_path, **kwargs)
    with pytest.warns(UserWarning, match="checkpoint-3 was not written to its end"):
        resumed.train(resume_from_checkpoint=True)
    assert [log["step"] for log in resumed.state.log_history if "loss" in log] == [1, 2, 3, 4]
    assert all(torch.equal(*pair) for pair in zip(expected, resumed.model.parameters(), strict=True))
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_the_last_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (9, 10, 100, "best"):  # the last is a user's own copy
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


@pytest.fixture(scope="module")
def checkpoint(student_path, teacher_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(student_path, teacher_path, folder, max_steps=2, save_strategy="steps", save_steps=2).train()
    return folder / "checkpoint-2"


def test_a_checkpoint_knows_its_run(checkpoint, teacher_path):
    record = json.loads((checkpoint / "rlad.json").read_text())
    (teacher,) = record["teachers"].values()
    assert teacher["name"] == Path(teacher_path).name and teacher["temperature"] == 1.0
    assert record["settings"]["alpha"] == 0.5 and "teacher_timeout" not in record["settings"]


def test_another_teacher_is_refused(checkpoint, student_path, teacher_path, tmp_path):
    for teacher, kwargs in ((student_path, {}), (teacher_path, {"temperature": 0.7}), (None, {"alpha": 1.0})):
        trainer = make_trainer(student_path, teacher, tmp_path, max_steps=3, **kwargs)
        with pytest.raises(ValueError, match=r"another teacher: .* delete .*rlad\.json"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    without = tmp_path / "checkpoint-7"
    without.mkdir()
    trainer.run_record.on_save(trainer.args, TrainerState(global_step=7, is_world_process_zero=True), None)
    with pytest.raises(ValueError, match="another teacher"):  # as it had none
        make_trainer(student_path, teacher_path, tmp_path).run_record.compare(str(without))


def test_another_commit_of_the_teacher_is_refused(checkpoint, student_path, teacher_path, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path)
    make_trainer(student_path, teacher, tmp_path, max_steps=3).train(str(checkpoint))  # the same, though an object now
    teacher.config._commit_hash = "0123abc"
    with pytest.raises(ValueError, match="another teacher: .*None.* and not .*'0123abc'"):
        make_trainer(student_path, teacher, tmp_path, max_steps=3).train(str(checkpoint))


def test_another_vocabulary_of_the_same_name_is_refused(student_path, tmp_path):
    # The student's words are the same in both: only two that it doesn't know have changed places
    kwargs = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    first, second = (
        tiny.save_model(tmp_path / name / "teacher", 1, tiny.make_tokenizer([*tiny.WORDS, *more]), vocab_size=40)
        for name, more in (("a", ["x", "y"]), ("b", ["y", "x"]))
    )
    make_trainer(student_path, first, tmp_path, **kwargs).train()
    with pytest.raises(ValueError, match="another teacher"):
        make_trainer(student_path, second, tmp_path, **kwargs | {"max_steps": 2}).train(resume_from_checkpoint=True)
    make_trainer(student_path, first, tmp_path, **kwargs | {"max_steps": 2}).train(resume_from_checkpoint=True)


def test_settings_that_are_objects_are_compared_as_they_were(student_path, teacher_path, tmp_path, caplog):
    kwargs = {"teacher_model_init_kwargs": {"dtype": torch.float32, "attn_implementation": "eager"}}
    kwargs |= {"teacher_log_ratio_clip": float("inf"), "save_strategy": "steps", "save_steps": 1}
    make_trainer(student_path, teacher_path, tmp_path, max_steps=1, **kwargs).train()
    make_trainer(student_path, teacher_path, tmp_path, max_steps=2, **kwargs).train(resume_from_checkpoint=True)
    assert "settings have changed" not in caplog.text


def test_a_record_holds_what_json_does_not(tmp_path, caplog):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    args = tiny.make_config(tmp_path, teacher_model_init_kwargs={"cache_dir": Path("there"), "max_memory": (1, 2)})
    record = RunRecord(args, {})
    record.on_save(args, TrainerState(global_step=1, is_world_process_zero=True), None)
    record.compare(str(folder))
    assert (folder / "rlad.json").exists() and "settings have changed" not in caplog.text
    (folder / "rlad.json").unlink()
    record.compare(str(folder))  # of a GRPO run: nothing is known


def test_replaced_weights_of_the_teacher_are_refused(student_path, tmp_path):
    # Of the same name, vocabulary and commit
    first, second = (tiny.save_model(tmp_path / name / "teacher", seed) for name, seed in (("a", 1), ("b", 2)))
    kwargs = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(student_path, first, tmp_path, max_steps=1, **kwargs).train()
    scores = json.loads((tmp_path / "checkpoint-1" / "rlad.json").read_text())["scores"][""]
    for teacher in (second, AutoModelForCausalLM.from_pretrained(second)):
        trainer = make_trainer(student_path, teacher, tmp_path, max_steps=2, **kwargs)
        with pytest.raises(ValueError, match=r"weights of the teacher 'teacher' are other ones .*delete .*rlad\.json"):
            trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 1
    assert len(scores) == 16 and sum(scores) < 0.0
    make_trainer(student_path, first, tmp_path, max_steps=2, **kwargs).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("text", ['{"teachers": {"": {"na', "[]", "{}", '{"teachers": [], "settings": {}}', ""])
def test_a_torn_record_is_named(text, checkpoint, student_path, teacher_path, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    (folder / "rlad.json").write_text(text)
    with pytest.raises(ValueError, match=r"checkpoint-2/rlad\.json can't be read .*delete this file"):
        make_trainer(student_path, teacher_path, tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_a_record_is_whole_or_not_there(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").mkdir()
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)  # killed when all is written
    record = RunRecord(tiny.make_config(tmp_path), {})
    with pytest.raises(ZeroDivisionError):
        record.on_save(record_args := tiny.make_config(tmp_path), TrainerState(global_step=1), None)
    assert record_args.output_dir == str(tmp_path) and not (tmp_path / "checkpoint-1" / "rlad.json").exists()


def test_settings_of_grpo_are_compared_too(checkpoint, student_path, teacher_path, tmp_path, caplog):
    kwargs = {"epsilon": 0.3, "learning_rate": 0.5, "vllm_server_port": 1, "log_unique_prompts": True}
    make_trainer(student_path, teacher_path, tmp_path, max_steps=3, **kwargs).train(str(checkpoint))
    (said,) = [record.getMessage() for record in caplog.records if "settings have changed" in record.getMessage()]
    assert "`epsilon` from 0.2 to 0.3" in said and "`learning_rate` from" in said and said.count("from") == 2


def test_a_checkpoint_without_a_record_is_said(checkpoint, student_path, teacher_path, tmp_path, caplog):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    (folder / "rlad.json").unlink()
    make_trainer(student_path, teacher_path, tmp_path, max_steps=3).train(resume_from_checkpoint=True)
    assert "There is no" in caplog.text and "so whether the teacher is the same isn't known" in caplog.text


# Processes


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"alpha": 1.0}, "`alpha` is 0.5 on rank 0 and 1.0 on rank 2"),
        ({"teacher_model": "b"}, "`teacher_model` is 'a'"),
    ],
)
def test_a_setting_in_which_ranks_differ_is_named(other, message, monkeypatch):
    # By a stub: real processes are in tests/test_distributed.py
    mine = {"alpha": 0.5, "teacher_model": "a"}
    monkeypatch.setattr(watchdog, "barrier_group", object)
    monkeypatch.setattr(watchdog.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(watchdog.dist, "monitored_barrier", lambda *args, **kwargs: None)
    ranks = [mine, mine, mine | other]
    monkeypatch.setattr(watchdog.dist, "all_gather_object", lambda all, mine, group: all.__setitem__(slice(3), ranks))
    with pytest.raises(ValueError, match=message):
        watchdog.check_agreement(mine, 60.0)
    ranks[2] = mine
    watchdog.check_agreement(mine, 60.0)


def test_another_objective_is_said(checkpoint, student_path, teacher_path, tmp_path, caplog):
    trainer = make_trainer(student_path, teacher_path, tmp_path, max_steps=3, alpha=0.7, teacher_kl_coef=0.1)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "settings have changed: `alpha` from 0.5 to 0.7, `teacher_kl_coef` from 0.0 to 0.1." in caplog.text
    caplog.clear()
    # How the teacher is run changes nothing
    same = {"teacher_timeout": 60.0, "teacher_offload": "cpu", "teacher_tokens_per_batch": 9, "trim_padding": False}
    make_trainer(student_path, teacher_path, tmp_path, max_steps=3, **same).train(str(checkpoint))
    assert "settings have changed" not in caplog.text


def test_the_last_checkpoint_is_compared_too(student_path, teacher_path, tmp_path):
    make_trainer(student_path, teacher_path, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="another teacher"):
        make_trainer(student_path, student_path, tmp_path, max_steps=2).train(resume_from_checkpoint=True)


# Faults


@contextmanager
def largest_file(size):
    """A disk that has no room for a file of more than `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class FillTheDisk(TrainerCallback):
    """Leaves no room for the optimizer's file after the first checkpoint."""

    def __init__(self, stack):
        self.stack = stack

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            size = Path(args.output_dir, "checkpoint-2", "optimizer.pt").stat().st_size
            self.stack.enter_context(largest_file(size - 1))


def test_a_full_disk_leaves_the_last_checkpoint(student_path, teacher_path, tmp_path):
    kwargs = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(student_path, teacher_path, tmp_path / "whole", **kwargs)
    whole.train()
    with ExitStack() as stack, pytest.raises((OSError, RuntimeError)):
        make_trainer(student_path, teacher_path, tmp_path / "full", callbacks=[FillTheDisk(stack)], **kwargs).train()
    resumed = make_trainer(student_path, teacher_path, tmp_path / "full", **kwargs)
    with pytest.warns(UserWarning, match="checkpoint-4 was not written to its end"):
        resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(*pair) for pair in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_call_that_has_ended_in_time_is_not_watched_any_more(monkeypatch):
    # Else the process would be ended later, in the middle of something else. With several processes, by a stub
    monkeypatch.setattr(watchdog, "barrier_group", object)
    monkeypatch.setattr(watchdog.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(watchdog.dist, "monitored_barrier", lambda *args, **kwargs: None)
    with watchdog.time_limit(3600.0, "a call"):
        (timer,) = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert not timer.finished.is_set()
    assert timer.finished.is_set()


def test_all_processes_have_the_time_that_the_settings_give_them(make_trainer, monkeypatch):
    # To come to the scoring, and again to end it. By a stub, as above; with real processes in test_distributed
    trainer, limits = make_trainer(teacher_timeout=77.0), []
    monkeypatch.setattr(watchdog, "barrier_group", object)
    monkeypatch.setattr(watchdog.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(watchdog.dist, "monitored_barrier", lambda _, timeout, **__: limits.append(timeout.seconds))
    scorer, batch = trainer.teacher_scorer, make_rows()
    scorer.scorers[""].teacher = CountingTeacher()
    score = scorer.scorers[""].teacher.score

    def watch(*args):
        limits.extend(each.interval for each in threading.enumerate() if isinstance(each, threading.Timer))
        return score(*args)

    scorer.scorers[""].teacher.score = watch
    scorer.score(batch, batch["completion_mask"])
    assert limits == [77, 77.0]


@pytest.mark.slow
def test_a_row_of_32k_tokens(student_path, tmp_path):
    # Against the same text in one pass over the model, a chunk of logits at a time
    teacher = tiny.save_model(tmp_path / "teacher", seed=1, positions=2**15)
    scorer = make_trainer(student_path, teacher, tmp_path).teacher_scorer.teachers[""]
    ids = torch.randint(4, 32, (2**15,), generator=torch.Generator().manual_seed(0))
    with scorer.placed():
        logps = scorer.score([ids[:100]], [ids[100:]])[0].logps
        with torch.no_grad():
            states = scorer.model.base_model(input_ids=ids[None]).last_hidden_state[0, 99:-1]
    expected = [scorer.model.lm_head(chunk).log_softmax(-1) for chunk in states.split(1024)]
    expected = torch.cat(expected).gather(1, ids[100:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-4)
