"""The teacher scores while asynchronous reward functions run."""

import asyncio
import threading
import time

import pytest
import tiny
import torch
from accelerate import Accelerator
from test_distributed import assert_losses, launch
from test_teacher_scorer import CountingTeacher, make_batch

from trl_rlad import RLADTrainer, TeacherScorer
from trl_rlad.scoring import RowScorer


def train(reward, student, teacher, output_dir, **kwargs):
    config = tiny.make_config(output_dir, **{"num_iterations": 2, "learning_rate": 1e-3, **kwargs})
    trainer = RLADTrainer(student, reward, config, tiny.make_dataset(), teacher_model=teacher)
    trainer.train()
    return trainer


def weights(trainer):
    return dict(trainer.model.named_parameters())


def test_the_same_steps(tmp_path, student_path, teacher_path):
    paths = (student_path, teacher_path, tmp_path)
    apart, first, second = (
        weights(train(reward, *paths)) for reward in (tiny.reward, tiny.async_reward, tiny.async_reward)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name])  # whoever is faster
        torch.testing.assert_close(value, apart[name], rtol=0, atol=1e-5)


def test_the_teacher_is_done_before_the_reward(tmp_path, student_path, teacher_path):
    # Were the one to wait for the other, this would never end
    scored = threading.Event()

    async def reward_after_the_teacher(completion_ids, **kwargs):
        assert await asyncio.to_thread(scored.wait, timeout=60)
        return tiny.reward(completion_ids)

    config = tiny.make_config(tmp_path, max_steps=1)
    trainer = RLADTrainer(
        student_path, reward_after_the_teacher, config, tiny.make_dataset(), teacher_model=teacher_path
    )
    teacher = trainer.teacher_scorer.teachers[""]
    score, calls = teacher.score, []

    def signalled(*args):
        calls.append(threading.current_thread() is threading.main_thread())
        scores = score(*args)
        scored.set()
        return scores

    teacher.score = signalled
    trainer.train()
    assert calls == [False], "all rows were scored once, and ahead"
    assert trainer.state.log_history[0]["teacher/scoring_time"] < 1


@pytest.mark.parametrize("which", ["plain", "coroutine", "both"])
def test_the_teacher_scores_ahead_beside_a_coroutine_alone(which, tmp_path, student_path, teacher_path):
    # A plain function has the process to itself, and rows without an advantage cost nothing then
    def reward(completions, **kwargs):
        return [1.0] * len(completions)

    async def coroutine(completions, **kwargs):
        return [1.0] * len(completions)

    config = tiny.make_config(tmp_path, max_steps=1)
    rewards = {"plain": [reward], "coroutine": [coroutine], "both": [reward, coroutine]}[which]
    trainer = RLADTrainer(student_path, rewards, config, tiny.make_dataset(), teacher_model=teacher_path)
    teacher, calls = trainer.teacher_scorer.teachers[""], []
    score = teacher.score
    teacher.score = lambda *args: calls.append(args) or score(*args)
    trainer.train()
    assert bool(calls) == (which != "plain")


def test_teachers_that_score_ahead_take_turns():
    # They share the device
    teachers, inside, most = {"a": CountingTeacher(), "b": CountingTeacher()}, [], []
    both = threading.Event()

    def take(score):
        def taking(*args):
            inside.append(score)
            most.append(len(inside))
            both.set() if len(inside) == 2 else both.wait(0.2)
            inside.remove(score)
            return score(*args)

        return taking

    for teacher in teachers.values():
        teacher.score = take(teacher.score)
    rows = [RowScorer(teacher, Accelerator(cpu=True), 30) for teacher in teachers.values()]
    scorer = TeacherScorer(dict(zip(teachers, rows, strict=True)))
    scorer.begin([[4], [5]], [[6], [7]], [[1], [1]], teacher_ids=["a", "b"])
    with scorer.score_early():
        pass
    assert most == [1, 1]


def test_a_row_that_is_too_long_for_the_teacher_is_refused_ahead_too():
    teacher = CountingTeacher()
    teacher.name, teacher.length_remedy, teacher.max_length = "counting", "wait", 3
    scorer = tiny.make_scorer(teacher)
    scorer.begin([[4, 5]], [[6, 7]], [[1, 1]])
    with pytest.raises(ValueError, match="A rollout has 4 tokens"), scorer.score_early():
        pass
    assert not teacher.rows


@pytest.mark.parametrize("culprit", ["teacher", "reward"])
def test_errors_come_out_as_they_are(culprit, tmp_path, student_path, teacher_path):
    def fail(*args):
        raise RuntimeError("the teacher has failed")

    async def reward(completion_ids, **kwargs):
        if culprit == "reward":
            raise RuntimeError("the reward has failed")
        return tiny.reward(completion_ids)

    config = tiny.make_config(tmp_path, max_steps=1)
    trainer = RLADTrainer(student_path, reward, config, tiny.make_dataset(), teacher_model=teacher_path)
    if culprit == "teacher":
        trainer.teacher_scorer.teachers[""].score = fail
    with pytest.raises(RuntimeError, match=f"^the {culprit} has failed$"):
        trainer.train()


def score_ahead(teacher, batch, mask):
    scorer = tiny.make_scorer(teacher, 30)
    lists = [
        [ids[keep].tolist() for ids, keep in zip(batch[f"{part}_ids"], batch[f"{part}_mask"].bool(), strict=True)]
        for part in ("prompt", "completion")
    ]
    scorer.begin(*lists, [[1] * len(ids) for ids in lists[1]])
    with scorer.score_early():
        pass
    ahead = teacher.rows
    return ahead, scorer.score(batch, mask), scorer


def test_what_was_scored_ahead_is_not_scored_again():
    batch, teacher = make_batch(), CountingTeacher()
    wanted = batch["completion_mask"] * (torch.arange(7) % 2)[:, None]
    ahead, scores, scorer = score_ahead(teacher, batch, wanted)
    assert ahead == teacher.rows == 7  # whether a row has an advantage wasn't known
    assert torch.equal(scores["teacher_per_token_logps"], -wanted.float())
    # Nothing of it is kept for the next batch
    other = make_batch(seed=1, rows=5)
    for rows, each in ((5, other), (7, batch)):
        teacher.rows = 0
        scores = scorer.score(each, each["completion_mask"])
        assert teacher.rows == rows
        assert torch.equal(scores["teacher_per_token_logps"], -each["completion_mask"].float())


def test_a_sharded_teacher_waits():
    batch, teacher = make_batch(), CountingTeacher()
    teacher.is_sharded = True
    ahead, scores, _ = score_ahead(teacher, batch, batch["completion_mask"])
    assert ahead == 0 and teacher.rows == 7
    assert torch.equal(scores["teacher_per_token_logps"], -batch["completion_mask"].float())


def test_the_wait_for_early_scores_is_scoring_time():
    teacher, seconds = CountingTeacher(), 0.2
    score = teacher.score
    teacher.score = lambda *args: time.sleep(seconds) or score(*args)
    scorer = tiny.make_scorer(teacher)
    scorer.begin([[1]], [[2]], [[1]])
    with scorer.score_early():
        pass
    ids = {"prompt_ids": torch.tensor([[1]]), "completion_ids": torch.tensor([[2]])}
    batch = ids | {f"{part}_mask": torch.ones(1, 1) for part in ("prompt", "completion")}
    scorer.score(batch, torch.ones(1, 1))
    assert scorer.seconds > seconds / 2, "as the reward was there at once"
    teacher.score = score
    scorer.score(batch, torch.ones(1, 1))
    assert scorer.seconds < seconds / 2, "which is of the last call alone"


@pytest.mark.slow
def test_two_processes(tmp_path, student_path, teacher_path):
    paths = {"student": student_path, "teacher": teacher_path}
    apart, ahead = (launch(tmp_path / name, "ddp", **paths, reward=name) for name in ("reward", "async_reward"))
    assert_losses(ahead, apart)
