"""What the runs of `comparison.py` come to: rates, means over seeds with their intervals, tables and curves."""

import json
import os
import time
from importlib.metadata import version
from statistics import mean, stdev

import matplotlib.pyplot as plt


PACKAGES = ("torch", "transformers", "trl", "trl-rlad")
# Two-sided 95% quantile of Student's t, by the number of seeds
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
SHOWN = (
    "GRPO",
    "RLAD",
    "KDRL",
    "on-policy distillation",
    "offline distillation",
    "RLAD + named",
    "RLAD + named, trusted",
    "distil, then GRPO",
)


def read_results(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_result(path, result):
    """Append a line to a file of results."""
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def select(results, plan):
    """The runs that are a plan's own."""
    return [r for r in results if all(r[name] == plan[name] for name in ("student", "steps"))]


def choose_rates(results, plan):
    """The learning rate of each method: of the runs with seed 0, that of the best. None for one that wasn't tried."""

    def best(method):
        runs = pick(results, plan["shared_rate"].get(method, method), "strong", None, [0])
        return max(runs, key=final)["rate"] if runs else None

    if len(plan["rates"]) == 1:
        return dict.fromkeys(plan["methods"], plan["rates"][0])
    return {method: rate for method in plan["methods"] if (rate := best(method)) is not None}


def pick(results, method, teacher, rate, seeds):
    """The runs of one method at one rate, or at any, in the order of their seeds."""
    teacher = "strong" if method == "GRPO" else teacher
    runs = [r for r in results if (r["method"], r["teacher"]) == (method, teacher) and r["seed"] in seeds]
    return sorted((run for run in runs if rate in (None, run["rate"])), key=lambda run: run["seed"])


def final(result):
    return mean(result["curve"][-1][1:])


def area(result):
    """Mean accuracy over the steps."""
    points = [(step, mean(scores)) for step, *scores in result["curve"]]
    pieces = [(b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(points, points[1:], strict=False)]
    return sum(pieces) / points[-1][0]


def interval(values):
    """Half the width of the 95% interval of the mean. Of one value it isn't known."""
    return T_QUANTILE[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def steps_to(runs, target):
    """First step at which the mean accuracy of the runs reaches `target`."""
    for points in zip(*(run["curve"] for run in runs), strict=True):
        if mean(mean(point[1:]) for point in points) >= target:
            return points[0][0]
    return None


def by_people(index):
    return lambda runs: f"{mean(run['curve'][-1][index] for run in runs):.1%}"


def with_operators(runs):
    shares = [run["by_operator"] for run in runs if "by_operator" in run]
    return " / ".join(f"{mean(each[operator] for each in shares):.0%}" for operator in "&|" if shares) or "-"


def logged(part, form, *names):
    """What was logged in one part of the runs, averaged over them."""

    def describe(runs):
        values = [[run["logs"][name][part] for run in runs if run["logs"][name]] for name in names]
        return " / ".join(format(mean(each), form) for each in values if each) or "-"

    return describe


# Columns that a bed has beside those of all, by whether its puzzles are of several difficulties
PEOPLE = {f"{n} people": by_people(n - 1) for n in (2, 3, 4)}
OF_KNIGHTS = {"with `&` / with <code>&#124;</code>": with_operators}
OF_CHAINS = {
    "area": lambda runs: f"{mean(map(area, runs)):.1%}",
    "pass@16": lambda runs: f"{mean(run['pass@16'] for run in runs):.1%}",
    "entropy at the end": logged(-1, ".2f", "entropy"),
    "gated at first, rewarded / punished": logged(0, ".1%", "clip_ratio/high_by_teacher", "clip_ratio/low_by_teacher"),
    "CPU seconds": lambda runs: f"{mean(run['cpu_seconds'] for run in runs):.0f}",
}


def tabulate(results, rates, plan, teacher):
    """Every method with one teacher, and its difference from GRPO seed by seed."""
    grpo = pick(results, "GRPO", teacher, rates["GRPO"], plan["seeds"])
    seeds = [run["seed"] for run in grpo]
    start = grpo[0]["curve"][0][1:]
    people, further = (PEOPLE, OF_KNIGHTS) if len(start) > 1 else ({}, OF_CHAINS)
    names = ["method", "learning rate", *people, "mean", "over GRPO", *further, "steps to GRPO's end"]
    rows = [names, ["---"] * len(names)]
    rows.append(
        ["before", "", *(f"{x:.1%}" for x in start if people), f"{mean(start):.1%}", *[""] * (2 + len(further))]
    )
    for method, rate in rates.items():
        runs = pick(results, method, teacher, rate, seeds)
        if len(runs) < len(grpo):  # only tried with the strong teacher, or not yet
            continue
        scores = [final(run) for run in runs]
        gains = [score - final(other) for score, other in zip(scores, grpo, strict=True)]
        rows.append(
            [
                method,
                f"{rate:g}",
                *(describe(runs) for describe in people.values()),
                f"{mean(scores):.1%} ± {interval(scores):.1%}",
                "" if method == "GRPO" else f"{100 * mean(gains):+.1f} ± {100 * interval(gains):.1f}",
                *(describe(runs) for describe in further.values()),
                str(steps_to(runs, mean(map(final, grpo))) or "-"),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def tabulate_sweep(results, plan, rates):
    """Final accuracy of the runs with seed 0, from which the rates were chosen, and the largest rate at which the
    student isn't worse at the end than before."""
    in_order = sorted(plan["rates"])
    rows = ["| method | " + " | ".join(f"{rate:g}" for rate in in_order) + " | bears |"]
    rows.append("|---|" + "---|" * (len(in_order) + 1))
    for method in rates:
        if method not in plan["shared_rate"]:
            runs = {run["rate"]: run for run in pick(results, method, "strong", rate=None, seeds=[0])}
            borne = [rate for rate, run in runs.items() if final(run) >= mean(run["curve"][0][1:])]
            cells = [f"{final(runs[rate]):.1%}" if rate in runs else "" for rate in in_order]
            rows.append(f"| {method} | {' | '.join(cells)} | {max(borne, default=''):{'g' if borne else ''}} |")
    return "\n".join(rows)


def plot(results, rates, plan, teachers, path):
    """Mean accuracy over the steps, with a band of 95%."""
    figure, axes = plt.subplots(1, len(teachers), figsize=(11, 4.5), sharey=True, squeeze=False, layout="constrained")
    for axis, teacher in zip(axes[0], teachers, strict=True):
        for index, method in enumerate(method for method in plan.get("shown", SHOWN) if method in rates):
            runs = pick(results, method, teacher, rates[method], plan["seeds"])
            if not runs:
                continue
            steps = [point[0] for point in runs[0]["curve"]]
            scores = [
                [mean(point[1:]) for point in points] for points in zip(*(run["curve"] for run in runs), strict=True)
            ]
            means, widths = [mean(s) for s in scores], [interval(s) for s in scores]
            axis.plot(steps, means, label=method, color=f"C{index}")
            low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=f"C{index}", alpha=0.12, linewidth=0)
        axis.set(title=f"{teacher} teacher", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("held-out accuracy")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def report(results, swept, rates, plan, path, command):
    """Write the tables to `path` and the curves beside it, as far as there are runs."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    strong = pick(results, "GRPO", "strong", rates.get("GRPO"), plan["seeds"])
    counts = {
        teacher: [len(pick(results, method, teacher, rate, plan["seeds"])) for method, rate in rates.items()]
        for teacher in ("strong", "flawed")
    }
    teachers = [teacher for teacher in counts if strong and sorted(counts[teacher])[-2:] == 2 * [len(strong)]]
    parts = [
        f"# The comparison in miniature: {plan['student']}",
        f"`{command}` on {time.strftime('%d %B %Y')}: {plan['steps']} steps of {plan['rollouts']} rollouts (offline "
        "distillation: as many samples of the teacher, made once; of a pool of puzzles, 8 of each), seeds "
        f"{', '.join(str(run['seed']) for run in strong) or 'not run yet'}, {os.cpu_count()} CPU cores, {packages}.",
        f"Accuracy on held-out puzzles, {plan['measured']}; mean with 95% interval over the seeds (Student's t), and "
        "the difference from GRPO, seed by seed. *Steps to GRPO's end* is where the mean curve first reaches GRPO's "
        f"final mean, measured every {plan['eval_steps']} steps.",
    ]
    parts += [
        f"## {teacher.capitalize()} teacher\n\n{tabulate(results, rates, plan, teacher)}" for teacher in teachers
    ]
    if len(plan["rates"]) > 1:
        sweep = plan | plan.get("sweep", {})
        parts.append(
            f"## The learning rates\n\nFinal accuracy with seed 0 and the strong teacher, after {sweep['steps']} "
            f"steps of {sweep['rollouts']} rollouts.\n\n{tabulate_sweep(swept, plan, rates)}"
        )
    path.write_text("\n\n".join(parts) + "\n")
    if teachers:
        plot(results, rates, plan, teachers, path.with_suffix(".png"))
    print(f"Wrote {path}")
