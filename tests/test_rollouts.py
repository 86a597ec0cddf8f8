"""What a run writes down of its rollouts and metrics, in every place where a user looks."""

import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch

from trl_rlad import RLADTrainer
from trl_rlad.reports.metrics_table import MetricsTable
from trl_rlad.rollouts import describe_rollouts, read_rollouts, split_text


NAMED = {"teacher_kl_coef": 1.0, "teacher_kl": "forward"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, student_path):
    """A run of two steps on 16 rollouts each, with an evaluation after each, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    # A teacher that ends its turns otherwise, and so has no say on the student's last token
    tokenizer = tiny.make_tokenizer(eos_token="<end>")
    teacher_path = tiny.save_model(folder / "teacher", 1, tokenizer=tokenizer, hidden_size=24, vocab_size=40)
    args = tiny.make_config(
        folder,
        log_completions=True,
        num_completions_to_print=1,
        report_to="tensorboard",
        per_device_train_batch_size=16,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        temperature=0.7,
        **NAMED,
    )
    data = tiny.make_dataset()
    trainer = RLADTrainer(student_path, tiny.reward, args, data, data.select(range(4)), teacher_model=teacher_path)
    seen, inner = [], trainer.guide.guide

    def watch(logps, old, batch):
        guidance = inner(logps, old, batch)
        seen.append((logps, old, guidance.anchor, batch))
        return guidance

    trainer.guide.guide = watch
    trainer.train()
    return trainer, folder, seen


def test_the_records_are_what_the_loss_compared(run):
    trainer, folder, seen = run
    records = [record for record in read_rollouts(folder) if record["step"] == 2]
    assert len(records) == 16 and [record["row"] for record in records] == list(range(16))
    seen = [batch for batch in seen if "rollout" in batch[3]][-1:]  # the second step
    rows = {number.item(): (logps[i], old[i], anchor[i], {k: v[i] for k, v in batch.items() if torch.is_tensor(v) and v.dim()})
            for logps, old, anchor, batch in seen for i, number in enumerate(batch["rollout"])}  # fmt: skip
    kinds = set()
    for record in records:
        logps, old, anchor, batch = rows[record["row"]]
        length = int(batch["completion_mask"].sum())
        assert record["ids"] == batch["completion_ids"][:length].tolist() and record["group"] == record["row"] // 4
        assert record["advantage"] == pytest.approx(batch["advantages"].item())
        assert record["logps"] == pytest.approx(logps[:length].tolist())
        for t in range(length):
            has_say = bool(batch["teacher_mask"][t])
            assert record["teacher_logps"][t] == (
                pytest.approx(batch["teacher_per_token_logps"][t].item()) if has_say else None
            )
            ratio, policy_ratio = ((logps - other)[t].exp().item() for other in (anchor, old))
            high, low = (record["advantage"] > 0, record["advantage"] < 0)
            is_clipped = (high and ratio > 1.28) or (low and ratio < 0.8)
            by_policy = (high and policy_ratio > 1.28) or (low and policy_ratio < 0.8)
            expected = 0 if not is_clipped else 2 if by_policy else 1
            assert record["clipped"][t] == expected
            kinds.add(expected)
        assert record["reward"] == pytest.approx(tiny.reward([record["ids"]])[0])
    assert kinds == {0, 1}  # on the first update the policy is where it was
    assert any(None in record["teacher_logps"] for record in records)


def test_the_table_of_completions_has_the_mean_log_ratio(run):
    _, folder, _ = run
    table = pd.read_parquet(folder / "completions" / "completions_00002.parquet")
    # The last evaluation has overwritten TRL's table of its step with rows of its own
    assert table["teacher_log_ratio"].isna().all()


def test_the_column_follows_the_rows(make_trainer):
    trainer = make_trainer(
        log_completions=True, num_completions_to_print=0, max_steps=1, per_device_train_batch_size=8
    )
    trainer.train()
    table = pd.read_parquet(Path(trainer.args.output_dir) / "completions" / "completions_00001.parquet")
    special = trainer.tokenizer.all_special_tokens
    for record in read_rollouts(trainer.args.output_dir):
        gaps = [s - t for s, t in zip(record["logps"], record["teacher_logps"], strict=True) if t is not None]
        row = table.iloc[record["row"]]
        assert row["completion"].split() == [text.strip() for text in record["tokens"] if text.strip() not in special]
        if gaps:
            assert row["teacher_log_ratio"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-3)
        else:
            assert pd.isna(row["teacher_log_ratio"])
        assert row["advantage"] == pytest.approx(record["advantage"], abs=1e-4)


def test_no_file_without_being_asked(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert not (Path(trainer.args.output_dir) / "rollouts").exists() and trainer.rollout_log is None


def test_text_of_tokens():
    tokenizer = tiny.make_chat_tokenizer()
    ids = tokenizer("aé b")["input_ids"]  # é is two tokens of one byte each
    pieces = split_text(ids, tokenizer)
    assert len(pieces) == len(ids) == 5 and pieces[0] == "a" and pieces[3:] == [" ", "b"]
    words = tiny.make_tokenizer()
    assert split_text(words("w1 w2")["input_ids"], words) == ["w1", " w2"] and split_text([], words) == []


def test_padding_is_left_out():
    batch = {
        "prompt_ids": torch.tensor([[0, 5], [6, 7]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[8, 0], [9, 1]]),
        "completion_mask": torch.tensor([[1, 0], [1, 1]]),
    }
    columns = {"x": torch.tensor([[0.5, 3.0], [float("nan"), 4.0]]), "y": torch.tensor([1, 2])}
    first, second = describe_rollouts(batch, tiny.make_tokenizer(), columns)
    assert first == {"prompt": "w1", "ids": [8], "tokens": ["w4"], "x": [0.5], "y": 1}
    assert second == {"prompt": "w2 w3", "ids": [9, 1], "tokens": ["w5", " <eos>"], "x": [None, 4.0], "y": 2}


def test_metrics_reach_tensorboard_by_their_documented_names(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, folder, _ = run
    events = EventAccumulator(str(next(folder.glob("runs/*"))))
    events.Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    ours = {name for name in log[0] if name.startswith(("teacher/", "clip_ratio/")) or name == "generation_time"}
    for name in ours:
        assert scalars[f"train/{name}"] == pytest.approx([entry[name] for entry in log]), name
    assert {"eval/teacher/log_ratio", "eval/rewards/reward/pass@1"} <= scalars.keys()
    documented = re.findall(r"`([\w/@]+)`", (Path(__file__).parents[1] / "README.md").read_text())
    trls = {f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
    assert ours - trls <= set(documented)


def test_gap_by_the_sign_of_the_advantage_and_what_the_teacher_names(run):
    trainer, folder, _ = run
    log = [entry for entry in trainer.state.log_history if "reward" in entry][-1]
    records = [record for record in read_rollouts(folder) if record["step"] == 2]
    for name, sign in (("rewarded", 1), ("punished", -1)):
        gaps = [
            s - t
            for record in records
            if sign * record["advantage"] > 0
            for s, t in zip(record["logps"], record["teacher_logps"], strict=True)
            if t is not None
        ]
        assert log[f"teacher/log_ratio_{name}"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
    assert 0.0 < log["teacher/entropy"] < 3.7 and 0.0 <= log["teacher/top1"] <= 1.0  # log(40) = 3.69


def test_table_in_the_terminal(capsys):
    table = MetricsTable(steps=2)
    logs = [
        {"reward": 1.0, "teacher/kl": None},
        {"reward": 2.0},
        {"eval_reward": 9.0},
        {"reward": 4.0},
        {"reward": 5.0},
    ]
    for step, entry in zip((1, 2, 2, 3, 4), logs, strict=True):
        table.on_log(
            None, SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=4), None, logs=entry
        )
    printed = capsys.readouterr().out
    assert re.findall(r"Step \d of 4|reward +[\d.+ ]+\d", printed) == [
        "Step 2 of 4", "reward  1.500", "Step 4 of 4", "reward  4.500  +3.000"
    ]  # fmt: skip


def test_advantages_are_recorded_as_the_reward_gave_them(make_trainer):
    # Distillation takes them out of the loss, and not out of what is written down
    trainer = make_trainer(
        log_completions=True, num_completions_to_print=0, max_steps=1, distillation_fraction=1.0, num_generations=4
    )
    seen = tiny.watch_batches(trainer)
    trainer.train()
    ((batch, _),) = seen
    records = read_rollouts(trainer.args.output_dir)
    expected = [batch["advantages"][record["row"]].item() for record in records]
    assert [record["advantage"] for record in records] == pytest.approx(expected) and any(expected)
