"""
Does `trl-rlad probe` foretell which method wins? Its figures beside the results of `comparison.py`.

    python benchmarks/probe_study.py

For each student and each teacher of that study, whose runs are in `results/comparison_runs.jsonl`. It takes three minutes on
a CPU core, and another three the first time, for the models of the study.
"""

import argparse
from pathlib import Path
from statistics import mean

import comparison
import torch

from trl_rlad.reports.probe import recommend, report
from trl_rlad.reports.probe_run import Probe


RESULTS = Path(__file__).parent / "results"
FIGURES = (
    "mean@1", "pass@k", "signal", "all_failed", "student_entropy", "gap", "beyond_clip", "discrimination", "teacher_auc", "student_auc",
    "prefers_rewarded", "prefers_punished", "contradicted_failed", "contradicted_succeeded", "top1", "entropy", "clip_high@0.5", "clip_low@0.5",
)  # fmt: skip
METHODS = ("RLAD", "credit", "KDRL", "on-policy distillation", "RLAD + named", "offline distillation")


HEAD = """# The probe beside the study

`python benchmarks/probe_study.py`: figures of `trl-rlad probe` on {prompts} prompts with 8 completions each, taken before any
training, in brackets their 95% intervals (bootstrap over prompts); below them, the gain of each method over GRPO after
training, in points, from the runs of [the comparison](../../comparison.py).
"""


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
    return figures | probe.sample_teacher(prompts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96, help="prompts of each probe, with 8 completions each")
    parser.add_argument(
        "--models", type=Path, default=Path("outputs", "comparison"), help="where the models are or go"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.models.mkdir(parents=True, exist_ok=True)
    cases = [(student, teacher) for student in comparison.STUDENTS for teacher in comparison.TEACHERS]
    for name in ("flawed_teacher", "hasty_student", "sheltered_student"):
        if not (args.models / name).exists():
            comparison.COMPARISON[name](args.models / name)
    found = {case: probe(*case, args.prompts, args.models) for case in cases}

    rows = [["", *(f"{student}, {teacher}" for student, teacher in cases)]]
    rows.append(["---"] * len(rows[0]))
    for name in FIGURES:
        rows.append([f"`{name}`", *("{:.2f} ({:.2f} to {:.2f})".format(*found[case][name]) for case in cases)])
    for name in ("teacher_accuracy", "teacher_rescues"):
        rows.append([f"`{name}`", *(f"{found[case][name]:.2f}" for case in cases)])
    study = {case: gains(*case) for case in cases}
    for method in METHODS:
        cells = [study[case].get(method) for case in cases]
        rows.append([f"{method}, over GRPO", *("{:+.1f} ± {:.1f}".format(*cell) if cell else "-" for cell in cells)])
    for name in ("before", "in the loss"):
        rows.append([f"the probe's advice: {name}", *(recommend(found[case])[name].split(" (")[0] for case in cases)])
    table = "\n".join("| " + " | ".join(row).replace("nan (nan to nan)", "-") + " |" for row in rows)
    path = RESULTS / "probe" / "study.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{HEAD.format(prompts=args.prompts)}\n{table}\n")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
