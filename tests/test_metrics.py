"""The values in the log, against plain passes of the models over what the reward function was shown."""

import pytest
import tiny
import twin

from trl_rlad import RLADTrainer


COEF, SUCCESS = 0.3, 0.5
# Logged when the rollouts are scored, and not with each use of them
ONCE = ("teacher/top1", "teacher/entropy", "teacher/named_mass")


@pytest.fixture(scope="module", params=["reverse", "forward"])
def run(request, tmp_path_factory, student_path, teacher_path):
    """Two steps on the same 16 rollouts. Returns their logs, the rows and the student and settings of each."""
    folder = tmp_path_factory.mktemp(request.param)
    k = 5 if request.param == "forward" else 0
    args = tiny.make_config(
        folder,
        teacher_kl=request.param,
        teacher_top_k=k or 8,
        teacher_kl_coef=COEF,
        teacher_kl_on="failed",
        success_reward=SUCCESS,
        per_device_train_batch_size=16,
        num_iterations=2,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    reward = twin.Watcher()
    trainer = RLADTrainer(student_path, reward, args, tiny.make_dataset(), teacher_model=teacher_path)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    old = twin.load(student_path)
    settings = {"old": old, "coef": COEF, "k": k, "success_reward": SUCCESS}
    (rows,) = reward.calls
    return logs, rows, [old, twin.load(folder / "checkpoint-1")], twin.load(teacher_path), settings


def test_every_metric_is_what_plain_passes_give(run):
    logs, rows, students, teacher, settings = run
    expected = [twin.log_of_step(rows, student, teacher, **settings) for student in students]
    twin.assert_logged(logs[0], expected[0])
    twin.assert_logged(logs[1], expected[1], leave_out=ONCE)
    # On something to tell apart: both ways of clipping, rows with and without the divergence
    assert (
        min(
            expected[1][f"clip_ratio/{side}_by_{cause}"] for side in ("low", "high") for cause in ("policy", "teacher")
        )
        > 0
    )
    assert {row["reward"] > SUCCESS for row in rows} == {True, False}
