"""
GRPO, KDRL, on-policy and offline distillation, RLAD and its relatives, side by side in miniature.

    python benchmarks/comparison.py                        # with the mistaken student: two hours on two CPU cores
    python benchmarks/comparison.py --student hasty        # and `sheltered`: an hour each
    python benchmarks/comparison.py --quick                # two seeds, one learning rate and five methods: 14 runs

The puzzles and the strong teacher are those of `examples/rlad_grpo.py`. The *mistaken* student is that of the example
too: it misreads one of the four operators, and is sure of it. The *hasty* student knows the task but has a habit that
hides it, so it is seldom right; the *sheltered* one is small and has hardly seen two of the operators. The flawed
teacher is right but for one operator: for the mistaken student `&`, which that student knows, for the others `|`.

Every method has the same number of steps and of rollouts (or of kept samples of the teacher, or of both, half and
half). The learning rate of each method is chosen among the same three, by one (shorter, for the mistaken student) run
each with the strong teacher; the figures come from other seeds. Each run adds one line to `runs.jsonl` in the output
folder, from which the study goes on if it is interrupted. Two runs go side by side, on one thread each.
"""

import argparse
import json
import multiprocessing
import os
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

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.scripts import distil
from trl_rlad.scripts.arguments import MINI, read_method
from trl_rlad.scripts.mini.make_models import COMPARISON
from trl_rlad.scripts.sampling import add_teacher_weight, grade, sample
from trl_rlad.scripts.tasks import Task
from trl_rlad.scripts.tasks.mini import MAX_COMPLETION_LENGTH, OPERATORS, correctness_reward, make_dataset


PEOPLE = (2, 3, 4)
TEACHERS = ("strong", "flawed")
RATES = (1e-4, 3e-4, 1e-3)
# Two-sided 95% quantile of Student's t, by the number of seeds
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}

# What runs one after another, each with its share of the steps: settings of `examples/methods/`, with the guide of
# `variants.py` where it isn't the library's, or `OFFLINE`
OFFLINE = None
RLAD, NAMED = read_method("rlad"), read_method("rlad_named")
IN_MINIATURE = {"teacher_kl_coef": 0.2}  # of KDRL: the published 2e-3 changes nothing in a few dozen steps
METHODS = {
    "GRPO": [read_method("grpo")],
    "RLAD": [RLAD],
    "credit": [read_method("credit")],
    "credit, normalized": [RLAD | {"guide": "NormalizedCreditGuide"}],
    "KDRL": [read_method("kdrl") | IN_MINIATURE],
    "KDRL, bounded": [read_method("kdrl_bounded") | IN_MINIATURE],
    "on-policy distillation": [read_method("opd")],
    "on-policy distillation, bounded": [read_method("opd_bounded")],
    "on-policy distillation, forward": [read_method("opd_forward")],
    "offline distillation": [OFFLINE],
    "RLAD + named": [NAMED],
    "RLAD + named, trusted": [NAMED | {"trusted": True}],
    "distil, then GRPO": [read_method("distil_then_grpo")],
    "distil, then RLAD": [read_method("distil_then_rlad")],
    "offline, then RLAD + named": [OFFLINE, NAMED],
    "GRPO + named": [read_method("grpo_named")],
    "RLAD + named, shuffled teacher": [NAMED | {"guide": "ShuffledGuide"}],
    "random gate": [RLAD | {"guide": "RandomGateGuide"}],
}
SHARED_RATE = {  # run at the rate of another method, with which they are to be compared
    "GRPO + named": "RLAD + named",
    "RLAD + named, shuffled teacher": "RLAD + named",
    "random gate": "RLAD",
    "credit, normalized": "credit",
    "RLAD + named, trusted": "RLAD + named",
}
FEW = ("GRPO", "RLAD", "KDRL", "on-policy distillation", "offline distillation")
# Rollouts in a step come in groups of 8, or are as many kept samples of the teacher
STUDENTS = {
    "mistaken": {
        "seeds": (1, 2, 3, 4, 5),
        "steps": 60,
        "eval_steps": 15,
        "rollouts": 128,
        "sweep": {"steps": 40, "eval_steps": 20, "rollouts": 64},
        "methods": (
            *FEW,
            "RLAD + named",
            "RLAD + named, trusted",
            "on-policy distillation, forward",
            "on-policy distillation, bounded",
            "KDRL, bounded",
            "distil, then GRPO",
            "distil, then RLAD",
            "offline, then RLAD + named",
            "GRPO + named",
            "RLAD + named, shuffled teacher",
            "random gate",
        ),
        "flawed": ("GRPO", "RLAD", "offline distillation", "RLAD + named", "RLAD + named, trusted"),
    },
    "hasty": {
        "seeds": (1, 2, 3, 4, 5, 6, 7, 8),
        "steps": 40,
        "eval_steps": 8,
        "rollouts": 128,
        "methods": (*FEW, "credit", "credit, normalized", "RLAD + named", "RLAD + named, trusted"),
        "flawed": ("GRPO", "RLAD", "offline distillation", "credit", "RLAD + named", "RLAD + named, trusted"),
    },
    "sheltered": {
        "seeds": (1, 2, 3, 4, 5),
        "steps": 80,
        "eval_steps": 16,
        "rollouts": 128,
        "methods": (*FEW, "credit", "RLAD + named", "RLAD + named, trusted"),
        "flawed": (
            "GRPO",
            "RLAD",
            "on-policy distillation",
            "offline distillation",
            "RLAD + named",
            "RLAD + named, trusted",
        ),
    },
}
JOB = ("student", "method", "teacher", "rate", "seed", "steps")  # what tells one run from another
# What `--quick` runs with the strong teacher and, as far as the trust in the teacher matters, with the flawed one
QUICK = ("GRPO", "RLAD", "offline distillation", "RLAD + named", "RLAD + named, trusted")
QUICK_FLAWED = ("GRPO", "RLAD + named", "RLAD + named, trusted")
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


@cache
def held_out_puzzles():
    return concatenate_datasets([make_dataset([n], 200, seed=0, held_out=True) for n in PEOPLE])


def measure(model):
    """
    Accuracy on held-out puzzles, sampled as in the paper and always with the same seed: by the number of people, and
    by the operators that they have in them.
    """
    puzzles, was_training = held_out_puzzles(), model.training
    settings = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": MAX_COMPLETION_LENGTH, "batch_size": 600}
    with torch.random.fork_rng():
        completions = sample(model, list(puzzles["prompt"]), **settings)
    model.train(was_training)
    task = Task(None, puzzles, correctness_reward)
    marks = [of_prompt[0] for of_prompt in grade(task, puzzles, completions)]
    people = list(puzzles["difficulty"])
    by_operator = {
        operator: mean(
            mark for mark, prompt in zip(marks, puzzles["prompt"], strict=True) if operator in prompt.split()
        )
        for operator in OPERATORS
    }
    return [mean(m for m, n in zip(marks, people, strict=True) if n == each) for each in PEOPLE], by_operator


@cache
def measure_before(student):
    """Accuracy before any training."""
    return measure(AutoModelForCausalLM.from_pretrained(student))


def make_trainer(student, phase, job, steps, output_dir):
    """The trainer of one phase, for a student at a path."""
    kwargs = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": job["rate"],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "max_steps": steps,
        "per_device_train_batch_size": job["rollouts"],
        "seed": job["seed"],
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    teacher = str(teacher_path(job["student"], job["teacher"], output_dir))
    if phase is OFFLINE:
        samples = load_from_disk(samples_path(job, output_dir))
        return distil.make_trainer(student, samples, SFTConfig(str(output_dir / "trainer"), **kwargs))

    settings = {name: value for name, value in phase.items() if name not in ("guide", "trusted")}
    puzzles = make_dataset(PEOPLE, steps * job["rollouts"] // 8, job["seed"], held_out=False)
    if phase.get("trusted"):
        path = output_dir / f"{job['student']}_{job['teacher']}_weights_{steps}_{job['seed']}.json"
        sampling = {"max_new_tokens": MAX_COMPLETION_LENGTH, "batch_size": 256, "seed": job["seed"]}
        puzzles = add_teacher_weight(Task(puzzles, None, correctness_reward), teacher, 4, path, **sampling)
    args = RLADConfig(str(output_dir / "trainer"), max_completion_length=MAX_COMPLETION_LENGTH, **kwargs, **settings)
    teacher = teacher if args.needs_teacher else None
    trainer = RLADTrainer(student, correctness_reward, args, puzzles, teacher_model=teacher)
    if "guide" in phase:
        trainer.guide = getattr(variants, phase["guide"])(trainer, trainer.teacher_scorer)
    return trainer


def teacher_path(student, teacher, output_dir):
    if teacher == "strong":
        return MINI / "teacher"
    return output_dir / "flawed_teacher" if student == "mistaken" else MINI / "student"


def student_path(student, output_dir):
    return MINI / "student" if student == "mistaken" else output_dir / f"{student}_student"


def list_teachers(plan):
    return TEACHERS if plan["flawed"] else TEACHERS[:1]


def samples_path(job, output_dir):
    flaw = f"_{job['student']}" * (job["student"] == "mistaken" and job["teacher"] == "flawed")
    return output_dir / f"{job['teacher']}{flaw}_samples_{job['steps'] * job['rollouts']}"


def prepare(plan, output_dir):
    """Make the models that aren't there, and each teacher's pool of samples for offline distillation."""
    for name in ("flawed_teacher",) if plan["student"] == "mistaken" else (f"{plan['student']}_student",):
        if not (output_dir / name).exists():
            COMPARISON[name](output_dir / name)
    # As many samples as the other methods draw rollouts
    puzzles = make_dataset(PEOPLE, plan["steps"] * plan["rollouts"] // 8, seed=0, held_out=False)
    for teacher in list_teachers(plan):
        if not (path := samples_path(plan | {"teacher": teacher}, output_dir)).exists():
            samples, counts = distil.collect(
                str(teacher_path(plan["student"], teacher, output_dir)),
                Task(puzzles, None, correctness_reward),
                samples_per_prompt=8,
                max_new_tokens=MAX_COMPLETION_LENGTH,
            )
            print(f"{teacher} teacher: {counts}")
            samples.save_to_disk(path)


def run(job):
    """Train and measure once. Returns the job with its results."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    output_dir, phases = Path(job["output_dir"]), METHODS[job["method"]]
    student, start = str(student_path(job["student"], output_dir)), time.perf_counter()
    curve, by_operator = [[0, *measure_before(student)[0]]], {}

    class Curve(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if (step := first + state.global_step) % job["eval_steps"] == 0:
                by_people, shares = measure(model)
                curve.append([step, *by_people])
                by_operator.update(shares)

    for index, phase in enumerate(phases):
        first, steps = index * job["steps"] // len(phases), job["steps"] // len(phases)
        trainer = make_trainer(student, phase, job, steps, output_dir)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Curve())
        trainer.train()
        if index + 1 < len(phases):
            student = str(output_dir / "between" / str(os.getpid()))
            trainer.save_model(student)
    seconds = round(time.perf_counter() - start, 1)
    return {name: job[name] for name in JOB} | {"seconds": seconds, "curve": curve, "by_operator": by_operator}


def run_missing(jobs, plan, output_dir):
    """Run, two at a time, the jobs that `runs.jsonl` doesn't have. Returns the results of all runs it then has."""
    path = output_dir / "runs.jsonl"
    results = read_results(path)
    done = {identify(result) for result in results}
    settings = {name: plan[name] for name in ("student", "steps", "eval_steps", "rollouts")} | {
        "output_dir": str(output_dir)
    }
    jobs = [job | settings for job in jobs]
    jobs = [job for job in jobs if identify(job) not in done]
    with multiprocessing.get_context("spawn").Pool(2) as pool, path.open("a") as file:
        for result in tqdm(pool.imap_unordered(run, jobs), total=len(jobs), desc="Runs"):
            file.write(json.dumps(result) + "\n")
            file.flush()
            results.append(result)
    return select(results, plan)


def select(results, plan):
    """The runs that are a plan's own."""
    return [r for r in results if all(r[name] == plan[name] for name in ("student", "steps"))]


def read_results(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def identify(job):
    return tuple(job[name] for name in JOB)


def final(result):
    return mean(result["curve"][-1][1:])


def study(plan, output_dir):
    """Run everything. Returns the results, the runs with which the rates were chosen, and the rate of each method."""
    pairs = [(method, rate) for method in plan["methods"] if method not in SHARED_RATE for rate in plan["rates"]]
    swept = []
    if len(plan["rates"]) > 1:
        prepare(shorten(plan), output_dir)
        swept = run_missing(make_jobs(pairs, "strong", [0]), shorten(plan), output_dir)
    rates = choose_rates(swept, plan)
    prepare(plan, output_dir)
    flawed = {method: rate for method, rate in rates.items() if method in plan["flawed"]}
    jobs = make_jobs(rates.items(), "strong", plan["seeds"]) + make_jobs(flawed.items(), "flawed", plan["seeds"])
    return run_missing(jobs, plan, output_dir), swept, rates


def shorten(plan):
    """The plan of the runs that choose the learning rates: the same, unless it names a shorter one."""
    return plan | plan.get("sweep", {})


def make_jobs(pairs, teacher, seeds):
    """Jobs for pairs of a method and a learning rate."""
    return [
        {"method": method, "teacher": teacher, "rate": rate, "seed": seed}
        for method, rate in pairs
        for seed in seeds
        if (method, teacher) != ("GRPO", "flawed")  # it has no teacher
    ]


def choose_rates(results, plan):
    """The learning rate of each method: of the runs with seed 0, that of the best."""

    def best(method):
        runs = pick(results, SHARED_RATE.get(method, method), "strong", None, [0])
        return max(runs, key=final)["rate"] if len(plan["rates"]) > 1 else plan["rates"][0]

    return {method: best(method) for method in plan["methods"]}


def pick(results, method, teacher, rate, seeds):
    """The runs of one method at one rate, or at any, in the order of their seeds."""
    teacher = "strong" if method == "GRPO" else teacher
    runs = [r for r in results if (r["method"], r["teacher"]) == (method, teacher) and r["seed"] in seeds]
    return sorted((run for run in runs if rate in (None, run["rate"])), key=lambda run: run["seed"])


def interval(values):
    """Half the width of the 95% interval of the mean."""
    return T_QUANTILE[len(values)] * stdev(values) / len(values) ** 0.5


def steps_to(runs, target):
    """First step at which the mean accuracy of the runs reaches `target`."""
    for points in zip(*(run["curve"] for run in runs), strict=True):
        if mean(mean(point[1:]) for point in points) >= target:
            return points[0][0]
    return None


def tabulate(results, rates, plan, teacher):
    """Every method with one teacher, and its difference from GRPO seed by seed."""
    seeds = plan["seeds"]
    grpo = pick(results, "GRPO", teacher, rates["GRPO"], seeds)
    rows = [
        "| method | learning rate | 2 people | 3 people | 4 people | mean | over GRPO | with `&` / with "
        "<code>&#124;</code> | steps to GRPO's end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    before = [mean(run["curve"][0][i] for run in grpo) for i in range(1, 4)]
    rows.append("| before | | " + " | ".join(f"{x:.1%}" for x in before) + f" | {mean(before):.1%} | | | |")
    for method, rate in rates.items():
        runs = pick(results, method, teacher, rate, seeds)
        if not runs:  # only tried with the strong teacher
            continue
        scores = [final(run) for run in runs]
        gains = [score - final(other) for score, other in zip(scores, grpo, strict=True)]
        cells = [f"{mean(run['curve'][-1][i] for run in runs):.1%}" for i in range(1, 4)]
        cells.append(f"{mean(scores):.1%} ± {interval(scores):.1%}")
        cells.append("" if method == "GRPO" else f"{100 * mean(gains):+.1f} ± {100 * interval(gains):.1f}")
        by_operator = [run["by_operator"] for run in runs if "by_operator" in run]
        shares = [f"{mean(each[operator] for each in by_operator):.0%}" for operator in "&|"] if by_operator else []
        cells.append(" / ".join(shares) or "-")
        cells.append(str(steps_to(runs, mean(map(final, grpo))) or "-"))
        rows.append(f"| {method} | {rate:g} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def tabulate_sweep(results, plan, rates):
    """Final accuracy of the runs with seed 0, from which the rates were chosen."""
    rows = ["| method | " + " | ".join(f"{rate:g}" for rate in plan["rates"]) + " |"]
    rows.append("|---|" + "---|" * len(plan["rates"]))
    for method in rates:
        if method not in SHARED_RATE:
            runs = {run["rate"]: final(run) for run in pick(results, method, "strong", rate=None, seeds=[0])}
            rows.append(f"| {method} | " + " | ".join(f"{runs[rate]:.1%}" for rate in plan["rates"]) + " |")
    return "\n".join(rows)


def plot(results, rates, plan, path):
    """Mean accuracy over the steps, with a band of 95%."""
    figure, axes = plt.subplots(
        1, len(list_teachers(plan)), figsize=(11, 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, teacher in zip(axes[0], list_teachers(plan), strict=True):
        for index, method in enumerate(method for method in SHOWN if method in rates):
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
    axes[0, 0].set_ylabel("held-out accuracy, mean of 2, 3 and 4 people")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def report(results, swept, rates, plan, path, command):
    """Write the tables to `path` and the curves beside it."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "trl-rlad"))
    seeds = ", ".join(map(str, plan["seeds"]))
    parts = [
        f"# The comparison in miniature: the {plan['student']} student",
        f"`{command}` on {time.strftime('%d %B %Y')}: {plan['steps']} steps of {plan['rollouts']} rollouts (offline "
        f"distillation: as many samples of the teacher, made once), seeds {seeds}, {os.cpu_count()} CPU cores, "
        f"{packages}.",
        "Accuracy on 200 held-out puzzles for each number of people, sampled at temperature 0.6 and top-p 0.95; mean "
        "with 95% interval over the seeds (Student's t), and the difference from GRPO, seed by seed. *Steps to GRPO's "
        f"end* is where the mean curve first reaches GRPO's final mean, measured every {plan['eval_steps']} steps.",
    ]
    parts += [
        f"## {teacher.capitalize()} teacher\n\n{tabulate(results, rates, plan, teacher)}"
        for teacher in list_teachers(plan)
    ]
    if len(plan["rates"]) > 1:
        sweep = shorten(plan)
        parts.append(
            f"## The learning rates\n\nFinal accuracy with seed 0 and the strong teacher, after {sweep['steps']} "
            f"steps of {sweep['rollouts']} rollouts.\n\n{tabulate_sweep(swept, plan, rates)}"
        )
    path.write_text("\n\n".join(parts) + "\n")
    plot(results, rates, plan, path.with_suffix(".png"))
    print(f"Wrote {path} and {path.with_suffix('.png').name}")


def make_plan(student):
    return {"student": student, "rates": RATES} | STUDENTS[student]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs", "comparison"),
        help="where the models, the runs and the report go",
    )
    parser.add_argument("--student", choices=STUDENTS, default="mistaken", help="what the student lacks")
    parser.add_argument("--quick", action="store_true", help="two seeds, one learning rate and fewer methods")
    args = parser.parse_args()
    plan = make_plan(args.student)
    if args.quick:
        plan |= {"rates": (3e-4,), "seeds": (1, 2), "methods": QUICK, "flawed": QUICK_FLAWED}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # for the processes that train
    results, swept, rates = study(plan, args.output_dir)
    command = f"python benchmarks/comparison.py --student {args.student}" + " --quick" * args.quick
    name = f"comparison_{args.student}" + "_quick" * args.quick
    report(results, swept, rates, plan, args.output_dir / f"{name}.md", command)


if __name__ == "__main__":
    main()
