"""
Does `trl-rlad probe` foretell which method wins? Its figures beside the results of `comparison.py`.

    python benchmarks/probe_study.py

For each student and each teacher of that study, whose runs are in `results/comparison_runs.jsonl`. It takes three minutes on
a CPU core, and another three the first time, for the models of the study.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import comparison
import torch

from trl_rlad.commands.probe import Probe
from trl_rlad.probe import recommend, report


RESULTS = Path(__file__).parent / "results"
FIGURES = (
    "mean@1", "pass@k", "signal", "all_failed", "contradicted", "gap", "beyond_clip", "discrimination", "teacher_auc", "student_auc",
    "prefers_rewarded", "prefers_punished", "top1", "entropy", "student_entropy", "clip_high@0.5", "clip_low@0.5",
)  # fmt: skip
METHODS = ("RLAD", "credit", "KDRL", "on-policy distillation", "RLAD + named", "offline distillation")


def gains(student, teacher):
    """Gain over GRPO of each method in the study, in points, with half the width of its 95% interval."""
    plan = comparison.make_plan(student)
    results = comparison.read_results(RESULTS / "comparison_runs.jsonl")
    rates = comparison.choose_rates(comparison.select(results, comparison.shorten(plan)), plan)
    runs = comparison.select(results, plan)
    grpo = comparison.pick(runs, "GRPO", teacher, rates["GRPO"], plan["seeds"])
    found = {}
    for method in METHODS:
        of_method = comparison.pick(runs, method, teacher, rates.get(method), plan["seeds"]) if method in rates else []
        if of_method:
            differences = [
                100 * (comparison.final(a) - comparison.final(b)) for a, b in zip(of_method, grpo, strict=True)
            ]
            found[method] = mean(differences), comparison.interval(differences)
    return found


def probe(student, teacher, prompts, models):
    plan = comparison.make_plan(student)
    job = {"student": student, "teacher": teacher, "rate": 0.0, "seed": 0, "rollouts": 128}
    trainer = comparison.make_trainer(str(comparison.student_path(student, models)), {}, job, plan["steps"], models)
    trainer.args.per_device_eval_batch_size = 128
    probe = Probe(trainer)
    probe.run(prompts)
    figures = report(probe.rollouts, eos_token_ids=trainer.eos_token_ids)
    return figures | {"teacher_accuracy": probe.teacher_accuracy(prompts)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96, help="prompts of each probe, with 8 completions each")
    parser.add_argument("--models", type=Path, default=Path("outputs", "comparison"), help="where the models are or go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.models.mkdir(parents=True, exist_ok=True)
    cases = [(student, teacher) for student in comparison.STUDENTS for teacher in comparison.TEACHERS]
    for name in ("flawed_teacher", "hasty_student", "sheltered_student"):
        if not (args.models / name).exists():
            comparison.COMPARISON[name](args.models / name)
    found = {case: probe(*case, args.prompts, args.models) for case in cases}
    (args.models / "probe_study.json").write_text(json.dumps([[*case, figures] for case, figures in found.items()]))

    rows = [["", *(f"{student}, {teacher}" for student, teacher in cases)]]
    rows.append(["---"] * len(rows[0]))
    for name in FIGURES:
        rows.append([f"`{name}`", *("{:.2f} ({:.2f} to {:.2f})".format(*found[case][name]) for case in cases)])
    rows.append(["`teacher_accuracy`", *(f"{found[case]['teacher_accuracy']:.2f}" for case in cases)])
    study = {case: gains(*case) for case in cases}
    for method in METHODS:
        cells = [study[case].get(method) for case in cases]
        rows.append([f"{method}, over GRPO", *("{:+.1f} ± {:.1f}".format(*cell) if cell else "-" for cell in cells)])
    rows.append(["the probe's advice", *(recommend(found[case])["method"] for case in cases)])
    print("\n".join("| " + " | ".join(row).replace("nan (nan to nan)", "-") + " |" for row in rows))


if __name__ == "__main__":
    main()
