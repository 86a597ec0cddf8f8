"""What the probe makes of given rollouts, worked out by hand, and of real ones."""

import json
import sys
import time
import warnings
from base64 import b64encode
from math import isnan, log
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from teacher_server import TeacherServer
from test_loss import make_batch, make_logps
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import GRPOTrainer

from trl_rlad import TeacherScorer
from trl_rlad.cli import main
from trl_rlad.objective.guidance import Guidance
from trl_rlad.reports import probe_run
from trl_rlad.reports.advice import OFF, OFFLINE, STUDY, WORDS, choose, how_sure, recommend, settings_to_paste
from trl_rlad.reports.probe import Estimate, _contradicts, _is_lower, report
from trl_rlad.reports.probe_output import SHARES, TABLE, print_report, render_page, write_picture
from trl_rlad.reports.probe_run import Probe, ProbeGuide
from trl_rlad.scripts.arguments import read_method


EOS = 1


def rollout(group, reward, advantage, logps, teacher_logps, ids=None, **columns):
    ids = ids or [5] * (len(logps) - 1) + [EOS]
    return {
        "group": group,
        "reward": reward,
        "advantage": advantage,
        "logps": logps,
        "teacher_logps": teacher_logps,
        "ids": ids,
    } | columns


ROLLOUTS = [
    # gaps 0.3 and -2, mean -0.85
    rollout(0, 1.0, 1.0, [-1.0, -3.0], [-1.3, -1.0], top1=[1.0, 0.0], entropy=[0.2, 0.4]),
    # gaps 2.5, at a token that the student gives 0.95 and the teacher 0.078, and, cut before its end, none known
    rollout(
        0, 0.0, -1.0, [log(0.95), -2.0], [log(0.95) - 2.5, None], ids=[5, 6], top1=[0.0, None], entropy=[0.9, None]
    ),
    # of a group without success or signal: gap 0
    rollout(1, 0.0, 0.0, [-1.0], [-1.0], top1=[1.0], entropy=[0.1]),
    rollout(1, 0.0, 0.0, [-1.0], [-1.0], top1=[1.0], entropy=[0.1]),
]


def test_figures_by_hand():
    figures = report(ROLLOUTS, eos_token_ids=[EOS])
    expected = {
        "mean@1": 1 / 4,
        "pass@k": 1 / 2,
        "signal": 1 / 2,
        "all_failed": 1 / 2,
        "gap": (0.3 - 2.0 + 2.5 + 0.0 + 0.0) / 5,
        "gap_first": (0.3 + 2.5 + 0.0 + 0.0) / 4,
        "gap_eos": (-2.0 + 0.0 + 0.0) / 3,
        "gap_rewarded": (0.3 - 2.0) / 2,
        "gap_punished": 2.5,
        "prefers_rewarded": 1 / 2,
        "prefers_punished": 0.0,
        "beyond_clip": 2 / 5,
        "discrimination": 1.0,  # -0.85 < 2.5
        "teacher_auc": 1.0,  # means -1.15 and -2.55
        "student_auc": 0.0,  # means -2 and -1.03: the student is surer of what fails
        "contradicted_failed": 1 / 3,
        "contradicted_succeeded": 0.0,
        "top1": 3 / 5,
        "entropy": (0.2 + 0.4 + 0.9 + 0.1 + 0.1) / 5,
        "student_entropy": (1.0 + 3.0 - log(0.95) + 2.0 + 1.0 + 1.0) / 6,
        # e^(0.7 * 0.3) = 1.23 < 1.28, and at alpha = 0 it would be 1.35
        "clip_high@0.3": 0.0,
        # the punished gap is positive, and the lower bound is for negative ones
        "clip_low@0.5": 0.0,
    }
    assert {name: figures[name].value for name in expected} == pytest.approx(expected)
    assert (figures["prompts"], figures["completions"], figures["tokens"], figures["tokens_without_say"]) == (
        2,
        4,
        6,
        1,
    )
    assert figures["gap_quantiles"][50] == 0.0
    # Two groups have successes and tokens, one has a better and a worse completion, and another success is needed
    groups = {"mean@1": 2, "gap": 2, "discrimination": 1, "gap_punished": 1, "contradicted_succeeded": 1}
    assert {name: figures[name].groups for name in groups} == groups


def test_what_none_can_judge_is_neither_a_success_nor_a_failure():
    sure = [log(0.95)], [log(0.95) - 2.5]  # which the teacher contradicts
    rollouts = [
        rollout(0, 1.0, 1.0, [-1.0], [-1.0]),
        rollout(0, None, 0.0, *sure),
        rollout(1, 0.0, -1.0, [-1.0], [-1.5]),
        rollout(1, 1.0, 1.0, [-1.0], [-1.0]),
        rollout(2, None, 0.0, *sure),
        rollout(2, None, 0.0, *sure),
    ]
    figures = report(rollouts)
    expected = {
        "mean@1": 2 / 3,
        "pass@k": 1.0,  # of the one group that is judged as a whole
        "signal": 1 / 3,
        "all_failed": 0.0,
        "discrimination": 1.0,  # of one pair
        "contradicted_failed": 0.0,
        "contradicted_succeeded": 0.0,
        "gap": (0.0 + 2.5 + 0.5 + 0.0 + 2.5 + 2.5) / 6,
    }
    assert {name: figures[name].value for name in expected} == pytest.approx(expected)


def test_the_interval_is_of_95_percent_and_of_eight_groups_at_least():
    def of(size, successes):
        return report([rollout(i, float(i < successes), 0.0, [-1.0], [-1.0]) for i in range(size)])["mean@1"]

    # Ten prompts of which two succeed: of ten draws at most four are of these in 96.7% of cases, and at most five in
    # 99.4%; none in 10.7%
    assert of(10, 2) == (0.2, 0.0, 0.5, 10)
    assert of(8, 8) == (1.0, 1.0, 1.0, 8)
    value, low, high, groups = of(7, 7)
    assert (value, groups) == (1.0, 7) and isnan(low) and isnan(high)


def test_clip_shares_by_hand():
    rewarded = rollout(0, 1.0, 1.0, [-1.0] * 3, [-1.3, -1.6, -9.0])  # gaps 0.3, 0.6 and, bounded, 1
    punished = rollout(0, 0.0, -1.0, [-2.0] * 2, [-1.6, -1.4])  # gaps -0.4 and -0.6
    figures = report([rewarded, punished])
    # exp(0.7 * (0.3, 0.6, 1)) = 1.23, 1.52, 2.01; exp(0.5 * ...) = 1.16, 1.35, 1.65; exp(0.3 * ...) = 1.09, 1.20, 1.35
    assert [figures[f"clip_high@{alpha}"].value for alpha in (0.3, 0.5, 0.7)] == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    # exp(-0.7 * (0.4, 0.6)) = 0.76, 0.66; exp(-0.5 * ...) = 0.82, 0.74; exp(-0.3 * ...) = 0.89, 0.84
    assert [figures[f"clip_low@{alpha}"].value for alpha in (0.3, 0.5, 0.7)] == pytest.approx([1.0, 1 / 2, 0.0])


def test_a_teacher_that_is_the_student_is_no_better_than_chance():
    rollouts = [rollout(0, float(i), i - 1.0, [-i - 0.1], [-i - 0.1 + 1e-6 * i]) for i in range(3)]
    figures = report(rollouts)
    for name in ("discrimination", "prefers_rewarded", "prefers_punished"):
        assert figures[name].value == 0.5
    assert figures["gap"].value == pytest.approx(0.0, abs=1e-5)
    assert figures["teacher_auc"].value == 0.0  # it is surer of what is worse, as the student is


def test_nothing_to_compare_is_not_a_number():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = report([rollout(0, 1.0, 0.0, [-1.0], [None])])
    assert all(
        isnan(value) for name in ("gap", "discrimination", "contradicted_failed") for value in figures[name][:3]
    )


def test_bounds_other_than_the_defaults_by_hand():
    rewarded = rollout(0, 1.0, 1.0, [-1.0] * 3, [-1.3, -1.6, -9.0])  # gaps 0.3, 0.6 and 8
    punished = rollout(0, 0.4, -1.0, [-2.0] * 2, [-1.6, -1.4])  # gaps -0.4 and -0.6
    figures = report([rewarded, punished], success_reward=0.5, clip=0.5, epsilon_low=0.25, epsilon_high=0.2)
    expected = {
        "mean@1": 1 / 2,  # at a bound of 0 both would succeed
        "beyond_clip": 3 / 5,  # 0.6, 8 and -0.6
        "clip_high@0.3": 1.0,  # exp(0.7 * (0.3, 0.5, 0.5)) = 1.23, 1.42, 1.42
        "clip_high@0.5": 2 / 3,  # exp(0.5 * ...) = 1.16, 1.28, 1.28
        "clip_low@0.3": 1 / 2,  # exp(-0.7 * (0.4, 0.5)) = 0.756, 0.705
        "clip_low@0.5": 0.0,  # exp(-0.5 * ...) = 0.82, 0.78
    }
    assert {name: figures[name].value for name in expected} == pytest.approx(expected)
    unbounded = report([rewarded, punished], clip=None)
    assert unbounded["beyond_clip"].value == 0.0
    assert unbounded["clip_high@0.7"].value == 1 / 3  # exp(0.3 * (0.3, 0.6, 8)) = 1.09, 1.20, 11.02


def test_groups_that_failed_throughout():
    rewards = {0: [0.0, 0.0], 1: [0.0, 0.0], 2: [1.0, 1.0]}
    rollouts = [rollout(group, reward, 0.0, [-1.0], [-1.0]) for group, both in rewards.items() for reward in both]
    assert report(rollouts)["all_failed"].value == pytest.approx(2 / 3)
    apart = [rollout(group, 0.0, 0.0, [-1.0], [-1.0 - group**2]) for group in range(12)]
    assert report(apart)["gap"] == report(apart)["gap"]  # the same draws


def test_the_bound_on_the_teacher_and_none():
    rollouts = [rollout(0, 1.0, 1.0, [-1.0], [-9.0]), rollout(0, 0.0, -1.0, [-9.0], [-1.0])]
    shares = ["clip_high@0.7", "clip_low@0.7", "beyond_clip"]
    bounded, free = (report(rollouts, clip=clip, epsilon_low=0.3, epsilon_high=0.4) for clip in (1.0, None))
    # exp(0.3) = 1.35 < 1.4 and exp(-0.3) = 0.74 > 0.7
    assert [bounded[name].value for name in shares] == [0.0, 0.0, 1.0]
    assert [free[name].value for name in shares] == [1.0, 1.0, 0.0]


def test_what_is_at_a_bound_is_within_it():
    rollouts = [rollout(0, 1.0, 1.0, [-1.0], [-1.0]), rollout(0, 0.0, -1.0, [-1.0], [-1.0])]
    figures = report(rollouts, epsilon_low=0.0, epsilon_high=0.0)
    assert figures["clip_high@0.5"].value == figures["clip_low@0.5"].value == 0.0
    assert report([rollout(0, 1.0, 1.0, [-1.0], [-2.0])])["beyond_clip"].value == 0.0
    assert [_is_lower(0.5, -0.5), _is_lower(-0.5, 0.5), _is_lower(1e-4, 0.0), _is_lower(9e-5, 0.0)] == [0, 1, 0, 0.5]
    sure, unlikely = np.log(0.9), np.log(0.1)
    assert _contradicts(-0.01, -5.0) and not _contradicts(sure, -5.0) and not _contradicts(-0.01, unlikely)


def make_figures(groups=100, prompts=32, width=0.0, **values):
    """Figures of a probe of a teacher that contradicts failures and no success."""
    shares = {"gap": 1.0, "beyond_clip": 0.1, "contradicted_failed": 0.99, "contradicted_succeeded": 0.0}
    shares |= {"student_entropy": 0.1, "signal": 0.8} | values
    estimates = {name: Estimate(x, x - width, x + width, groups) for name, x in shares.items()}
    return {**estimates, "prompts": prompts}


SOFT = {"contradicted_failed": 0.1, "student_entropy": 0.35, "signal": 0.5}  # each at its bound


@pytest.mark.parametrize(
    ("changes", "first", "then", "where_right"),
    [
        ({}, "rlad_named", "", False),
        ({"contradicted_failed": 0.75}, "rlad_named", "", False),
        ({"contradicted_failed": 0.74}, "grpo", "", False),
        ({"contradicted_failed": float("nan")}, "grpo", "", False),
        ({"contradicted_succeeded": 0.04}, "rlad_named", "", False),
        ({"contradicted_succeeded": 0.05}, "rlad_named", "", True),
        ({"gap": 0.0}, "rlad_named", "", False),
        ({"beyond_clip": 0.0}, "rlad_named", "", False),
        ({"gap": 0.01, "beyond_clip": 0.0}, "rlad_named", "", False),
        ({"gap": 0.0, "beyond_clip": 0.0, "teacher_rescues": 1.0}, "grpo", "", False),
        ({"teacher_accuracy": 0.0, "teacher_rescues": 0.0}, "grpo", "", False),
        ({"teacher_accuracy": 0.9, "teacher_rescues": 0.2}, "rlad_named_all", "", False),
        ({"teacher_accuracy": 0.9, "contradicted_succeeded": 0.05}, "rlad_named", "", True),
        ({"teacher_accuracy": 0.89, "teacher_rescues": 0.25}, OFFLINE, "rlad_named", True),
        ({"teacher_accuracy": 0.98, "teacher_rescues": 1.0}, OFFLINE, "rlad_named_all", False),
        ({"contradicted_failed": 0.1, "teacher_accuracy": 0.67, "teacher_rescues": 0.66}, OFFLINE, "grpo", False),
        (SOFT, "rlad", "", False),
        (SOFT | {"student_entropy": 0.34}, "grpo", "", False),
        (SOFT | {"signal": 0.49}, "grpo", "", False),
        (SOFT | {"contradicted_failed": 0.99}, "rlad_named", "", False),
        (SOFT | {"teacher_accuracy": 0.9}, "rlad_named_all", "", False),
        (SOFT | {"teacher_accuracy": 0.89}, "rlad_named", "", True),
        (SOFT | {"teacher_accuracy": 0.5, "teacher_rescues": 0.25}, OFFLINE, "rlad_named", True),
        (SOFT | {"teacher_accuracy": 0.49, "teacher_rescues": 0.25}, "rlad_named", "", True),
        (SOFT | {"teacher_accuracy": 0.0}, "grpo", "", False),
        (SOFT | {"teacher_accuracy": 0.98, "teacher_rescues": 1.0}, OFFLINE, "rlad_named_all", False),
    ],
)
def test_the_bounds_of_the_rule(changes, first, then, where_right):
    figures = make_figures(**changes)
    assert choose(figures)[:3] == (first, then, where_right)
    advice = recommend(figures)
    assert advice["method"] == first and advice["do"].startswith(WORDS[first])
    assert advice["then"].startswith(WORDS[then] if then else "") and advice["teacher_weight"] == where_right
    assert ("only where it is right" in advice["do"] + advice["then"]) == where_right
    assert advice["settings"] == OFF | read_method(then or first)


def test_every_method_that_may_be_advised_has_its_settings_and_each_bound_its_figure():
    assert STUDY["settings"] == {name: read_method(name) for name in WORDS if name != OFFLINE}
    assert {"grpo", "rlad", "rlad_named", "rlad_named_all", "opd_forward", "distil_then_rlad", OFFLINE} == WORDS.keys()
    assert STUDY["bounds"].keys() >= STUDY["evidence"].keys()


@pytest.mark.parametrize(
    ("figures", "starts", "has"),
    [
        (make_figures(), "clear, by bounds that rest on eight pairs",
         "contradicted_failed (failures in which the teacher contradicts what the student is sure of) is 99% (99% to"),
        (make_figures(groups=7), "not sure, ask again with --prompts 128", "rests on too few groups (7)"),
        (make_figures(contradicted_failed=0.8, width=0.06), "not sure", "is 74% to 86% (100 groups)"),
        (make_figures(contradicted_failed=0.8, width=0.05), "clear", "the bound 75%"),
        (make_figures(contradicted_failed=0.7, width=0.05), "not sure", "with the bound of 75% within"),
        (make_figures(contradicted_failed=0.7, width=0.04), "clear", "66% to 74%"),
        (make_figures(gap=0.0, beyond_clip=0.0), "certain: student and teacher are the same", ""),
        # None of 50 groups: three in 50, by the rule of three, are not ruled out
        (make_figures(groups=50), "not sure",
         ": contradicted_succeeded (successes in which it does so) is 0% to 6% (50 groups), with the"),
        (make_figures(groups=61), "clear", "does so) is 0% (0% to 5%, 61 groups)"),
        (make_figures(**SOFT | {"student_entropy": 0.8, "signal": 0.7}), "clear", "entropy in nats) is 0.80 (0.80 to"),
        # Only what decides on the first thing to do
        (make_figures(teacher_accuracy=1.0, teacher_rescues=1.0), "clear",
         ": teacher_rescues (prompts that the teacher answers, of those that the student never does) is 100% (97% to"),
    ],
)  # fmt: skip
def test_how_sure_that_is(figures, starts, has):
    text = how_sure(choose(figures), figures)
    assert text.startswith(starts) and has in text
    is_asked = "teacher_rescues" in figures or starts.startswith("certain")
    assert text.endswith("whether offline is better, --sample_teacher tells") == (not is_asked)


@pytest.mark.parametrize(
    ("script", "arguments", "config", "pasted"),
    [
        ("my.py", [], {}, "teacher_kl_coef=1.0, teacher_kl='forward', teacher_kl_on='failed'"),
        ("my.py", ["student", "--verbose"], {"alpha": 0.7, "teacher_kl": "forward", "teacher_kl_on": "failed"},
         "alpha=0.5, teacher_kl_coef=1.0"),
        ("my.py", ["--output_dir", "out"], {}, "--teacher_kl_coef 1.0 --teacher_kl forward --teacher_kl_on failed"),
        ("my.py", ["--config", "a.yaml"], {},
         "in your file:\nteacher_kl_coef: 1.0\nteacher_kl: forward\nteacher_kl_on: failed"),
        ("my.py", ["--config", "a.yaml", "--teacher-kl=reverse"], {},
         "--teacher_kl_coef 1.0 --teacher_kl forward --teacher_kl_on failed"),
        ("train", [], {}, "trl-rlad train --teacher_kl_coef 1.0 --teacher_kl forward --teacher_kl_on failed"),
        ("train", ["--task_kwargs", '{"a": 1}'],
         {"teacher_kl": "forward", "teacher_kl_on": "failed", "teacher_kl_coef": 0.1, "teacher_kl_coef_final": 0.5},
         """trl-rlad train --task_kwargs '{"a": 1}' --teacher_kl_coef 1.0 --teacher_kl_coef_final 1.0"""),
        ("train", ["--seed", "3"], {"named": True}, "as you have it: trl-rlad train --seed 3"),
        ("my.py", ["--seed", "3"], {"named": True}, "as you have it"),
    ],
)  # fmt: skip
def test_what_is_to_be_changed_can_be_pasted(script, arguments, config, pasted, tmp_path):
    config = read_method("rlad_named") if "named" in config else config
    now = tiny.make_config(tmp_path, **config)
    assert settings_to_paste(recommend(make_figures()), now, script, arguments) == pasted


def test_a_teacher_that_may_be_wrong_needs_its_column_too(tmp_path):
    advice, now = recommend(make_figures(contradicted_succeeded=0.3)), tiny.make_config(tmp_path)
    column = "teacher_kl_on='failed'  # and a column `teacher_weight` in the dataset"
    assert settings_to_paste(advice, now, "my.py", []).endswith(column)
    assert settings_to_paste(advice, now, "train", []).endswith("--teacher_kl_on failed --teacher_samples 4")
    asked = ["--teacher_samples", "8"]
    assert settings_to_paste(advice, now, "train", asked).startswith(
        "trl-rlad train --teacher_samples 8 --teacher_kl_coef"
    )
    assert settings_to_paste(advice, now, "train", asked).count("samples") == 1


SCRIPT = """
import json
import sys
import tiny
from trl_rlad import RLADTrainer

def reward(prompts, completion_ids, **kwargs):  # some groups have no signal
    return [0.0 if "w5" in prompt else value for prompt, value in zip(prompts, tiny.reward(completion_ids))]


student, teacher, *settings, output_dir = sys.argv[1:]
data = tiny.make_dataset()
served = {"teacher_server_urls": teacher} if teacher.startswith("http") else {}
temperature = 1.0 if served else 0.8
if not served and student != teacher and "renamed" not in teacher:  # some prompts are others to the teacher
    data = data.map(lambda row: {"teacher_prompt": f"w1 {row['prompt']}" if "w6" in row["prompt"] else None})
args = tiny.make_config(
    output_dir,
    per_device_eval_batch_size=6,
    temperature=temperature,
    steps_per_generation=2,
    **served,
    **(json.loads(settings[0]) if settings else {}),
)
trainer = RLADTrainer(student, reward, args, data, teacher_model=None if served else teacher)
trainer.generation_config.update(temperature=0.01)
print("before", trainer.evaluate()["eval_reward"])
trainer.generation_config.update(temperature=temperature)
trainer.train()
raise AssertionError("it has trained")
"""


class Left(BaseException):
    """The process would end here."""


@pytest.fixture
def probe(tmp_path, capsys, monkeypatch):
    """Run the command on a script. Returns what it has printed and its report."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(probe_run, "_leave", leave)

    def run(*arguments, options=()):
        output, before = tmp_path / "reports" / "probe.json", (sys.argv, list(sys.path), Trainer.__init__)
        command = ["probe", "--prompts", "6", "--output", str(output), *options, str(script), *arguments]
        with pytest.raises((Left, SystemExit)) as ended:
            main([*command, str(tmp_path / "out")])
        captured = capsys.readouterr()
        assert (sys.argv, sys.path, Trainer.__init__) == before and not (tmp_path / "out").exists()
        report = json.loads(output.read_text()) if output.exists() else {}
        run.err = captured.err
        if ended.value.args[0] != 0:  # the sentence of a refusal
            raise SystemExit(str(ended.value) if ended.type is SystemExit else captured.err)
        return captured.out, report

    return run


def time_calls(monkeypatch, cls, name):
    """A list to which each call of a method adds its seconds."""
    method, seconds = getattr(cls, name), []

    def timed(*args):
        start = time.perf_counter()
        outputs = method(*args)
        seconds.append(time.perf_counter() - start)
        return outputs

    monkeypatch.setattr(cls, name, timed)
    return seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "0", "SCRIPT"], "--prompts must be at least 1, but is 0"),
        (["--prompts", "-3", "SCRIPT"], "--prompts must be at least 1, but is -3"),
        (["nowhere.py"], "there is no script nowhere.py"),
        (["--output", "FOLDER", "SCRIPT"], "--output must be a file for JSON"),
        (["--output", "FOLDER/probe.png", "SCRIPT"], "--output must be a file for JSON"),
        (["--output", "FOLDER/probe.html", "SCRIPT"], "--output must be a file for JSON"),
        (["SCRIPT", "--alpha", "0.5", "--prompts", "64"], "belongs before the script: trl-rlad probe --prompts ..."),
        (["SCRIPT", "--output=x"], "If SCRIPT has one of that name: trl-rlad probe SCRIPT -- --output=x"),
        (["train", "--sample_teacher"], "trl-rlad probe --sample_teacher ... train."),
    ],
)
def test_what_the_command_itself_refuses(arguments, message, tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text("raise AssertionError('it runs')")
    with pytest.raises(SystemExit):
        main(["probe", *(each.replace("SCRIPT", str(script)).replace("FOLDER", str(tmp_path)) for each in arguments)])
    assert message.replace("SCRIPT", str(script)) in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == [script]


def test_command(probe, student_path, teacher_path, tmp_path, monkeypatch):
    seconds = {
        "generation": time_calls(monkeypatch, GRPOTrainer, "_generate"),
        "scoring": time_calls(monkeypatch, TeacherScorer, "score"),
    }
    printed, figures = probe(student_path, teacher_path)
    # The evaluation before training is skipped; of several batches the time is the sum
    assert len(seconds["generation"]) == len(seconds["scoring"]) > 1
    for part, each in seconds.items():
        assert figures["seconds"][part] == pytest.approx(sum(each), abs=0.1)
    assert (figures["student"], figures["teacher"]) == (Path(student_path).name, Path(teacher_path).name)
    assert (figures["num_generations"], figures["max_completion_length"], figures["unknown_tokens"]) == (4, 8, [])
    assert (figures["prompts"], figures["completions"], figures["temperature"]) == (6, 24, 0.8)
    assert "discrimination" in printed and figures["advice"]["limits"].split()[0] in printed
    assert "before 0.0" in probe.err and "before" not in printed.split("\n")[0]  # the script's own to stderr
    rollouts = pq.read_table(tmp_path / "reports" / "probe.parquet").to_pylist()
    assert (tmp_path / "reports" / "probe.png").stat().st_size > 5_000
    assert [r["group"] for r in rollouts] == sorted(4 * list(range(6))) and len({r["prompt"] for r in rollouts}) == 6
    # Every token is read, whatever its advantage, by the models themselves
    student, teacher = map(AutoModelForCausalLM.from_pretrained, (student_path, teacher_path))
    tokenizer = AutoTokenizer.from_pretrained(student_path)
    assert {rollout["advantage"] == 0.0 for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        others = f"w1 {rollout['prompt']}" if "w6" in rollout["prompt"] else rollout["prompt"]
        for name, model, text in (("logps", student, rollout["prompt"]), ("teacher_logps", teacher, others)):
            prompt = tokenizer(text)["input_ids"]
            ids = torch.tensor([prompt + rollout["ids"]])
            logps = (model(ids).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
            assert rollout[name] == pytest.approx(logps[range(len(logps)), rollout["ids"]].tolist(), abs=1e-4)
        assert rollout["top1"] == (logps.argmax(-1) == torch.tensor(rollout["ids"])).tolist()
        for entropy, row in zip(rollout["entropy"], logps, strict=True):
            # The teacher's likeliest 20, of which the student doesn't know the padded ones, and one share for the rest
            named = [row[id].exp().item() for id in row.topk(20).indices if id < 32]
            assert entropy == pytest.approx(-sum(p * log(p) for p in [*named, 1.0 - sum(named)]), abs=1e-4)
        # What it would say: its likeliest three, without what the student doesn't know, and what is hardly likely
        likeliest = [[id for id in row.topk(3).indices.tolist() if id < 32 and row[id] > log(0.01)] for row in logps]
        assert rollout["named"] == [[tokenizer.decode([id]) for id in ids] for ids in likeliest]
        expected = 0.0 if "w5" in rollout["prompt"] else tiny.reward([rollout["ids"]])[0]
        assert rollout["reward"] == pytest.approx(expected)
        rewards = [each["reward"] for each in rollouts if each["group"] == rollout["group"]]
        assert np.sign(rollout["advantage"]) == np.sign(np.round(rollout["reward"] - np.mean(rewards), 6))
    assert {"w6" in rollout["prompt"] for rollout in rollouts} == {True, False}
    assert "teacher_accuracy" not in figures and figures["seconds"]["scoring"] > 0.0


def test_the_command_reports_by_the_settings_of_the_script(probe, student_path, teacher_path, tmp_path):
    settings = {"epsilon": 0.1, "epsilon_high": 0.4, "teacher_log_ratio_clip": 0.7, "success_reward": 0.5}
    printed, figures = probe(student_path, teacher_path, json.dumps(settings))
    rollouts = pq.read_table(tmp_path / "reports" / "probe.parquet").to_pylist()

    def figures_by(success_reward=0.5, clip=0.7, epsilon_low=0.1, epsilon_high=0.4, eos_token_ids=(EOS,)):
        expected = report(rollouts, success_reward, clip, epsilon_low, epsilon_high, eos_token_ids)
        return {
            name: pytest.approx(value._asdict(), abs=1e-4, nan_ok=True)
            for name, value in expected.items()
            if isinstance(value, Estimate)
        }

    # In JSON there is no NaN
    written = {
        name: {each: float("nan") if number is None else number for each, number in value.items()}
        for name, value in figures.items()
        if name in figures_by()
    }
    assert written == figures_by()
    assert (figures["success_reward"], figures["teacher_log_ratio_clip"]) == (0.5, 0.7)
    # Each setting makes a difference here
    for other in ({"success_reward": 0.0}, {"clip": 1.0}, {"epsilon_low": 0.2}, {"epsilon_high": 0.28}):
        assert written != figures_by(**other), other
    assert not isnan(written["gap_eos"]["value"]) and isnan(figures_by(eos_token_ids=())["gap_eos"].expected["value"])
    # And the table has them in a row with their name
    gap = figures["gap"]
    assert f"gap {gap['value']:+.2f} too few (6) 6 mean".split() in [line.split() for line in printed.splitlines()]


TAUGHT = """
import sys
import tiny
from beside import PROMPTS
from datasets import Dataset
from trl_rlad import RLADTrainer

student, teacher, every, output_dir = sys.argv[1:]


def reward(prompts, completion_ids, **kwargs):  # 0.9 for w9, in one completion out of `every`; 0.3 is no success
    return [0.9 if 13 in ids and i % int(every) == 0 else 0.3 for i, ids in enumerate(completion_ids)]


def other(prompts, **kwargs):  # only logged
    return [5.0] * len(prompts)


args = tiny.make_config(output_dir, per_device_eval_batch_size=8, num_generations_eval=2, success_reward=0.5)
args.reward_weights = [1.0, 0.0]
data = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
trainer = RLADTrainer(student, [reward, other], args, data, teacher_model=teacher)
try:
    trainer.train()
except Exception as error:
    raise AssertionError("nothing has failed") from error
"""


@pytest.fixture
def taught(tmp_path):
    """The script above, and a module beside it."""
    (tmp_path / "train.py").write_text(TAUGHT)
    (tmp_path / "beside.py").write_text("PROMPTS = [f'w20 w{i}' for i in range(6)]")
    yield
    sys.modules.pop("beside", None)


@pytest.fixture
def save_answers(tmp_path):
    """Save a model that answers w9 to prompts that end in some words, and else w8, at once. Returns its path."""

    def save(name, right, vocab_size=32):
        scores = torch.zeros(vocab_size, vocab_size)
        scores[:, EOS] = 50.0
        for i in range(6):
            scores[4 + i, 4 + (9 if i in right else 8)] = 100.0
        scores[:, 32:] = 200.0  # a padded vocabulary's rows, which nobody may sample
        return tiny.save_table(tmp_path / name, scores)

    return save


def test_the_teacher_is_sampled_and_not_the_student(probe, taught, save_answers, tmp_path):
    student, teacher = save_answers("student", []), save_answers("teacher", range(6), vocab_size=40)
    options = ["--sample_teacher", "--prompts", "9"]  # more than there are
    printed, figures = probe(student, teacher, "1", options=options)
    assert figures["prompts"] == 6 and figures["mean@1"]["value"] == 0.0 and figures["all_failed"]["value"] == 1.0
    assert [figures[f"teacher_{name}"]["value"] for name in ("accuracy", "rescues")] == [1.0, 1.0]
    assert "teacher_rescues 100% too few (6) 6 prompts that it answers" in " ".join(printed.split())
    assert "; the student is outputs/offline\n" in figures["advice"]["then"]
    # What is reported of the rollouts is still the student's
    assert {tuple(r["ids"]) for r in pq.read_table(tmp_path / "reports" / "probe.parquet").to_pylist()} == {(12, EOS)}


def test_rescues_are_of_prompts_that_the_student_never_solves(probe, taught, save_answers, tmp_path):
    student, teacher = save_answers("student", [0, 2, 4]), save_answers("teacher", [0, 1, 2, 3, 4])
    printed, figures = probe(student, teacher, "2", options=["--sample_teacher"])
    # Half of the right completions are rewarded; the teacher solves 5 of 6 prompts, and 2 of 3 that the student
    # doesn't
    assert (figures["mean@1"]["value"], figures["pass@k"]["value"]) == (0.25, 0.5)
    assert figures["teacher_accuracy"]["value"] == pytest.approx(5 / 12, abs=1e-4)
    assert figures["teacher_rescues"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert (figures["teacher_accuracy"]["groups"], figures["teacher_rescues"]["groups"]) == (6, 3)


def test_nothing_to_rescue_is_not_a_number(probe, taught, save_answers, tmp_path):
    student, teacher = save_answers("student", range(6)), save_answers("teacher", [0, 1, 2])
    printed, figures = probe(student, teacher, "1", options=["--sample_teacher"])
    assert figures["mean@1"]["value"] == 1.0
    assert figures["teacher_rescues"] == {"value": None, "low": None, "high": None, "groups": 0}
    assert figures["teacher_accuracy"]["value"] == 0.5
    assert "teacher_rescues - too few (0) 0" in " ".join(printed.split())


def test_the_same_few_prompts_of_a_data_set_for_student_and_teacher(probe, taught, save_answers, tmp_path):
    # The teacher solves just what the student solves: a probe of other prompts would find something to rescue
    right = [0, 1, 2]
    student, teacher = save_answers("student", right), save_answers("teacher", right)
    _, figures = probe(student, teacher, "1", options=["--sample_teacher", "--prompts", "4"])
    rollouts = pq.read_table(tmp_path / "reports" / "probe.parquet").to_pylist()
    solved = {r["prompt"] in [f"w20 w{i}" for i in right] for r in rollouts}
    assert figures["prompts"] == 4 and solved == {True, False}
    assert figures["teacher_accuracy"]["value"] == figures["mean@1"]["value"]
    assert figures["teacher_rescues"]["value"] == 0.0


def test_what_cannot_be_probed_is_refused(probe, make_trainer, tmp_path, student_path, teacher_path):
    settings = {"alpha": 1.0}
    with pytest.raises(SystemExit, match="Refused: There is no teacher to probe.*`alpha=0.5`"):
        probe(student_path, teacher_path, json.dumps(settings))
    (tmp_path / "train.py").write_text("print('no trainer')")
    with pytest.raises(SystemExit, match="train.py came to its end, and no trainer"):
        probe()
    several, fast, own = (Probe(make_trainer()) for _ in range(3))
    several.trainer.teacher_scorer.scorers["b"] = several.trainer.teacher_scorer.scorers[""]
    fast.trainer.use_vllm = True
    own.trainer.teacher_scorer.scorers[""].teacher.is_frozen = False
    cases = (several, "a single teacher"), (own, "not the student"), (fast, "doesn't go with `use_vllm`")
    for each, message in cases:
        with pytest.raises(ValueError, match=message):
            each.sample_teacher(1)


OTHERS = """
import sys
from pathlib import Path
import tiny
import transformers
import trl

kind, student, output_dir = sys.argv[1:]


class OwnLoopTrainer(trl.GRPOTrainer):
    def train(self):
        raise AssertionError("it trains by a loop of its own")


def make(trainer, config, data=tiny.make_dataset(), **options):
    args = config(output_dir, use_cpu=True, bf16=False, report_to="none")
    return trainer(
        model=tiny.make_model(0),
        args=args,
        train_dataset=data,
        processing_class=tiny.make_tokenizer(),
        **options,
    )


text = tiny.make_dataset().rename_column("prompt", "text")
trainer = {
    "GRPO": lambda: make(trl.GRPOTrainer, trl.GRPOConfig, reward_funcs=tiny.reward),
    "OwnLoop": lambda: make(OwnLoopTrainer, trl.GRPOConfig, reward_funcs=tiny.reward),
    "Distillation": lambda: make(trl.DistillationTrainer, trl.DistillationConfig, teacher_model=tiny.make_model(1)),
    "SFT": lambda: make(trl.SFTTrainer, trl.SFTConfig, text),
    "": lambda: transformers.Trainer(tiny.make_model(0), train_dataset=text),  # whose folder is `trainer_output`
}[kind]()
assert not Path(output_dir).exists(), "it writes to the folder"
trainer.train()
raise AssertionError("it has trained")
"""


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("GRPO", "trains with `GRPOTrainer`, which has no teacher. Two lines to change, and probe again:"),
        ("OwnLoop", "trains with `OwnLoopTrainer`, which has no teacher. Two lines"),
        ("Distillation", "first to train in the script is `DistillationTrainer`.*docs/migrating.md has the lines"),
        ("SFT", "first to train in the script is `SFTTrainer`, and `trl-rlad probe` probes an `RLADTrainer`"),
        ("", "first to train in the script is `Trainer`"),
    ],
)
def test_any_trainer_is_stopped_before_its_first_step(kind, says, probe, tmp_path, student_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(OTHERS)
    with pytest.raises(SystemExit, match=f"Refused: the.*{says}"):
        probe(kind, student_path)
    assert "Traceback" not in probe.err and {path.name for path in tmp_path.iterdir()} == {"train.py", "reports"}


def test_the_two_lines_to_change_make_a_script_that_can_be_probed(probe, tmp_path, student_path, teacher_path):
    """The very lines that the refusal has."""
    script = tmp_path / "train.py"
    text = """
import sys
import tiny
from trl import GRPOConfig, GRPOTrainer

student, teacher, output_dir = sys.argv[1:]
args = tiny.make_config(output_dir, GRPOConfig, per_device_eval_batch_size=4)
trainer = GRPOTrainer(student, tiny.reward, args, tiny.make_dataset())
trainer.train()
"""
    script.write_text(text)
    with pytest.raises(SystemExit, match="Refused"):
        probe(student_path, teacher_path)
    _, imports, call, _ = (line.strip() for line in probe.err.split("Refused: ")[1].strip().split("\n"))
    text = text.replace("from trl import GRPOConfig, GRPOTrainer", imports)
    keyword = call.removeprefix("trainer = GRPOTrainer(..., ").replace('"NAME OR PATH OF THE TEACHER"', "teacher")
    script.write_text(text.replace("tiny.make_dataset())", f"tiny.make_dataset(), {keyword}"))
    assert probe(student_path, teacher_path)[1]["prompts"] == 6


def test_what_goes_wrong_within_the_probe_ends_it_with_its_traceback(probe, student_path, teacher_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Probe, "run", fail)
    with pytest.raises(SystemExit, match="RuntimeError: out of memory"):
        probe(student_path, teacher_path)


def test_a_token_that_the_teacher_has_no_say_on_is_recorded_without_its_figures(make_trainer):
    batch = make_batch()
    batch |= {"teacher_entropy": torch.ones(6, 7), "teacher_top1": torch.ones(6, 7)}
    batch |= {"group": torch.arange(6), "reward": torch.arange(6.0)}
    batch["teacher_mask"][0, 1] = False
    scored = (batch["teacher_mask"] & batch["completion_mask"].bool()).sum(1).tolist()
    batch |= {"teacher_top_ids": [torch.full((n, 3), 5) for n in scored]}
    batch |= {"teacher_top_logps": [torch.zeros(n, 3) for n in scored]}
    guide = ProbeGuide(make_trainer())
    assert guide.guide(make_logps(batch), None, batch) == Guidance()  # of the loss there is nothing to be changed
    for row, record in enumerate(guide.records):
        has_say = batch["teacher_mask"][row, : len(record["ids"])].tolist()
        for name in ("teacher_logps", "top1", "entropy"):
            assert [value is not None for value in record[name]] == has_say, (row, name)
        assert [bool(named) for named in record["named"]] == has_say


FIGURES_TO_PRINT = {
    **{name: Estimate(0.0, 0.0, 0.4, 12) for rows in TABLE.values() for name in rows},
    "prompts": 3,
    "completions": 12,
    "tokens": 60,
    "tokens_without_say": 5,
    "gap_quantiles": {5: -1.0, 95: 2.0},
    "student": "pupil",
    "teacher": "master",
    "success_reward": 0.5,
    "teacher_accuracy": Estimate(0.25, 0.1, 0.4, 12),
    "teacher_rescues": Estimate(0.0, float("nan"), float("nan"), 1),
    "seconds": {"generation": 1.5, "scoring": 0.7},
    "device_memory_gib": {"generation": 3.0, "scoring": 9.0},
    "advice": {"do": "d <b>", "sure": "s", "paste": "p " * 200, "then": "", "evidence": "e", "limits": "m"},
}


def test_what_is_printed(capsys):
    nan = float("nan")
    print_report({**FIGURES_TO_PRINT, "gap_eos": Estimate(nan, nan, nan, 0)}, sys.stdout)
    printed = capsys.readouterr().out
    # However long it is, what is to be pasted is one line
    assert [line.split()[:4] for line in printed.split("\n")[:3]] == [
        ["What", "to", "do:", "d"],
        ["How", "sure:", "s"],
        ["Paste:", "p", "p", "p"],
    ]
    assert printed.split("\n")[2].count("p ") == 200
    for expected in (
        "evidence: e limits: m",
        "12 completions of 3 prompts, 60 tokens; the teacher has scored all but 5. Student: pupil; teacher: master.",
        "gap_first +0.00 +0.00 to +0.40 12 at the first token gap_eos - too few (0) 0 at the end of a completion",
        "signal 0% 0% to 25% 12 groups",  # by the rule of three
        "student_entropy 0.00 0.00 to 0.40 12 how",  # is no share,
        "teacher_accuracy 25% 10% to 40% 12 the",
        "teacher_rescues 0% too few (1) 1 prompts",
        "Quantiles of the gap: 5%: -1.00, 95%: +2.00",
        "0.7 s of scoring beside 1.5 s of generation; 9.0 GiB beside 3.0",
    ):
        assert expected in " ".join(printed.split()), expected
    assert "then:" not in printed


def test_what_is_drawn(tmp_path, monkeypatch):
    from matplotlib import pyplot

    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    rollouts = [rollout(0, 1.0, 1.0, [-1.0] * 3, [-1.0, -3.0, -19.0]), rollout(0, 0.4, -1.0, [-1.0], [-1.0])]
    shares = {**FIGURES_TO_PRINT, "signal": Estimate(0.5, 0.3, 0.6, 12), "top1": Estimate(*[float("nan")] * 3, 0)}
    write_picture(rollouts, shares, tmp_path / "picture.png")
    ((histogram, bars),) = ([*figure.axes] for figure in figures)
    tokens = {p.get_label(): p.get_xy()[:, 1].max() for p in histogram.patches if not p.get_label().startswith("_")}
    assert tokens == {"tokens of successes": 1.0, "tokens of failures": 1.0} and histogram.get_xlim()[1] > 6.0
    ends = {p.get_label(): p.get_xy()[:, 0][p.get_xy()[:, 1] > 0.5].max() for p in histogram.patches}
    assert ends["tokens of successes"] == pytest.approx(6.0) and ends["tokens of failures"] < 1.0
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names[::-1] == SHARES[:-1]  # nothing is drawn of what is not a number
    (_, _, (lines,)) = bars.containers[names.index("signal")]
    assert lines.get_segments()[0][:, 0].tolist() == pytest.approx([0.3, 0.6])
    assert not pyplot.get_fignums() or close(figures[0]) is None


def test_the_page_has_the_decision_the_picture_and_the_rollouts(tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"the picture")
    record = {**ROLLOUTS[0], "step": 0, "prompt": "say <i>", "tokens": ["a", "<b>"]}
    figures = {**FIGURES_TO_PRINT, "advice": {**FIGURES_TO_PRINT["advice"], "then": "<u>"}}
    page = render_page(figures, picture, [record])
    head, view = page.split("</table>")
    assert "<b>What to do: d &lt;b&gt;</b><p>How sure: s<p>Paste:" in head and f">{'p ' * 200}</pre>" in head
    assert "pupil, taught by master" in head
    assert f'src="data:image/png;base64,{b64encode(b"the picture").decode()}"' in head
    assert "then: &lt;u&gt;" in head and "<u>" not in page
    assert "<td>signal<td>0%<td>0% to 25%<td>12<td>groups" in head
    assert "<td>teacher_rescues<td>0%<td>too few (1)<td>1<td>" in head
    assert r"say \u003ci>" in view and r"\u003cb>" in view and "<i>" not in page and page.count("<!doctype") == 1
    assert "http:" not in page and "https:" not in page  # nothing is fetched


def test_the_student_as_its_own_teacher(probe, student_path):
    printed, figures = probe(student_path, student_path)
    for name in ("discrimination", "prefers_rewarded", "prefers_punished"):
        assert figures[name]["value"] == 0.5
    assert abs(figures["gap"]["value"]) < 1e-5
    assert printed.split("\n")[:3] == [
        "What to do: GRPO, without this teacher",
        "How sure:   certain: student and teacher are the same, to rounding",
        "Paste:      alpha=1.0",
    ]


def test_a_served_teacher(probe, student_path):
    with TeacherServer(student_path) as server:
        _, figures = probe(student_path, server.url)
        with pytest.raises(SystemExit, match="sample_teacher"):
            probe(student_path, server.url, options=["--sample_teacher"])
    # Every token of the student's own model, scored over there
    assert abs(figures["gap"]["value"]) < 1e-5 and figures["tokens_without_say"] == 0
    assert figures["discrimination"]["value"] == 0.5


def test_a_teacher_with_another_tokenizer(probe, student_path, tmp_path):
    renamed = tiny.save_renamed(tmp_path / "renamed", student_path)
    _, figures = probe(student_path, renamed)
    # Every token of the student's own model, but for the special ones
    assert abs(figures["gap"]["value"]) < 1e-5 and figures["tokens_without_say"] > 0
    with pytest.raises(SystemExit, match="a teacher with the student's tokenizer"):
        probe(student_path, renamed, options=["--sample_teacher"])


def test_no_such_command():
    with pytest.raises(SystemExit, match="no command 'prob'"):
        main(["prob"])


def test_the_command_line_is_that_of_the_process(monkeypatch, capsys):
    for flag in ("-h", "--help"):
        monkeypatch.setattr(sys, "argv", ["trl-rlad", flag])
        main()
        assert "usage: trl-rlad COMMAND" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["trl-rlad", "view", "nowhere"])
    with pytest.raises(SystemExit, match="There is no run at nowhere"):
        main()
