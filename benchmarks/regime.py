"""
Draw when a teacher inside the loss helps: the gain of a method over GRPO against that of on-policy distillation over
GRPO.

    python benchmarks/regime.py

Ours from `benchmarks/results/comparison_runs.jsonl` and `chains_runs.jsonl`, with 95% intervals over the seeds; the
published ones, of single runs, from "Sequential Beats Joint" (arXiv 2609.04108; knights and knaves, Zebra, Countdown
and mathematics with Qwen3-8B teaching 1.7B and 0.6B) and the model card ziansu/r2egym-rlad (SWE-bench, 27B teaching
4B). On-policy distillation is that with k2 as published, without a bound; of the half-learned students, with one.
"""

import argparse
from pathlib import Path
from statistics import linear_regression, mean

import matplotlib.pyplot as plt
from comparison import STUDENTS, make_plan, split
from tables import final, interval, pick, read_results


# On-policy distillation - GRPO and TRRD - GRPO, in points of accuracy
PUBLISHED = {
    "K&K 1.7B": (22.4, 23.6),
    "K&K 0.6B": (28.6, 23.1),
    "Zebra 1.7B": (13.9, 10.1),
    "Zebra 0.6B": (9.2, 5.3),
    "Countdown 1.7B": (-22.9, -6.3),
    "Countdown 0.6B": (-26.1, -9.8),
    "MATH500": (3.6, 3.6),
    "AMC": (2.6, -0.5),
    "AIME24": (3.1, 2.6),
    "AIME25": (1.1, 1.3),
    "SWE 4B": (5.7, 5.8),
}
METHODS = ("RLAD", "RLAD + named", "offline distillation")
BEDS = (*STUDENTS, "half_gpt", "half_qwen3", "soft_qwen3", "far_qwen3")


def gains(results, plan, rates, method, teacher):
    """Mean and half a 95% interval of what a method gains over GRPO, seed by seed, in points."""
    grpo, runs = (pick(results, name, teacher, rates[name], plan["seeds"]) for name in ("GRPO", method))
    values = [100 * (final(run) - final(other)) for run, other in zip(runs, grpo, strict=True)]
    return mean(values), interval(values)


def main():
    here = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = [here / "comparison_runs.jsonl", here / "chains_runs.jsonl"]
    parser.add_argument("--runs", type=Path, nargs="+", default=runs, help="the runs of comparison.py")
    parser.add_argument("--output", type=Path, default=here / "regime.png", help="where to save the figure")
    args = parser.parse_args()
    plt.figure(figsize=(8, 6), layout="constrained")
    axis = plt.gca()
    axis.axhline(0, color="gray", linewidth=0.6)
    axis.axvline(0, color="gray", linewidth=0.6)
    axis.axline((0, 0), slope=1, color="gray", linewidth=0.6, linestyle=":")
    axis.scatter(
        *zip(*PUBLISHED.values(), strict=True), color="lightgray", marker="s", label="TRRD, published", zorder=2
    )
    for name, point in PUBLISHED.items():
        axis.annotate(name, point, color="gray", fontsize=7, xytext=(4, -8), textcoords="offset points")
    points = {"published": list(PUBLISHED.values()), "ours": []}
    every_result = [result for path in args.runs for result in read_results(path)]
    for student in BEDS:
        plan = make_plan(student)
        results, _, rates = split(every_result, plan)
        distillation = "on-policy distillation" + (student not in STUDENTS) * ", bounded"
        for teacher in ("strong", "flawed")[: 1 + (distillation in plan["flawed"])]:
            x, x_width = gains(results, plan, rates, distillation, teacher)
            place = {"xycoords": ("data", "axes fraction"), "rotation": 90, "va": "bottom", "ha": "right"}
            axis.annotate(f" {student}, {teacher} teacher", (x, 0), fontsize=7, **place)
            shown = plan["methods"] if teacher == "strong" else plan["flawed"]
            for index, method in enumerate(METHODS):
                if method not in shown or not pick(results, method, teacher, rates.get(method), plan["seeds"]):
                    continue
                y, y_width = gains(results, plan, rates, method, teacher)
                if method == "RLAD":
                    points["ours"].append((x, y))
                label = method if (student, teacher) == ("mistaken", "strong") else None
                settings = {"fmt": "o", "color": f"C{index}", "markersize": 4, "elinewidth": 1, "label": label}
                axis.errorbar(x, y, y_width, x_width, **settings)
                print(
                    f"{student:>10} {teacher:>7}  {x:+6.1f} ± {x_width:4.1f}  {method:>22}  {y:+6.1f} ± {y_width:4.1f}"
                )
    for whose, pairs in points.items():
        slope, intercept = linear_regression(*zip(*pairs, strict=True))
        print(f"RLAD's gain, {whose}: {slope:.2f} of distillation's and {intercept:+.1f} points ({len(pairs)} pairs)")
    axis.set(xlabel="on-policy distillation - GRPO, points", ylabel="method - GRPO, points")
    axis.set_xlim(right=36)
    axis.set_ylim(bottom=-55)  # room for the names
    axis.legend(frameon=False, loc="upper left")
    plt.savefig(args.output, dpi=150)
    print(f"Saved {args.output}")


if __name__ == "__main__":
    main()
