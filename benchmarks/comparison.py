"""
GRPO, KDRL, on-policy and offline distillation, RLAD and its variants, side by side in miniature.

    python benchmarks/comparison.py                        # the whole study: two hours on two CPU cores
    python benchmarks/comparison.py --student sheltered    # with the other student: an hour and a half
    python benchmarks/comparison.py --quick                # two of its seeds and six of its methods: ten minutes

The puzzles and the strong teacher are those of `examples/rlad_grpo.py`. The flawed teacher is right but for one operator,
which it misreads. The *hasty* student knows the task but has a habit that hides it, so it is seldom right; the *sheltered*
one is small and has hardly seen two of the four operators, the misread one among them. Every method has the same number of
steps and of rollouts. The learning rate of each method and teacher is chosen among the same three, by one run each; the
figures come from other seeds. Each run adds one line to `runs.jsonl` in the output folder, from which the study goes on if
it is interrupted. Two runs go side by side, on one thread each.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
import transformers
import variants
from datasets import concatenate_datasets, load_from_disk
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import SFTConfig

from trl_rlad import RLADConfig


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "mini")]

import offline_distillation  # noqa: E402
from evaluate import evaluate  # noqa: E402
from knights_knaves import MAX_COMPLETION_LENGTH, correctness_reward, make_dataset  # noqa: E402
from make_models import COMPARISON  # noqa: E402


MINI = EXAMPLES / "mini"
PEOPLE = (2, 3, 4)
TEACHERS = ("strong", "flawed")
RATES = (1e-4, 3e-4, 1e-3)
ROLLOUTS = 128  # a step: 16 prompts with 8 rollouts each, or as many kept samples of the teacher
# Two-sided 95% quantile of Student's t, by the number of seeds
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

# Name, trainer ("RLADTrainer", one of `variants.py`, or none for offline distillation) and settings
KDRL = {"alpha": 1.0, "teacher_kl_coef": 0.2}
METHODS = {
    "GRPO": ("RLADTrainer", {"alpha": 1.0}),
    "KDRL 0.002": ("RLADTrainer", KDRL | {"teacher_kl_coef": 2e-3}),
    "KDRL 0.2": ("RLADTrainer", KDRL),
    "KDRL annealed": ("RLADTrainer", KDRL | {"teacher_kl_coef_final": 2e-3}),
    "KDRL masked": ("RLADTrainer", KDRL | {"teacher_kl_rows": "failed"}),
    "on-policy distillation": ("RLADTrainer", KDRL | {"reward_weights": [0.0]}),
    "offline distillation": (None, {}),
    "RLAD": ("RLADTrainer", {}),
}
# A divergence where no completion succeeded, and only in the first half of training
EARLY_KL = {
    "teacher_kl_coef": 0.2,
    "teacher_kl_coef_final": 0.0,
    "teacher_scheduler_ratio": 0.5,
    "teacher_kl_estimator": "k3",
    "teacher_kl_rows": "unsolved",
}
KL_K3 = {"teacher_kl_coef": 0.2, "teacher_kl_estimator": "k3"}
CREDIT = {"teacher_credit": True}
CANDIDATES = {
    "gate": ("GateTrainer", {}),
    "gate + early KL": ("GateTrainer", EARLY_KL),
    "RLAD + early KL": ("RLADTrainer", EARLY_KL),
    "GRPO + early KL": ("RLADTrainer", EARLY_KL | {"alpha": 1.0}),
    "RLAD + masked KL": ("RLADTrainer", {"teacher_kl_coef": 0.2, "teacher_kl_rows": "failed"}),
    "KDRL k3": ("RLADTrainer", KL_K3 | {"alpha": 1.0}),
    "RLAD + KL k3": ("RLADTrainer", KL_K3),
    "gate + trusted KL k3": ("TrustedKLTrainer", KL_K3),
    "RLAD, alpha 0.1 to 1": ("RLADTrainer", {"alpha": 0.1, "alpha_final": 1.0}),
    "credit": ("RLADTrainer", CREDIT),
    "credit, clamp 2": ("RLADTrainer", CREDIT | {"teacher_log_ratio_clip": 2.0}),
    "gate + credit": ("GateTrainer", CREDIT | {"teacher_log_ratio_clip": 2.0}),
}
STUDENTS = {
    "hasty": {
        "steps": 40,
        "eval_steps": 8,
        "seeds": (1, 2, 3, 4, 5, 6, 7, 8),
        "ablation_seeds": (1, 2, 3, 4, 5),
        "candidates": (
            "gate",
            "RLAD + early KL",
            "gate + early KL",
            "GRPO + early KL",
            "RLAD, alpha 0.1 to 1",
            "credit",
            "credit, clamp 2",
            "gate + credit",
        ),
    },
    "sheltered": {
        "steps": 80,
        "eval_steps": 16,
        "seeds": (1, 2, 3, 4, 5),
        "ablation_seeds": (1, 2, 3),
        "candidates": (
            "gate",
            "RLAD + early KL",
            "RLAD + masked KL",
            "KDRL k3",
            "RLAD + KL k3",
            "gate + trusted KL k3",
            "RLAD, alpha 0.1 to 1",
            "credit",
            "credit, clamp 2",
            "gate + credit",
        ),
    },
}
OPTIONS = ("credit", "RLAD + early KL")  # the candidates that users are pointed to: in the plot and the quick study
JOB = ("student", "method", "teacher", "rate", "seed", "steps")  # what tells one run from another
QUICK = {"rates": (3e-4,), "seeds": (1, 2), "ablation_seeds": (), "candidates": OPTIONS}
CONSTANT_KDRL = ("KDRL 0.002", "KDRL 0.2")  # of which the better one in the sweep is run with the other seeds
QUICK_METHODS = ("GRPO", "KDRL 0.2", "offline distillation", "RLAD")
# With the strong teacher and at the rate of the method that they vary
ABLATIONS = {
    "RLAD": {f"alpha {alpha}": ("RLADTrainer", {"alpha": alpha}) for alpha in (0.1, 0.3, 0.7, 0.9)}
    | {f"clamp {clip}": ("RLADTrainer", {"teacher_log_ratio_clip": clip}) for clip in (None, 0.5, 2.0)},
    "credit": {f"credit, alpha {alpha}": ("RLADTrainer", CREDIT | {"alpha": alpha}) for alpha in (0.1, 0.3, 0.7, 0.9)},
}
ALL = METHODS | CANDIDATES | ABLATIONS["RLAD"] | ABLATIONS["credit"]


@cache
def held_out_puzzles():
    return concatenate_datasets([make_dataset([n], 200, seed=0, held_out=True) for n in PEOPLE])


def measure(model):
    """Accuracy on held-out puzzles by the number of people, sampled as in the paper, always with the same seed."""
    was_training = model.training
    with torch.random.fork_rng():
        scores = evaluate(
            model,
            held_out_puzzles(),
            correctness_reward,
            best=1.0,
            num_samples=1,
            max_new_tokens=MAX_COMPLETION_LENGTH,
            batch_size=600,
        )
    model.train(was_training)
    return [scores[str(n)]["mean@1"] for n in PEOPLE]


@cache
def measure_before(student):
    """Accuracy before any training."""
    return measure(AutoModelForCausalLM.from_pretrained(student))


def make_trainer(student, method, teacher, rate, seed, steps, output_dir):
    trainer_name, settings = ALL[method]
    student = student_path(student, output_dir)
    kwargs = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "max_steps": steps,
        "per_device_train_batch_size": ROLLOUTS,
        "seed": seed,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if trainer_name is None:
        samples = load_from_disk(samples_path(teacher, steps, output_dir))
        return offline_distillation.make_trainer(student, samples, SFTConfig(str(output_dir / "trainer"), **kwargs))

    args = RLADConfig(str(output_dir / "trainer"), max_completion_length=MAX_COMPLETION_LENGTH, **kwargs, **settings)
    return getattr(variants, trainer_name)(
        student,
        correctness_reward,
        args,
        make_dataset(PEOPLE, steps * ROLLOUTS // 8, seed, held_out=False),
        teacher_model=str(teacher_path(teacher, output_dir)) if args.needs_teacher else None,
    )


def teacher_path(teacher, output_dir):
    return MINI / "teacher" if teacher == "strong" else output_dir / "flawed_teacher"


def student_path(student, output_dir):
    return str(output_dir / f"{student}_student")


def samples_path(teacher, steps, output_dir):
    return output_dir / f"{teacher}_samples_{steps}"


def prepare(plan, output_dir):
    """Make the flawed teacher and the student, and each teacher's pool of samples for offline distillation."""
    for name in ("flawed_teacher", f"{plan['student']}_student"):
        if not (output_dir / name).exists():
            COMPARISON[name](output_dir / name)
    # As many samples as the other methods draw rollouts
    puzzles = make_dataset(PEOPLE, plan["steps"] * ROLLOUTS // 8, seed=0, held_out=False)
    for teacher in TEACHERS:
        if not (path := samples_path(teacher, plan["steps"], output_dir)).exists():
            samples, counts = offline_distillation.collect(
                str(teacher_path(teacher, output_dir)),
                puzzles,
                correctness_reward,
                best=1.0,
                samples_per_prompt=8,
                max_new_tokens=MAX_COMPLETION_LENGTH,
            )
            print(f"{teacher} teacher: {counts}")
            samples.save_to_disk(path)


def run(job):
    """Train and measure once. Returns the job with its results."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    class Curve(TrainerCallback):
        points, seconds = [], 0.0

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % job["eval_steps"] == 0:
                start = time.perf_counter()
                self.points.append([state.global_step, *measure(model)])
                self.seconds += time.perf_counter() - start

    output_dir = Path(job["output_dir"])
    trainer = make_trainer(*(job[name] for name in JOB), output_dir)
    trainer.remove_callback(PrinterCallback)
    curve = Curve()
    curve.points = [[0, *measure_before(student_path(job["student"], output_dir))]]
    trainer.add_callback(curve)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start - curve.seconds
    return {name: job[name] for name in JOB} | {"seconds": round(seconds, 1), "curve": curve.points}


def run_missing(jobs, plan, output_dir):
    """Run, two at a time, the jobs that `runs.jsonl` doesn't have. Returns the results of all runs it then has."""
    path = output_dir / "runs.jsonl"
    results = read_results(output_dir)
    done = {identify(result) for result in results}
    settings = {name: plan[name] for name in ("student", "steps", "eval_steps")} | {"output_dir": str(output_dir)}
    jobs = [job | settings for job in jobs]
    jobs = [job for job in jobs if identify(job) not in done]
    with multiprocessing.get_context("spawn").Pool(2) as pool, path.open("a") as file:
        for result in tqdm(pool.imap_unordered(run, jobs), total=len(jobs), desc="Runs"):
            file.write(json.dumps(result) + "\n")
            file.flush()
            results.append(result)
    return [r for r in results if all(r[name] == plan[name] for name in ("student", "steps"))]


def read_results(output_dir):
    path = output_dir / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def identify(job):
    return tuple(job[name] for name in JOB)


def final(result):
    return mean(result["curve"][-1][1:])


def study(plan, methods, output_dir):
    """Run everything. Returns the results, the methods in each teacher's table, and the rates by method and teacher."""

    def make_jobs(pairs, rates, seeds):
        return [
            {"method": method, "teacher": teacher, "rate": rate, "seed": seed}
            for seed in seeds
            for method, teacher in pairs
            if (method, teacher) != ("GRPO", "flawed")  # it has no teacher
            for rate in rates[method, teacher]
        ]

    tables = {teacher: [*methods, *plan["candidates"]] for teacher in TEACHERS}
    pairs = [(method, teacher) for teacher in TEACHERS for method in tables[teacher]]
    rates = dict.fromkeys(pairs, plan["rates"])
    if len(plan["rates"]) > 1:
        results = run_missing(make_jobs(pairs, rates, [0]), plan, output_dir)
        best = {pair: max(pick(results, *pair, rate=None, seeds=[0]), key=final) for pair in pairs}
        rates = {pair: [run["rate"]] for pair, run in best.items()}
        for teacher, table in tables.items():
            table.remove(min(CONSTANT_KDRL, key=lambda name: final(best[name, teacher])))
    pairs = [(method, teacher) for teacher in TEACHERS for method in tables[teacher]]
    ablations = {}
    if plan["ablation_seeds"]:
        ablations = {(name, "strong"): rates[base, "strong"] for base, names in ABLATIONS.items() for name in names}
    rates |= ablations
    jobs = make_jobs(pairs, rates, plan["seeds"]) + make_jobs(ablations, rates, plan["ablation_seeds"])
    return run_missing(jobs, plan, output_dir), tables, {pair: chosen[0] for pair, chosen in rates.items()}


def pick(results, method, teacher, rate, seeds):
    """The runs of one method at one rate, or at any."""
    teacher = "strong" if method == "GRPO" else teacher
    runs = [r for r in results if (r["method"], r["teacher"]) == (method, teacher) and r["seed"] in seeds]
    return [run for run in runs if rate in (None, run["rate"])]


def interval(values):
    """Half the width of the 95% interval of the mean."""
    return T_QUANTILE[len(values)] * stdev(values) / len(values) ** 0.5


def steps_to(runs, target):
    """First step at which the mean accuracy of the runs reaches `target`."""
    for points in zip(*(run["curve"] for run in runs), strict=True):
        if mean(mean(point[1:]) for point in points) >= target:
            return points[0][0]
    return None


def tabulate(results, rates, plan, methods, teacher, seeds):
    grpo = pick(results, "GRPO", teacher, rates["GRPO", teacher], plan["seeds"])
    target = mean(map(final, grpo))
    rows = [
        "| method | learning rate | 2 people | 3 people | 4 people | mean | steps to GRPO's end |",
        "|---|---|---|---|---|---|---|",
    ]
    before = [mean(run["curve"][0][i] for run in grpo) for i in range(1, 4)]
    rows.append("| before | | " + " | ".join(f"{x:.1%}" for x in before) + f" | {mean(before):.1%} | |")
    for method in methods:
        runs = pick(results, method, teacher, rates[method, teacher], seeds)
        rate, scores = runs[0]["rate"], [final(run) for run in runs]
        cells = [f"{mean(run['curve'][-1][i] for run in runs):.1%}" for i in range(1, 4)]
        cells.append(f"{mean(scores):.1%} ± {interval(scores):.1%}")
        cells.append(str(steps_to(runs, target) or "-"))
        rows.append(f"| {method} | {rate:g} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def tabulate_sweep(results, plan, pairs):
    """Final accuracy of the runs with seed 0, from which the rates were chosen."""
    rows = ["| method | teacher | " + " | ".join(f"{rate:g}" for rate in plan["rates"]) + " |"]
    rows.append("|---|---|" + "---|" * len(plan["rates"]))
    for method, teacher in pairs:
        if (method, teacher) == ("GRPO", "flawed"):
            continue
        runs = {run["rate"]: final(run) for run in pick(results, method, teacher, rate=None, seeds=[0])}
        teacher = "none" if method == "GRPO" else teacher
        rows.append(f"| {method} | {teacher} | " + " | ".join(f"{runs[rate]:.1%}" for rate in plan["rates"]) + " |")
    return "\n".join(rows)


def plot(results, rates, plan, tables, path):
    """Mean accuracy over the steps, with a band of 95%."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, teacher in zip(axes, TEACHERS, strict=True):
        shown = [method for method in tables[teacher] if method in METHODS or method in OPTIONS]
        for index, method in enumerate(shown):
            rate = rates[method, teacher]
            runs = pick(results, method, teacher, rate, plan["seeds"])
            steps = [point[0] for point in runs[0]["curve"]]
            scores = [
                [mean(point[1:]) for point in points] for points in zip(*(run["curve"] for run in runs), strict=True)
            ]
            means, widths = [mean(s) for s in scores], [interval(s) for s in scores]
            label = "KDRL, constant" if method in CONSTANT_KDRL else method
            axis.plot(steps, means, label=label, color=f"C{index}")
            low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=f"C{index}", alpha=0.12, linewidth=0)
        axis.set(title=f"{teacher} teacher", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy, mean of 2, 3 and 4 people")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def report(results, rates, plan, tables, path, command):
    """Write the tables to `path` and the curves beside it."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "trl-rlad"))
    seeds = ", ".join(map(str, plan["seeds"]))
    parts = [
        f"# The comparison in miniature: the {plan['student']} student",
        f"`{command}` on {time.strftime('%d %B %Y')}: {plan['steps']} steps of {ROLLOUTS} rollouts (offline "
        f"distillation: as many samples of the teacher, made once), seeds {seeds}, {os.cpu_count()} CPU cores, {packages}.",
        "Accuracy on 200 held-out puzzles for each number of people, sampled at temperature 0.6 and top-p 0.95; mean with "
        "95% interval over the seeds (Student's t). *Steps to GRPO's end* is where the mean curve first reaches GRPO's "
        f"final mean, measured every {plan['eval_steps']} steps.",
    ]
    for teacher in TEACHERS:
        table = tabulate(results, rates, plan, tables[teacher], teacher, plan["seeds"])
        parts += [f"## {teacher.capitalize()} teacher", table]
    if plan["ablation_seeds"]:
        names = [name for base, names in ABLATIONS.items() for name in (base, *names)]
        seeds = ", ".join(map(str, plan["ablation_seeds"]))
        parts += [
            "## Alpha and the clamp",
            f"RLAD and credit have alpha 0.5 and clamp 1. Strong teacher, seeds {seeds}.",
            tabulate(results, rates, plan, names, "strong", plan["ablation_seeds"]),
        ]
    if len(plan["rates"]) > 1:
        pairs = [pair for pair in rates if pair[0] in METHODS | CANDIDATES]
        parts += ["## The learning rates", "Final accuracy with seed 0.", tabulate_sweep(results, plan, pairs)]
    path.write_text("\n\n".join(parts) + "\n")
    plot(results, rates, plan, tables, path.with_suffix(".png"))
    print(f"Wrote {path} and {path.with_suffix('.png').name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs", "comparison"),
        help="where the models, the runs and the report go",
    )
    parser.add_argument("--student", choices=STUDENTS, default="hasty", help="what the student lacks")
    parser.add_argument("--quick", action="store_true", help="two seeds, one learning rate and fewer methods")
    args = parser.parse_args()
    size, methods = (QUICK, QUICK_METHODS) if args.quick else ({}, tuple(METHODS))
    plan = {"student": args.student, "rates": RATES} | STUDENTS[args.student] | size
    args.output_dir.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # for the processes that train
    prepare(plan, args.output_dir)
    results, tables, rates = study(plan, methods, args.output_dir)
    command = f"python benchmarks/comparison.py --student {args.student}" + " --quick" * args.quick
    name = f"comparison_{args.student}" + "_quick" * args.quick
    report(results, rates, plan, tables, args.output_dir / f"{name}.md", command)


if __name__ == "__main__":
    main()
