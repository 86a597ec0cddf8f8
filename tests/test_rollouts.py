"""What a run writes down of its rollouts and metrics, in every place where a user looks."""

import re
from math import exp, log
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from trl_rlad import RLADTrainer, rollout_log
from trl_rlad.reports.metrics_table import MetricsTable
from trl_rlad.rollout_log import describe_rollouts, split_text
from trl_rlad.rollouts import choose_groups, log_ratios, read_rollouts


NAMED = {"teacher_kl_coef": 1.0, "teacher_kl": "forward"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, student_path):
    """A run of two steps on 16 rollouts each, with an evaluation after the second, and its folder."""
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
        eval_steps=2,
        temperature=0.7,
        **NAMED,
    )
    data = tiny.make_dataset()
    trainer = RLADTrainer(student_path, tiny.reward, args, data, data.select(range(4)), teacher_model=teacher_path)
    trainer.train()
    return trainer, folder


def read_training(folder):
    return [record for record in read_rollouts(folder) if record["split"] == "train"]


def logps_of(model, prompt, ids, temperature=1.0):
    """Of all tokens in each place of a completion, by a model alone: `(T, V)`."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def test_the_records_are_what_the_models_say(run, student_path):
    _, folder = run
    records = [record for record in read_training(folder) if record["step"] == 1]
    assert len(records) == 16 and [record["row"] for record in records] == list(range(16))
    student, teacher = map(AutoModelForCausalLM.from_pretrained, (student_path, folder / "teacher"))
    tokenizer, kinds = tiny.make_tokenizer(), set()
    rewards = [tiny.reward([record["ids"]])[0] for record in records]
    for record in records:
        row, ids = record["row"], record["ids"]
        assert record["group"] == row // 4 and record["reward"] == pytest.approx(rewards[row])
        group = rewards[row // 4 * 4 : row // 4 * 4 + 4]
        assert record["advantage"] == pytest.approx((rewards[row] - mean(group)) / (stdev(group) + 1e-4), abs=1e-3)
        prompt = tokenizer(record["prompt"])["input_ids"]
        mine, theirs = (
            logps_of(model, prompt, ids, 0.7)[range(len(ids)), ids].tolist() for model in (student, teacher)
        )
        assert record["logps"] == pytest.approx(mine, abs=1e-4)
        for t, id in enumerate(ids):
            has_say = id != 1  # which ends the student's turn
            assert record["teacher_logps"][t] == (pytest.approx(theirs[t], abs=1e-4) if has_say else None)
            # On the first update the policy is where it was: the ratio is to the teacher alone, within a bound of 1
            ratio = exp(0.5 * min(max(mine[t] - theirs[t], -1.0), 1.0)) if has_say else 1.0
            is_clipped = ratio > 1.28 if record["advantage"] > 0.0 else record["advantage"] < 0.0 and ratio < 0.8
            assert record["clipped"][t] == is_clipped
            kinds.add((has_say, is_clipped))
    assert kinds == {(True, True), (True, False), (False, False)}


def mean_gap(record):
    gaps = [s - t for s, t in zip(record["logps"], record["teacher_logps"], strict=True) if t is not None]
    return sum(gaps) / len(gaps) if gaps else None


def test_the_table_of_completions_has_the_mean_log_ratio(run):
    _, folder = run
    first, second = (pd.read_parquet(folder / "completions" / f"completions_0000{step}.parquet") for step in (1, 2))
    records = {record["row"]: record for record in read_training(folder) if record["step"] == 1}
    gaps = {row: gap for row, record in records.items() if (gap := mean_gap(record)) is not None}
    assert len(gaps) >= 12 and len({round(gap, 2) for gap in gaps.values()}) >= 10
    assert first["teacher_log_ratio"][list(gaps)].to_dict() == pytest.approx(gaps, abs=1e-3)
    # The evaluation has overwritten TRL's table of its step with rows of its own
    assert second["teacher_log_ratio"].isna().all()


def test_an_evaluation_in_the_middle_of_a_generation_batch_leaves_its_rows_apart(tmp_path, student_path, teacher_path):
    settings = {"max_steps": 2, "num_iterations": 2, "eval_strategy": "steps", "eval_steps": 1}
    args = tiny.make_config(tmp_path, log_completions=True, num_completions_to_print=0, **settings)
    data = tiny.make_dataset(4)
    RLADTrainer(student_path, tiny.reward, args, data, data, teacher_model=teacher_path).train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    # TRL's table has the evaluation's rows now; the rollouts are still those of both steps
    assert table["teacher_log_ratio"].isna().all()
    first, second = ([r for r in read_training(tmp_path) if r["step"] == step] for step in (1, 2))
    assert first and [r["ids"] for r in first] == [r["ids"] for r in second]


def test_what_no_reward_function_can_judge_has_no_reward(tmp_path, student_path, teacher_path):
    def judge_some(completion_ids, **kwargs):
        return [None if i % 4 == 1 else float(i % 4 == 2) for i in range(len(completion_ids))]

    args = tiny.make_config(tmp_path, log_completions=True, num_completions_to_print=0, max_steps=1)
    RLADTrainer(student_path, judge_some, args, tiny.make_dataset(), teacher_model=teacher_path).train()
    records = read_rollouts(tmp_path)
    assert [record["reward"] for record in records] == [0.0, None, 1.0, 0.0]
    assert [record["solved"] for record in records] == [False, None, True, False]
    assert records[0]["rewards"] == [0.0, None, 1.0, 0.0]


def signal_by_length(prompts, completion_ids, **kwargs):
    """None for prompts of two words."""
    return [
        0.0 if len(p.split()) == 2 else value for p, value in zip(prompts, tiny.reward(completion_ids), strict=True)
    ]


def test_a_few_groups_of_each_kind_are_written_and_the_whole_table_is_filled(tmp_path, student_path):
    # A teacher so like the student that some rows have a negative mean
    teacher_path = tiny.save_model(tmp_path / "teacher", seed=0, scale=0.33)
    args = tiny.make_config(
        tmp_path, log_completions=True, num_completions_to_print=0, max_steps=1, per_device_train_batch_size=32
    )
    rewards = [signal_by_length, tiny.reward]
    args.reward_weights = [1.0, 0.0]  # the second is only logged
    RLADTrainer(student_path, rewards, args, tiny.make_dataset(), teacher_model=teacher_path).train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert (tmp_path / "_rollouts" / "rollouts_00001.parquet").exists()  # in the order of the steps
    records = read_rollouts(tmp_path)
    kinds = {record["group"]: record["kind"] for record in records}
    assert [(r["step"], r["group"], r["row"]) for r in records] == [
        (1, group, 4 * group + i) for group in kinds for i in range(4)
    ]
    of_rows = table["signal_by_length"] > 0.0
    solved = {group: set(of_rows[4 * group : 4 * group + 4]) for group in range(8)}
    for kind, outcome in (("failed", {False}), ("solved", {True})):
        left = [group for group in range(8) if solved[group] == outcome and kinds.get(group) != "changed most"]
        mine = [group for group in kinds if kinds[group] == kind]
        assert len(mine) == min(2, len(left)) and set(mine) <= set(left)
    assert [sum(of_group == kind for of_group in kinds.values()) for kind in ("changed most", "random")] == [2, 2]
    tokenizer = tiny.make_tokenizer()
    for record in records:
        row = table.iloc[record["row"]]
        assert record["prompt"] == row["prompt"]
        assert tokenizer.decode(record["ids"], skip_special_tokens=True) == row["completion"]
        assert "".join(record["tokens"]) == tokenizer.decode(record["ids"])
        assert record["reward"] == pytest.approx(row["signal_by_length"])
        assert record["advantage"] == pytest.approx(row["advantage"], abs=1e-4)
        expected = pytest.approx(mean_gap(record) or float("nan"), abs=1e-3, nan_ok=True)
        assert row["teacher_log_ratio"] == expected
    assert (table["teacher_log_ratio"] < 0.0).any() and (table["teacher_log_ratio"] > 0.0).any()
    # The teacher is asked where there is an advantage, of all groups
    assert (table["teacher_log_ratio"].notna() == (table["advantage"] != 0.0)).all()


def test_what_has_clipped_a_token_when_the_student_has_moved(make_trainer, student_path, teacher_path):
    # Both steps are on the rollouts of the first, and the student has left its old policy in between
    trainer = make_trainer(
        log_completions=True,
        num_completions_to_print=0,
        num_iterations=2,
        max_steps=2,
        per_device_train_batch_size=16,
        save_strategy="steps",
        save_steps=1,
        alpha=0.5,
    )
    trainer.train()
    tokenizer, moved_path = tiny.make_tokenizer(), f"{trainer.args.output_dir}/checkpoint-1"
    before, after, teacher = map(AutoModelForCausalLM.from_pretrained, (student_path, moved_path, teacher_path))
    counts = {1: [0, 0, 0], 2: [0, 0, 0]}
    for record in read_rollouts(trainer.args.output_dir):
        prompt = tokenizer(record["prompt"])["input_ids"]
        models = (before, before if record["step"] == 1 else after, teacher)
        ids = record["ids"]
        old, now, theirs = (logps_of(model, prompt, ids)[range(len(ids)), ids].tolist() for model in models)
        assert record["logps"] == pytest.approx(now, abs=1e-4)
        for t, clipped in enumerate(record["clipped"]):
            if record["teacher_logps"][t] is None:
                assert clipped == 0
                continue
            assert record["teacher_logps"][t] == pytest.approx(theirs[t], abs=1e-4)
            near = min(max(theirs[t], now[t] - 1.0), now[t] + 1.0)
            ratios = exp(now[t] - (old[t] + near) / 2), exp(now[t] - old[t])
            is_out = [ratio > 1.28 if record["advantage"] > 0 else ratio < 0.8 for ratio in ratios]
            assert clipped == (0 if not is_out[0] else 2 if is_out[1] else 1)
            counts[record["step"]][clipped] += 1
    assert counts[1][1] and not counts[1][2] and all(counts[2])


def test_a_run_with_a_teacher_writes_its_rollouts_and_nothing_in_the_terminal(make_trainer, capsys):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert len(read_rollouts(trainer.args.output_dir)) == 4 and "Advantage" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings", [{"log_rollouts": False, "log_completions": True}, {"alpha": 1.0}], ids=["off", "grpo"]
)
def test_no_file_without_a_teacher_or_with_the_flag_off(settings, make_trainer):
    trainer = make_trainer(max_steps=1, num_completions_to_print=0, **settings)
    trainer.train()
    assert not (Path(trainer.args.output_dir) / "_rollouts").exists() and trainer.rollout_log is None


def test_text_of_tokens():
    tokenizer = tiny.make_chat_tokenizer()
    ids = tokenizer("aé b")["input_ids"]  # é is two tokens of one byte each
    pieces = split_text(ids, tokenizer)
    assert len(pieces) == len(ids) == 5 and pieces[0] == "a" and pieces[3:] == [" ", "b"]
    words = tiny.make_tokenizer()
    assert split_text(words("w1 w2")["input_ids"], words) == ["w1", " w2"] and split_text([], words) == []


def test_half_a_character_has_a_text_of_its_own():
    tokenizer = tiny.make_chat_tokenizer()
    halves = tokenizer("é")["input_ids"]
    assert tokenizer.decode(halves) == "é" and len(halves) == 2
    assert split_text(halves, tokenizer) == [tokenizer.decode(half) for half in halves]


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

    trainer, folder = run
    events = EventAccumulator(str(next(folder.glob("runs/*"))))
    events.Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    ours = {name for name in log[0] if name.startswith(("teacher/", "clip_ratio/")) or name == "generation_time"}
    for name in ours:
        assert scalars[f"train/{name}"] == pytest.approx([entry[name] for entry in log]), name
    assert {"eval/teacher/log_ratio", "eval/rewards/reward/pass@1"} <= scalars.keys()
    documented = re.findall(r"`([\w/@]+)`", (Path(__file__).parents[1] / "docs/metrics.md").read_text())
    trls = {f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
    assert ours - trls <= set(documented)


def test_gap_by_the_sign_of_the_advantage_and_what_the_teacher_names(run):
    trainer, folder = run
    log = [entry for entry in trainer.state.log_history if "reward" in entry][-1]
    records = [record for record in read_training(folder) if record["step"] == 2]
    for name, sign in (("rewarded", 1), ("punished", -1)):
        gaps = [
            s - t
            for record in records
            if sign * record["advantage"] > 0
            for s, t in zip(record["logps"], record["teacher_logps"], strict=True)
            if t is not None
        ]
        assert log[f"teacher/log_ratio_{name}"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)


def test_entropy_and_top1_are_those_of_the_teacher_alone(run):
    trainer, folder = run
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "teacher"), tiny.make_tokenizer()
    # It names 8 tokens, and of these the student isn't told those at which either ends its turn, or that it doesn't
    # know
    shared = torch.tensor([id not in (1, 2) and id < 32 for id in range(40)])
    for logged in (entry for entry in trainer.state.log_history if "reward" in entry):
        entropies, is_top1 = [], []
        for record in (record for record in read_training(folder) if record["step"] == logged["step"]):
            prompt, ids = tokenizer(record["prompt"])["input_ids"], record["ids"]
            logps = logps_of(teacher, prompt, ids, 0.7)
            for row, id, teacher_logp in zip(logps, ids, record["teacher_logps"], strict=True):
                if teacher_logp is None:
                    continue
                named = row.topk(8).indices
                named = named[shared[named]]
                shares = row.exp()[named].tolist()
                entropies.append(-sum(p * log(p) for p in [*shares, 1 - sum(shares)]))
                is_top1.append(row.argmax().item() == id and shared[id].item())  # what isn't named isn't counted
        assert logged["teacher/entropy"] == pytest.approx(mean(entropies), abs=1e-4)
        assert logged["teacher/top1"] == pytest.approx(mean(is_top1), abs=1e-4)
        assert 0 < sum(is_top1) < len(is_top1)


def test_table_in_the_terminal(capsys):
    table = MetricsTable(steps=2)
    logs = [
        {"reward": 1.0, "teacher/kl": None},
        {"reward": 2.0},
        {"eval_reward": 9.0},
        {"reward": 4.0},
        {"reward": 5.0},
        {"reward": 3.0},
    ]
    states = [
        SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=6) for step in (1, 2, 2, 3, 4, 6)
    ]
    for state, entry in zip(states, logs, strict=True):
        table.on_log(None, state, None, logs=entry)
    printed = capsys.readouterr().out
    assert re.findall(r"Step \d of 6|reward +[\d.+ -]+\d", printed) == [
        "Step 2 of 6", "reward  1.500", "Step 4 of 6", "reward  4.500  +3.000", "Step 6 of 6", "reward  3.000  -1.500"
    ]  # fmt: skip
    # A resumed run has its first one after as many steps, and one process prints
    table = MetricsTable(steps=2)
    table.on_train_begin(None, states[3], None)
    table.on_log(None, states[4], None, logs={"reward": 1.0})
    table.on_log(None, SimpleNamespace(is_world_process_zero=False, global_step=9, max_steps=9), None, logs=logs[0])
    assert not capsys.readouterr().out


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
    # And nothing of a generation batch stays for the next
    log = trainer.rollout_log
    assert log.watched["train"].rows and log.log_ratios
    trainer.model.train()
    log.number(batch, torch.zeros(4))
    assert not log.watched["train"].rows and not log.log_ratios


def test_groups_of_each_kind():
    parts = {0: 0.1, 1: 0.9, 2: 0.5, 3: 0.8, 4: 0.2, 5: 0.7, 6: 0.3, 7: 0.4, 8: 0.0}
    wrong, right = [False, None, False], [True, True, True]
    solved = {0: wrong, 1: right, 2: [True, False, None], 3: wrong, 4: wrong, 5: right, 6: right, 7: wrong, 8: right}
    chosen = choose_groups(parts, solved, seed=1)
    assert [group for group, kind in chosen.items() if kind == "changed most"] == [1, 3]
    # The most changed of those that are left
    assert [group for group, kind in chosen.items() if kind == "failed"] == [7, 4]
    assert [group for group, kind in chosen.items() if kind == "solved"] == [5, 6]
    drawn = [{g for g, kind in choose_groups(parts, solved, seed).items() if kind == "random"} for seed in range(20)]
    assert all(len(groups) == 2 for groups in drawn) and set().union(*drawn) == {0, 2, 8}
    assert choose_groups(parts, solved, 3) == choose_groups(parts, solved, 3)
    assert choose_groups({4: 1.0}, {4: [None, None]}, 0) == {4: "changed most"}


def test_what_the_teacher_names_and_its_part_in_the_loss_are_kept(run):
    trainer, folder = run
    records, tokenizer = read_training(folder), tiny.make_tokenizer()
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    shared = torch.tensor([id not in (1, 2) and id < 32 for id in range(40)])
    seen = 0
    for record in records:
        if not record["named"]:
            assert record["solved"]
            continue
        logps = logps_of(teacher, tokenizer(record["prompt"])["input_ids"], record["ids"], 0.7)
        for row, teacher_logp, named, named_logps in zip(
            logps, record["teacher_logps"], record["named"], record["named_logps"], strict=True
        ):
            values, ids = row.topk(3)
            likely = [
                (i, x) for i, x in zip(ids.tolist(), values.tolist(), strict=True) if shared[i] and x > log(0.01)
            ]
            likely = likely if teacher_logp is not None else []
            assert named == [tokenizer.decode([i]) for i, _ in likely]
            assert named_logps == pytest.approx([x for _, x in likely], abs=1e-3)
            seen += len(named)
    assert seen > 20
    # Of the part, what isn't the change of GRPO's objective is the divergence, whose mean is logged
    divergences = []
    for record in (record for record in records if record["step"] == 1):
        advantage = record["advantage"]
        for gap, part in zip(log_ratios(record), record["part"], strict=True):
            if gap is not None:
                ratio = exp(0.5 * min(max(gap, -1.0), 1.0))
                objective = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
                divergences.append(part - abs(objective - advantage))
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert mean(divergences) == pytest.approx(logged["teacher/kl"], rel=1e-3)


def test_an_evaluation_leaves_rollouts_of_its_own(run):
    _, folder = run
    records = [record for record in read_rollouts(folder) if record["split"] == "eval"]
    assert {record["step"] for record in records} == {2} and len({record["prompt"] for record in records}) == 4
    assert [record["row"] for record in records] == list(range(len(records)))
    assert all(record["reward"] == pytest.approx(tiny.reward([record["ids"]])[0]) for record in records)
    assert (folder / "_rollouts" / "rollouts_00002_eval.parquet").exists()


def test_memory_and_files_are_bounded(make_trainer, monkeypatch):
    monkeypatch.setattr(rollout_log, "WATCHED", 40)
    monkeypatch.setattr(rollout_log, "TOKENS", 20)
    monkeypatch.setattr(rollout_log, "FILES", 2)
    trainer = make_trainer(max_steps=4, per_device_train_batch_size=16)
    trainer.train()
    watched = trainer.rollout_log.watched["train"]
    assert 0 < watched.tokens <= 40 and {row // 4 for row in watched.rows} == watched.groups
    records = read_rollouts(trainer.args.output_dir)
    assert {record["step"] for record in records} == {1, 3}  # two files of four logs
    for step in (1, 3):
        mine = [record for record in records if record["step"] == step]
        groups = {record["group"] for record in mine}
        assert sum(len(record["ids"]) for record in mine) <= 20 or len(mine) == len(groups)
        assert all(len(record["rewards"]) == 4 for record in mine)
    # What a longer run has left in this folder isn't taken for this one's
    folder = Path(trainer.args.output_dir) / "_rollouts"
    (folder / "rollouts_00009.parquet").touch()
    trainer.rollout_log.on_train_begin(trainer.args, SimpleNamespace(is_world_process_zero=True, global_step=1))
    assert [file.name for file in folder.iterdir()] == ["rollouts_00001.parquet"]
