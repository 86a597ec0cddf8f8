"""
Run the main job, `examples/rlad_grpo.py`, by three methods with three seeds, and write the README's table and figure.

    python benchmarks/main_job.py

A run takes two minutes on two CPU cores; those that are in the output folder already aren't made again.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from comparison import interval


ROOT = Path(__file__).parents[1]
METHODS = {
    "RLAD, the teacher names where the student failed": "",
    "RLAD as in the paper": "--config examples/methods/rlad.yaml",
    "GRPO": "--config examples/methods/grpo.yaml",
}
SEEDS = (0, 1, 2)


def run(flags, seed, output_dir):
    """Accuracy before and after, by the number of people."""
    printed = output_dir / "printed.txt"
    if not printed.exists():
        command = [sys.executable, "-m", "accelerate.commands.launch", "examples/rlad_grpo.py", *flags.split()]
        command += ["--seed", str(seed), "--output_dir", str(output_dir)]
        stdout = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        printed.write_text(stdout)
    rows = re.findall(r"^ +(\d) +mean@1 +([\d.]+)% -> +([\d.]+)%$", printed.read_text(), re.MULTILINE)
    return [[float(row[column]) for row in rows] for column in (1, 2)]


def describe(runs):
    """Mean and 95% interval over the seeds, for each number of people and for their mean."""
    columns = [*zip(*runs, strict=True), [mean(run) for run in runs]]
    return " | ".join(f"{mean(column):.1f} ± {interval(column):.1f}" for column in columns)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "mini", help="where the runs go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the report goes")
    args = parser.parse_args()
    results = {
        method: [run(flags, seed, args.output_dir.absolute() / f"{index}-{seed}") for seed in SEEDS]
        for index, (method, flags) in enumerate(METHODS.items())
    }
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "trl-rlad"))
    lines = [
        "# The main job in miniature",
        "",
        f"`python benchmarks/main_job.py` on {time.strftime('%d %B %Y')}, {os.cpu_count()} CPU cores, {packages}.",
        "Held-out puzzles, 128 for each number of people (of two there are but 18 different ones), sampled at "
        "temperature 0.6",
        f"and top-p 0.95; accuracy in percent, mean and 95% interval over the seeds {', '.join(map(str, SEEDS))}.",
        "",
        "| | flags | 2 people | 3 people | 4 people | mean |",
        "|---|---|---|---|---|---|",
        f"| before | | {describe([scores[0] for scores in results['GRPO']])} |",
    ]
    for method, runs in results.items():
        flags = f"`{METHODS[method]}`" if METHODS[method] else ""
        lines.append(f"| {method} | {flags} | {describe([scores[1] for scores in runs])} |")
    lines += ["", "Single runs, 2 / 3 / 4 people:", "", "| | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " |"]
    lines.append("|---|" + "---|" * len(SEEDS))
    for method, runs in results.items():
        lines.append(f"| {method} | " + " | ".join(" / ".join(map(str, scores[1])) for scores in runs) + " |")
    (args.results / "mini.md").write_text("\n".join(lines) + "\n")

    plt.figure(figsize=(7, 4), layout="constrained")
    bars = {"before": [scores[0] for scores in results["GRPO"]]}
    bars |= {method: [scores[1] for scores in runs] for method, runs in results.items()}
    for index, (method, runs) in enumerate(bars.items()):
        color = "lightgray" if method == "before" else f"C{index - 1}"
        places = [people + 0.2 * (index - 1.5) for people in (2, 3, 4)]
        plt.bar(places, [mean(column) for column in zip(*runs, strict=True)], 0.18, label=method, color=color)
        for accuracies in runs:
            plt.plot(places, accuracies, ".", color="black", markersize=4)
    plt.xticks((2, 3, 4), [f"{people} people" for people in (2, 3, 4)])
    plt.ylabel("accuracy on held-out puzzles, %")
    plt.ylim(0, 130)
    plt.yticks(range(0, 101, 20))
    plt.legend(frameon=False, loc="upper center", ncols=2)
    plt.savefig(args.results / "mini.png", dpi=150)
    print(f"Wrote {args.results / 'mini.md'} and mini.png")


if __name__ == "__main__":
    main()
