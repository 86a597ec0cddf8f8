"""What to do about what a probe has seen: the rule, how sure it is here, and what to paste."""

import json
from pathlib import Path
from shlex import join
from typing import Any, NamedTuple

import yaml

from .probe import FEW, SAME, Estimate, widen


# Bounds, settings and sentences of the study, by `benchmarks/probe_study.py`
STUDY = json.loads(Path(__file__).with_name("study.json").read_text())
OFFLINE = "offline"
WORDS = {
    "grpo": "GRPO, without this teacher",
    "rlad": "RLAD: the teacher grades each token that the student sampled",
    "rlad_named": "RLAD, and where the student failed the teacher names what it would have said",
    "rlad_named_all": "RLAD, and the teacher names what it would have said, on all completions",
    "opd_forward": "on-policy distillation: the teacher names what it would have said, and no reward",
    "distil_then_rlad": "distil on the student's own rollouts first, then RLAD",
    OFFLINE: "offline: the student imitates the teacher's right answers; then probe again",
}
# GRPO's, where a method says nothing else
OFF = {"alpha": 1.0, "teacher_credit": False, "teacher_kl_coef": 0.0, "distillation_fraction": 0.0}


# What a figure of the rule counts
TELLS = {
    "contradicted_failed": "failures in which the teacher contradicts what the student is sure of",
    "contradicted_succeeded": "successes in which it does so",
    "student_entropy": "the student's entropy in nats",
    "signal": "groups whose rewards differ",
    "teacher_accuracy": "answers of the teacher that succeed",
    "teacher_rescues": "prompts that the teacher answers, of those that the student never does",
}


class Choice(NamedTuple):
    """What to do `first` and what `then`, by their names in `WORDS`; whether the teacher is to be believed only
    `where_right`; and the figures on which this `turned`."""

    first: str
    then: str = ""
    where_right: bool = False
    turned: tuple[str, ...] = ()


def choose(figures: dict[str, Estimate], bounds: dict[str, float] = STUDY["bounds"]) -> Choice:
    """
    The rule, read off the project's own study.

    1. A teacher that is the student, to rounding, has nothing to say: GRPO.
    2. One that contradicts what the student is sure of in most failures names, in the loss, what it would have said,
       unless none of its own answers is right.
    3. If it contradicts successes too, or is itself often wrong, it is believed only where it is right, and names only
       where the student failed. If it was seen to be right, it names on all completions.
    4. Where it contradicts little, a soft student whose groups are mixed learns from its grades: RLAD; and from what
       it names, if its own answers were seen: wherever they are right. Elsewhere: GRPO.
    5. Before that, if it answers prompts on which the student fails throughout, and at least half of all: imitate its
       right answers offline.
    """
    turned = []

    def reaches(name):
        turned.append(name)
        return name in figures and figures[name].value >= bounds[name]

    if abs(figures["gap"].value) < SAME and figures["beyond_clip"].value == 0.0:
        return Choice("grpo")
    accuracy = figures.get("teacher_accuracy")
    knows = accuracy is None or accuracy.value != 0.0
    names = knows and reaches("contradicted_failed")
    flawed = names and (
        reaches("contradicted_succeeded") or (accuracy is not None and not reaches("teacher_accuracy"))
    )
    loss = "rlad_named" if names else "grpo"
    if knows and not names and reaches("student_entropy") and reaches("signal"):
        flawed = accuracy is not None and not reaches("teacher_accuracy")
        loss = "rlad" if accuracy is None else "rlad_named"
    if loss == "rlad_named" and accuracy is not None and not flawed:
        loss = "rlad_named_all"
    if reaches("teacher_rescues") and (accuracy is None or accuracy.value >= 0.5):
        return Choice(OFFLINE, loss, flawed, tuple(turned))
    return Choice(loss, "", flawed, tuple(turned))


def how_sure(choice: Choice, figures: dict) -> str:
    """Whether the figures on which what to do first has turned are clear of their bounds, in a sentence."""
    if not choice.turned:
        return "certain: student and teacher are the same, to rounding"
    names = ["teacher_rescues"] if choice.first == OFFLINE else [name for name in choice.turned if name in figures]
    told, doubts = [], []
    for name in names:
        is_share = name != "student_entropy"  # which is in nats
        value, low, high, groups = widen(figures[name]) if is_share else figures[name]
        bound = STUDY["bounds"][name]
        shown, least, most, limit = (f"{x:.0%}" if is_share else f"{x:.2f}" for x in (value, low, high, bound))
        if groups < FEW:
            doubts.append(f"{name} ({TELLS[name]}) rests on too few groups ({groups})")
        elif low < bound <= high:
            within = f"with the bound of {limit} within"
            doubts.append(f"{name} ({TELLS[name]}) is {least} to {most} ({groups} groups), {within}")
        told.append(f"{name} ({TELLS[name]}) is {shown} ({least} to {most}, {groups} groups), the bound {limit}")
    if doubts:
        text = f"not sure, ask again with --prompts {4 * figures['prompts']}: {'; '.join(doubts)}"
    else:
        text = f"clear, by bounds that rest on {STUDY['basis']}: {'; '.join(told)}"
    return text + ("" if "teacher_rescues" in figures else "; whether offline is better, --sample_teacher tells")


def recommend(figures: dict) -> dict[str, Any]:
    """
    Say what to do, by the rule of [`choose`].

    Args:
        figures (`dict`):
            What [`~trl_rlad.reports.probe.report`] returned and, if the teacher was sampled, `teacher_accuracy` and
            `teacher_rescues`.

    Returns:
        `dict[str, Any]`: `method` (a name in `WORDS`), what to `do` and how `sure` that is in a sentence each, what
        comes `then` in the loss, the `settings` of the loss by name, `teacher_weight` (whether it needs that column),
        `evidence` and `limits`.
    """
    choice = choose(figures)
    loss = choice.then or choice.first
    where_right = ", and is believed only where it is right" if choice.where_right else ""
    return {
        "method": choice.first,
        "do": WORDS[choice.first] + ("" if choice.then else where_right),
        "sure": how_sure(choice, figures),
        "then": choice.then and WORDS[choice.then] + where_right,
        "settings": OFF | STUDY["settings"][loss],
        "teacher_weight": choice.where_right,
        "evidence": " ".join(STUDY["evidence"][x] for x in choice.turned if x in figures and x in STUDY["evidence"]),
        "limits": STUDY["limits"],
    }


def settings_to_paste(advice: dict, now: Any, script: str, arguments: list[str]) -> str:
    """
    Those settings of an advice that a script doesn't have yet, in the form in which it is configured.

    Args:
        advice (`dict`):
            What [`recommend`] returned.
        now ([`RLADConfig`]):
            The script's settings.
        script (`str`), arguments (`list[str]`):
            The script, or `"train"`, and its arguments.

    Returns:
        `str`: a command for `trl-rlad train`; YAML for a script with `--config`; flags for one that has some of ours;
        else keyword arguments. `"as you have it"` where nothing is to be changed.
    """
    wanted = dict(advice["settings"])
    if now.teacher_kl_coef_final is not None:  # no flag takes it back
        wanted["teacher_kl_coef_final"] = wanted["teacher_kl_coef"]
    changes = {name: value for name, value in wanted.items() if getattr(now, name) != value}
    flags = {word.split("=")[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("--")}
    is_file = "config" in flags and not flags & changes.keys()
    if advice["teacher_weight"] and script == "train" and "teacher_samples" not in flags:
        changes["teacher_samples"] = 4
    as_flags = "".join(f" --{name} {'inf' if value is None else value}" for name, value in changes.items())
    command = f"trl-rlad {join(['train', *arguments])}{as_flags}" if script == "train" else as_flags.strip()
    if not changes:
        text = "as you have it" + (f": {command}" if command else "")
    elif is_file:
        text = f"in your file:\n{yaml.safe_dump(changes, sort_keys=False).strip()}"
    elif command and (script == "train" or any(hasattr(now, flag) for flag in flags)):
        text = command
    else:
        text = ", ".join(f"{name}={value!r}" for name, value in changes.items())
    if advice["teacher_weight"] and script != "train":
        text += "  # and a column `teacher_weight` in the dataset"
    return text
