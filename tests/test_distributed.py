"""Two real processes on CPU (gloo), started as a user would, against one process or plain data parallelism."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch
import twin
import yaml
from distributed_worker import make_ragged_batch
from peft import LoraConfig, PeftModel, get_peft_model
from teacher_server import TeacherServer, right, status
from test_probe import SCRIPT
from test_routing import assert_scores as assert_own_scores
from test_teacher_scorer import assert_names, naive_scores
from transformers import AutoModelForCausalLM

from trl_rlad.rollouts import read_rollouts


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "accelerate_configs"
pytestmark = pytest.mark.slow


def launch(output_dir, config, check=True, worker="distributed_worker.py", processes=2, **options):
    """Run a worker in several processes: by `torchrun`, or by `accelerate launch` with one of our configs, on CPU."""
    output_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m"]
    if config == "ddp":
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    else:
        settings = yaml.safe_load((CONFIGS / f"{config.replace('zero0', 'zero1')}.yaml").read_text())
        settings |= {"num_processes": processes, "use_cpu": True, "mixed_precision": "no"}
        if config == "zero0":
            settings["deepspeed_config"]["zero_stage"] = 0
        Path(output_dir, "config.yaml").write_text(yaml.dump(settings))
        command += ["accelerate.commands.launch", "--config_file", str(output_dir / "config.yaml")]
        command += ["--main_process_port", "0"]
    command += [str(TESTS / worker), json.dumps({"output_dir": str(output_dir), **options})]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if not check:
        return run
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(Path(output_dir, f"result_{rank}.json").read_text()) for rank in range(processes)]


TEACHER = {"seed": 1, "hidden_size": 24, "vocab_size": 40, "layers": 8}


@pytest.fixture(scope="module")
def paths(student_path, tmp_path_factory):
    return {"student": student_path, "teacher": tiny.save_model(tmp_path_factory.mktemp("deep"), **TEACHER)}


SAVED = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory, paths):
    """The same steps by two processes that each hold everything."""
    return launch(tmp_path_factory.mktemp("ddp"), "ddp", **paths, **SAVED)


def assert_scores(results, teacher_path):
    # Rank 0 had ten times the rows of rank 1, but they were dealt out
    least, most = sorted(result["tokens"] for result in results)
    assert most <= 1.1 * least
    for rank, result in enumerate(results):
        expected = naive_scores(teacher_path, make_ragged_batch(rank), temperature=1.0)
        torch.testing.assert_close(torch.tensor(result["scores"]), expected, rtol=0, atol=1e-5)


def assert_losses(results, expected, rel=1e-4):
    # Adam at a learning rate of 0.01 magnifies the order of float32 sums from step to step
    assert results[0]["losses"].keys() == expected[0]["losses"].keys()
    for step, loss in expected[0]["losses"].items():
        assert results[0]["losses"][step] == pytest.approx(loss, rel=rel, abs=1e-5), step


def students_of(folder, student, steps=3):
    """The student of each step of a run that was saved after each."""
    return [twin.load(path) for path in (student, *(folder / f"checkpoint-{step}" for step in range(1, steps)))]


def adapted_students_of(folder, student):
    """The same of a student that trains an adapter, which in the beginning changes nothing."""
    adapted = [PeftModel.from_pretrained(twin.load(student), folder / f"checkpoint-{step}") for step in (1, 2)]
    return [twin.load(student), *adapted]


def assert_twins(results, students, teacher, **kwargs):
    """
    Each step has the loss and the metrics that plain passes over the rows of both ranks give, and both ranks log them.
    """
    for step, student in enumerate(students):
        rows = [row for result in results for row in result["rows"][step]]
        assert len(rows) == 8
        expected = twin.log_of_step(rows, student, teacher, **kwargs)
        for result in results:
            twin.assert_logged(result["logs"][step], expected)


def test_data_parallel(unsharded, paths):
    assert unsharded[0]["teacher"] == "LocalTeacher" and len(unsharded[0]["losses"]) == 3
    assert_scores(unsharded, paths["teacher"])
    assert_twins(unsharded, students_of(Path(unsharded[0]["folder"]), paths["student"]), twin.load(paths["teacher"]))


def test_wherever_rows_are_scored_not_a_bit_differs(tmp_path, paths):
    other = tiny.save_model(tmp_path / "other", seed=2, hidden_size=32)
    results = launch(tmp_path, "ddp", worker="exchange_worker.py", processes=4, teacher=paths["teacher"], other=other)
    for result in results:
        assert len(result) == 5 and all(case["equal"] and case["rows"] >= 8 for case in result.values()), results
    for case in ("one teacher", "named tokens", "slices"):  # rank 0 had three quarters of the rows, and rank 2 none
        least, *_, most = sorted(result[case]["tokens"] for result in results)
        assert least > 0 and most <= 2 * least, results


@pytest.mark.parametrize("student_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("teacher_stage", [0, 3])
def test_zero(student_stage, teacher_stage, tmp_path, paths, unsharded):
    results = launch(tmp_path, f"zero{student_stage}", **paths, teacher_zero_stage=teacher_stage)
    assert_scores(results, paths["teacher"])
    assert_losses(results, unsharded)
    assert results[0]["teacher"] == ("ZeRO3Teacher" if teacher_stage == 3 else "LocalTeacher")
    if teacher_stage == 3:
        # Besides the layer that runs, DeepSpeed holds the next ones, which it has fetched ahead
        limit = 0.6 * tiny.make_model(**TEACHER).num_parameters()
        assert all(0 < result["most_parameters"] < limit for result in results), "a full copy of the teacher"


def test_zero3_with_everything_offloaded(tmp_path, paths, unsharded):
    results = launch(tmp_path, "zero3_offload", **paths, teacher_offload="cpu")
    assert_scores(results, paths["teacher"])
    assert_losses(results, unsharded)


def test_fsdp2(tmp_path, paths, unsharded):
    results = launch(tmp_path, "ddp", fsdp="no", **paths)
    assert results[0]["teacher"] == "FSDPTeacher"
    assert_scores(results, paths["teacher"])
    assert_losses(results, unsharded)
    limit = 0.7 * tiny.make_model(**TEACHER).num_parameters()  # half of all, a whole layer, and the two ends
    assert all(result["most_parameters"] < limit for result in results), "a full copy of the teacher"


@pytest.mark.parametrize("way", ["ddp", "zero3", "fsdp2"])
def test_a_teacher_with_another_tokenizer(way, tmp_path, paths):
    renamed = tiny.save_renamed(tmp_path / "renamed", paths["teacher"])
    options = {"student": paths["student"], "teacher": renamed} | ({"fsdp": "no"} if way == "fsdp2" else {})
    results = launch(tmp_path / "run", "ddp" if way == "fsdp2" else way, **options)
    classes = {"ddp": "LocalTeacher", "zero3": "ZeRO3Teacher", "fsdp2": "FSDPTeacher"}
    assert results[0]["teacher"] == classes[way]
    for rank, result in enumerate(results):
        batch, scores = make_ragged_batch(rank), torch.tensor(result["scores"])
        known = batch["completion_mask"].bool() & ~torch.isin(batch["completion_ids"], torch.tensor([0, 3]))
        expected = naive_scores(paths["teacher"], batch, temperature=1.0)
        torch.testing.assert_close(scores, expected.where(known, 0.0), rtol=0, atol=1e-5)
        assert all(log["teacher/unaligned"] < 0.5 for log in result["logs"])


@pytest.mark.parametrize("way", ["zero3", "fsdp2"])
def test_a_sharded_adapter(way, tmp_path, paths):
    # On the LM head too, which is then asked for all its logits: that is tried by both processes at once
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=2, init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(paths["teacher"])
    # With the base's own head in its file, ZeRO-3 couldn't load it
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    options = {"student": paths["student"], "teacher": str(tmp_path / "adapter")}
    options |= {"fsdp": "no"} if way == "fsdp2" else {}
    results = launch(tmp_path / "run", "ddp" if way == "fsdp2" else way, **options)
    assert results[0]["teacher"] == ("FSDPTeacher" if way == "fsdp2" else "ZeRO3Teacher")
    assert_scores(results, tmp_path / "adapter")


def test_fsdp2_in_bf16_scores_in_float32(tmp_path, paths):
    results = launch(tmp_path, "ddp", fsdp="bf16", **paths)
    for rank, result in enumerate(results):
        scores = torch.tensor(result["scores"])
        expected = naive_scores(paths["teacher"], make_ragged_batch(rank), temperature=1.0)
        assert 0 < (scores - expected).abs().mean() < 0.1
        assert (scores != scores.bfloat16().float()).any(), "rounded on the way out"


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_the_students_own_base_as_teacher(config, tmp_path, paths):
    results = launch(tmp_path, config, student=paths["student"], teacher="base", lora=True, **SAVED)
    assert results[0]["teacher"] == "OwnBaseTeacher" and len(results[0]["losses"]) == 3
    assert_twins(results, adapted_students_of(tmp_path, paths["student"]), twin.load(paths["student"]))
    # The adapter has moved the student, and not the teacher
    assert abs(results[0]["logs"][2]["teacher/log_ratio"]) > 1e-3


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_student_as_its_own_teacher(config, lora, tmp_path, paths):
    results = launch(tmp_path, config, student=paths["student"], teacher="self", lora=lora, **SAVED)
    assert results[0]["teacher"] == "OwnTeacher" and len(results[0]["losses"]) == 3
    students = (adapted_students_of if lora else students_of)(tmp_path, paths["student"])
    for step, student in enumerate(students):  # each step's own
        rows = [row for result in results for row in result["rows"][step]]
        assert len(rows) == 8 and all(row["teacher_prompt"] == f"w1 w2 {row['prompt']}" for row in rows)
        for result in results:
            twin.assert_logged(result["logs"][step], twin.log_of_step(rows, student, student))


def test_the_student_as_its_own_teacher_in_shards_of_fsdp2(tmp_path, paths):
    # By its parts alone: on CPU, a launch by FSDP shards no student
    results = launch(tmp_path, "ddp", fsdp="no", student=paths["teacher"], teacher="self", max_steps=1)
    assert results[0]["teacher"] == "OwnTeacher"
    assert_scores(results, paths["teacher"])
    limit = 0.7 * tiny.make_model(**TEACHER).num_parameters()
    assert all(result["most_parameters"] < limit for result in results), "a full copy of the student"


def test_a_teacher_that_lags_behind_the_student(tmp_path, paths):
    lag = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 1, "beta": 1e-3}
    results = launch(tmp_path, "zero3", student=paths["student"], teacher="self", **lag, **SAVED)
    teacher = twin.load(paths["student"])
    for step, student in enumerate(students_of(tmp_path, paths["student"])):
        for mine, now in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.data.lerp_(now.data, 0.25)
        rows = [row for result in results for row in result["rows"][step]]
        for result in results:  # the loss has TRL's divergence from the reference in it
            expected = twin.log_of_step(rows, student, teacher)
            twin.assert_logged(result["logs"][step], expected, leave_out=["loss"])


def test_named_tokens_of_the_student_itself(tmp_path, paths):
    results = launch(tmp_path, "zero3", student=paths["student"], teacher="self", **NAMED, **SAVED)
    for step, student in enumerate(students_of(tmp_path, paths["student"])):
        rows = [row for result in results for row in result["rows"][step]]
        for result in results:
            twin.assert_logged(result["logs"][step], twin.log_of_step(rows, student, student, **TWIN_NAMED))


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_a_killed_run_resumes_exactly(config, tmp_path, paths):
    kwargs = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, **paths}
    whole = launch(tmp_path / "whole", config, **kwargs)
    killed = launch(tmp_path / "killed", config, check=False, kill_after=3, **kwargs)
    assert killed.returncode != 0 and not Path(tmp_path, "killed", "result_0.json").exists()
    resumed = launch(tmp_path / "killed", config, resume=True, **kwargs)
    assert_losses(resumed, whole, rel=1e-6)
    assert not any("teacher" in name for name in resumed[0]["files"])


@pytest.mark.parametrize(("config", "seconds"), [("ddp", 5), ("zero3", 10)])
def test_a_stuck_rank_is_named(config, seconds, tmp_path, paths):
    run = launch(tmp_path, config, check=False, hang=1, teacher_timeout=seconds, **paths)
    assert run.returncode != 0
    assert f"Rank 1 has not ended call 1 of TeacherScorer.score within {seconds} s" in run.stderr
    assert "signal.pause" in run.stderr or "in <lambda>" in run.stderr  # where it is stuck


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_a_rank_that_fails_ends_all(config, tmp_path, paths):
    start = time.monotonic()
    run = launch(tmp_path, config, check=False, fail=1, **paths)
    assert run.returncode != 0 and time.monotonic() - start < 120.0
    assert "RuntimeError: the teacher of rank 1 fails" in run.stderr


def test_an_absent_rank_is_named(tmp_path, paths):
    run = launch(tmp_path, "ddp", check=False, absent=1, teacher_timeout=3, **paths)
    assert run.returncode != 0
    assert "Rank 0 waited 3 s in vain for the other ranks to start call 1 of TeacherScorer.score" in run.stderr
    assert "Ranks 1 failed to pass monitoredBarrier" in run.stderr


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_a_rank_with_another_setting_ends_all(config, tmp_path, paths):
    start = time.monotonic()
    run = launch(tmp_path, config, check=False, of_rank_1={"alpha": 1.0}, **paths)
    assert run.returncode != 0 and time.monotonic() - start < 120.0
    assert "ValueError: `alpha` is 0.5 on rank 0 and 1.0 on rank 1" in run.stderr


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_a_teacher_that_one_rank_cannot_load_ends_all(config, tmp_path, paths):
    start = time.monotonic()
    run = launch(tmp_path, config, check=False, lost=1, **paths)
    assert run.returncode != 0 and time.monotonic() - start < 120.0
    assert f"`teacher_model='/no/such/{Path(paths['teacher']).name}'` can't be loaded" in run.stderr


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_each_row_has_its_own_teacher_and_prompt(config, tmp_path, paths):
    teachers = {"deep": paths["teacher"], "wide": tiny.save_model(tmp_path / "wide", seed=2, hidden_size=32)}
    served = tiny.save_model(tmp_path / "served", seed=3)
    with TeacherServer(served) as server:
        settings = {"student": paths["student"], "teachers": teachers, "teacher_server_urls": {"served": server.url}}
        run = launch(tmp_path / "out", config, check=False, **settings)
    assert run.returncode == 0, run.stderr[-3000:]
    teachers["served"] = served
    trainer = SimpleNamespace(processing_class=tiny.make_tokenizer(), temperature=1.0)
    for rank in range(2):
        trainer.seen = torch.load(tmp_path / "out" / f"batches_{rank}.pt")
        asked = assert_own_scores(
            trainer, lambda row: teachers[row["teacher_id"]], lambda row: row["teacher_prompt"] or row["prompt"]
        )
        assert asked


NAMED = {"teacher_kl": "forward", "teacher_kl_coef": 1.0, "teacher_top_k": 4, "alpha": 0.5}
TWIN_NAMED = {"coef": 1.0, "k": 4}


@pytest.fixture(scope="module")
def named(tmp_path_factory, paths):
    return launch(tmp_path_factory.mktemp("named"), "ddp", **paths, **NAMED, **SAVED)


def test_named_tokens(named, paths):
    students = students_of(Path(named[0]["folder"]), paths["student"])
    assert_twins(named, students, twin.load(paths["teacher"]), **TWIN_NAMED)


@pytest.mark.parametrize("config", ["zero2", "zero3", "zero3_offload"])
def test_named_tokens_under_zero(config, tmp_path, paths, named):
    # The teacher's likeliest tokens from its shards, and the gradient through the student's own LM head in shards
    results = launch(tmp_path, config, **paths, **NAMED)
    for rank in range(2):
        scores = torch.load(tmp_path / f"scores_{rank}.pt")
        assert_names(scores, paths["teacher"], make_ragged_batch(rank), 4, shared=32)
    assert_losses(results, named)


def test_named_tokens_under_fsdp2(tmp_path, paths, named):
    results = launch(tmp_path, "ddp", fsdp="no", **paths, **NAMED)
    assert results[0]["teacher"] == "FSDPTeacher"
    for rank in range(2):
        scores = torch.load(tmp_path / f"scores_{rank}.pt")
        assert_names(scores, paths["teacher"], make_ragged_batch(rank), 4, shared=32)
    assert_losses(results, named)


def test_named_tokens_of_the_students_own_base(tmp_path, paths):
    results = launch(tmp_path, "zero3", student=paths["student"], teacher="base", lora=True, **NAMED, **SAVED)
    students = adapted_students_of(tmp_path, paths["student"])
    assert_twins(results, students, twin.load(paths["student"]), **TWIN_NAMED)


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_distil_then_reinforce_in_two_processes(config, tmp_path, paths):
    kwargs = {"teacher_kl": "forward", "alpha": 1.0, "distillation_fraction": 0.5, "max_steps": 4}
    results = launch(tmp_path, config, **paths, **kwargs, **SAVED)
    logs, teacher = results[0]["logs"], twin.load(paths["teacher"])
    assert [log["teacher/kl_coef"] for log in logs] == [1.0, 1.0, 0.0, 0.0]
    for step, student in enumerate(students_of(tmp_path, paths["student"], steps=4)):
        rows = [row for result in results for row in result["rows"][step]]
        if step < 2:  # the divergence alone, on all rows
            rows = [{**row, "reward": 0.0} for row in rows]
        expected = twin.log_of_step(rows, student, teacher, alpha=1.0, coef=[1.0, 0.0][step // 2], k=8)
        for result in results:
            log = result["logs"][step]
            assert log["loss"] == pytest.approx(expected["loss"], abs=1e-4)
            assert (log.get("teacher/kl") or 0.0) == pytest.approx(expected.get("teacher/kl", 0.0), abs=1e-4)
            assert log["grad_norm"] > 0.0


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_every_family_scores_the_same_on_two_processes(config, tmp_path):
    # Whole and dealt out, and sharded; rows with images stay where they are
    results = launch(tmp_path, config, worker="families_worker.py")
    for differences in results:
        assert len(differences) > 40 and max(differences.values()) < 1e-4, differences


# What is logged and written down, by either rank


WATCHED = {
    "teacher_kl": "forward",
    "teacher_kl_coef": 0.3,
    "teacher_top_k": 4,
    "teacher_kl_on": "failed",
    "success_reward": 0.5,
    "num_iterations": 2,
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "log_completions": True,
    "num_completions_to_print": 0,
}


@pytest.fixture(scope="module")
def watched(tmp_path_factory, paths):
    """Two steps on the same 8 rollouts of each rank; and one whose teacher answers the rows of rank 0 alone."""
    folder = tmp_path_factory.mktemp("watched")
    teachers = {"deep": paths["teacher"], "wide": tiny.save_model(folder / "wide", seed=2, hidden_size=32)}
    prompt = tiny.make_tokenizer()(tiny.make_dataset()[2]["prompt"])["input_ids"]  # the first that is rank 1's

    def fault(handler, answer):
        is_ours = handler.body is not None and handler.body["prompt"][: len(prompt)] == prompt
        (status(500) if is_ours else right)(handler, answer)

    with TeacherServer(paths["teacher"]) as server:
        server.fault = fault
        kwargs = {"student": paths["student"], "teachers": teachers, "server": server.url, "settings": WATCHED}
        results = launch(folder, "ddp", worker="metrics_worker.py", **kwargs)
    models = {name: twin.load(path) for name, path in teachers.items()}
    students = [twin.load(paths["student"]), twin.load(folder / "metrics" / "checkpoint-1")]
    return results, folder, students, models


def test_metrics_are_means_over_the_tokens_of_both_ranks(watched):
    results, _, students, teachers = watched
    ranks = [result["metrics"] for result in results]
    settings = {"old": students[0], "coef": 0.3, "k": 4, "success_reward": 0.5}
    for step, student in enumerate(students):
        logs = [rank["logs"][step] for rank in ranks]
        rows = [rank["rows"][0] for rank in ranks]
        expected, *alone = (twin.log_of_step(each, student, teachers, **settings) for each in (sum(rows, []), *rows))
        left_out = (
            ("teacher/top1", "teacher/entropy", "teacher/named_mass") if step else ()
        )  # logged when the rows are scored
        for log in logs:
            twin.assert_logged(log, expected, left_out)
        # The divergence is on the failed rows of each: neither rank's is the mean, and the ranks differ in their
        # tokens
        assert all(abs(each["teacher/kl"] - expected["teacher/kl"]) > 1e-3 for each in alone)
    assert [len({row["reward"] > 0.5 for row in each}) for each in rows] == [2, 2]


def test_every_row_of_the_table_has_its_own_log_ratio(watched):
    results, folder, students, teachers = watched
    table = pd.read_parquet(folder / "metrics" / "completions" / "completions_00002.parquet")
    rows = [row for result in results for row in result["metrics"]["rows"][0]]
    assert table["prompt"].tolist() == [row["prompt"] for row in rows] and len(rows) == 16
    for row, advantage, shown in zip(rows, twin.advantages(rows), table["teacher_log_ratio"], strict=True):
        assert (advantage != 0.0 or row["reward"] <= 0.5) == (not pd.isna(shown))  # the teacher has read it
        models = students[1], teachers[row["teacher_id"]]
        now, theirs = (
            twin.log_probs(model, row["prompt"], row["ids"])[range(len(row["ids"])), row["ids"]] for model in models
        )
        gap = (now - theirs).mean().item()
        assert pd.isna(shown) or shown == pytest.approx(gap, abs=1e-3)


def test_the_rollouts_of_the_main_process_have_their_own_rewards(watched):
    results, folder, _, _ = watched
    rows, records = results[0]["metrics"]["rows"][0], read_rollouts(folder / "metrics")
    assert len(records) == 2 * 8  # both groups have signal, after both steps
    for record in records:
        assert record["ids"] == rows[record["row"]]["ids"] and record["reward"] == pytest.approx(
            rows[record["row"]]["reward"]
        )


def test_failed_rows_are_counted_on_both_ranks(watched):
    results, _, _, _ = watched
    ours, theirs = (result["failures"]["rows"][0] for result in results)
    prompt = tiny.make_dataset()[2]["prompt"]
    failed = [row for row in theirs if row["prompt"] == prompt]
    assert len(failed) == 4 and not any(row["prompt"] == prompt for row in ours)
    assert len({row["reward"] for row in failed}) > 1  # or the teacher wouldn't have been asked
    count = len({tuple(row["ids"]) for row in failed})  # equal rows are asked for once
    assert [result["failures"]["logs"][0]["teacher/failed_rows"] for result in results] == [count, count]


# Of an odd number, accelerate evens out the last batch with rows of the first
@pytest.mark.parametrize("prompts", [6, 5])
def test_the_probe_reports_every_prompt_once(prompts, tmp_path, paths):
    script, config, output = (tmp_path / name for name in ("train.py", "config.yaml", "probe.json"))
    script.write_text(SCRIPT)
    settings = yaml.safe_load((CONFIGS / "multi_gpu.yaml").read_text())
    config.write_text(yaml.dump(settings | {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    command += ["-m", "trl_rlad", "probe", "--prompts", str(prompts), "--output", output, script]
    command += [paths["student"], paths["teacher"], tmp_path / "out"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    run = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    records = read_rollouts(output.with_suffix(".parquet"))
    assert sorted(record["group"] for record in records) == sorted(4 * list(range(prompts)))
    assert len({(record["group"], record["prompt"]) for record in records}) == prompts
    assert len({record["prompt"] for record in records}) == prompts == json.loads(output.read_text())["prompts"]
    for record in records:
        expected = 0.0 if "w5" in record["prompt"] else tiny.reward([record["ids"]])[0]
        assert record["reward"] == pytest.approx(expected)
