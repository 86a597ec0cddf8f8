"""
Run the main job, `examples/rlad_grpo.py`, by four methods with five seeds, and write the README's table and figure.

    python benchmarks/main_job.py

A run takes a minute of one CPU core, and two go side by side; those that are in the output folder already
aren't made again.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from tables import PACKAGES, interval


ROOT = Path(__file__).parents[1]
METHODS = {
    "GRPO": "--method grpo",
    "KDRL": "--method kdrl_bounded --teacher_kl_coef 0.2",
    "RLAD": "",
    "RLAD, the teacher names where the student failed": "--method rlad_named",
}
SEEDS = (0, 1, 2, 3, 4)


def run(flags, seed, output_dir):
    """Accuracy in percent before and after."""
    folder = output_dir / f"{re.sub('[^a-z0-9.]+', '_', flags).strip('_') or 'main'}-{seed}"
    printed = folder / "printed.txt"
    if not printed.exists():
        command = [sys.executable, "-m", "accelerate.commands.launch", "examples/rlad_grpo.py", *flags.split()]
        command += ["--seed", str(seed), "--output_dir", str(folder)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        stdout = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        printed.write_text(stdout)
    before, after = re.search(r"^ +chains +mean@1 +([\d.]+)% -> +([\d.]+)%$", printed.read_text(), re.M).groups()
    return float(before), float(after)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "main_job", help="where the runs go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the report goes")
    parser.add_argument("--flags", default="", help='further ones for all runs, such as "--max_steps 600"')
    args = parser.parse_args()
    jobs = list(product(SEEDS, METHODS))
    with ThreadPoolExecutor(2) as pool:
        runs = [(f"{METHODS[method]} {args.flags}".strip(), seed, args.output_dir.absolute()) for seed, method in jobs]
        found = pool.map(lambda each: run(*each), runs)
    found = dict(zip(jobs, found, strict=True))
    results = {"before": [found[seed, "GRPO"][0] for seed in SEEDS]}
    results |= {method: [found[seed, method][1] for seed in SEEDS] for method in METHODS}
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines = [
        "# The main job",
        "",
        f"`{shlex.join(['python', *sys.argv])}` on {time.strftime('%d %B %Y')}, {packages}.",
        "Accuracy in percent on 2,000 held-out puzzles, sampled at temperature 0.6 and top-p 0.95, mean and 95%",
        "interval over five seeds; one learning rate for all, the best for GRPO.",
        "",
        f"| | flags | accuracy | {' | '.join(f'seed {seed}' for seed in SEEDS)} |",
        "|---|---|---|" + "---|" * len(SEEDS),
    ]
    for method, scores in results.items():
        flags = f"`{METHODS[method]}`" if METHODS.get(method) else ""
        cells = [method, flags, f"{mean(scores):.1f} ± {interval(scores):.1f}", *map(str, scores)]
        lines.append(f"| {' | '.join(cells)} |")
    (args.results / "main_job.md").write_text("\n".join(lines) + "\n")

    plt.figure(figsize=(7, 2.6), layout="constrained")
    for place, (method, scores) in enumerate(results.items()):
        plt.barh(-place, mean(scores), 0.6, color="lightgray" if method == "before" else f"C{place - 1}")
        plt.plot(scores, [-place] * len(scores), ".", color="black", markersize=4)
        plt.text(mean(scores) / 2, -place, f"{mean(scores):.0f}%", ha="center", va="center")
    plt.yticks(
        [-place for place in range(len(results))],
        [name.replace(" where the student failed", "").replace(", ", ",\n") for name in results],
    )
    plt.xlabel("accuracy on held-out puzzles, %")
    plt.xlim(0, 100)
    plt.savefig(args.results / "main_job.png", dpi=150)
    print(f"Wrote {args.results / 'main_job.md'} and main_job.png")


if __name__ == "__main__":
    main()
