"""
GRPO, KDRL, on-policy and offline distillation, RLAD and its relatives, side by side in miniature.

    python benchmarks/comparison.py                            # the mistaken student: two hours on two CPU cores
    python benchmarks/comparison.py --bed hasty                # and `sheltered`: an hour each
    python benchmarks/comparison.py --bed half_gpt half_qwen3  # and others of `beds.py`: two minutes a run
    python benchmarks/comparison.py --quick                    # two seeds, one learning rate and five methods: 14 runs

Every method has the same number of steps and of rollouts (or of kept samples of the teacher, or of both, half and
half). The learning rate of each method is chosen among the same three or four, by one (shorter, for the mistaken
student) run each with the strong teacher; the figures come from other seeds. Of several beds, what chooses the rates
comes first, then seed by seed.

Each run adds one line to `runs.jsonl` in the output folder, from which the study goes on if it is interrupted, by the
same command; `--report` writes the tables of what is there. Two runs go side by side, on one thread each. To leave the
machine to others, begin the line with `chrt -i 0 nice -n 19`.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch
import transformers
import variants
from beds import BEDS
from datasets import load_from_disk
from filelock import FileLock
from tables import PACKAGES, choose_rates, read_results, report, select
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, SFTConfig

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.scripts import distil
from trl_rlad.scripts.arguments import read_method
from trl_rlad.scripts.sampling import add_teacher_weight
from trl_rlad.scripts.tasks import Task, chains


GROUP = 8  # rollouts of a prompt
RATES = (3e-4, 1e-4, 2e-4, 5e-4, 1e-3)  # in the order in which they are tried

# What runs one after another, each with its share of the steps: settings of `examples/methods/`, with the guide of
# `variants.py` where it isn't the library's, or those of TRL's own `DistillationTrainer`, or `OFFLINE`
OFFLINE = None
RLAD, NAMED = read_method("rlad"), read_method("rlad_named")
BOUNDED = read_method("kdrl_bounded")
IN_MINIATURE = {"teacher_kl_coef": 0.2}  # of KDRL: the published 2e-3 changes nothing in a few dozen steps
EVERYWHERE = "RLAD + named everywhere"
ACCEPTANCE = {"guide": "AcceptanceGuide", "alpha": 0.0}
METHODS = {
    "GRPO": [read_method("grpo")],
    "RLAD": [RLAD],
    "credit": [read_method("credit")],
    "credit, normalized": [RLAD | {"guide": "NormalizedCreditGuide"}],
    "KDRL": [read_method("kdrl") | IN_MINIATURE],
    "KDRL, bounded": [BOUNDED | IN_MINIATURE],
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
    "RLAD's gate alone": [RLAD | {"guide": "GateGuide"}],
    "RLAD + bounded divergence": [RLAD | {"teacher_kl_coef": 0.2}],
    "credit + bounded divergence": [read_method("credit") | {"teacher_kl_coef": 0.2}],
    "acceptance": [RLAD | ACCEPTANCE],
    "acceptance + bounded divergence": [RLAD | ACCEPTANCE | {"teacher_kl_coef": 0.2}],
    "acceptance + bounded divergence, trusted": [RLAD | ACCEPTANCE | {"teacher_kl_coef": 0.2, "trusted": True}],
    "half acceptance + bounded divergence": [RLAD | ACCEPTANCE | {"alpha": 0.5, "teacher_kl_coef": 0.2}],
    "acceptance + named": [NAMED | ACCEPTANCE],
    EVERYWHERE: [read_method("rlad_named_all")],
    f"{EVERYWHERE}, trusted": [read_method("rlad_named_all") | {"trusted": True}],
    "RLAD, clamp 2": [RLAD | {"teacher_log_ratio_clip": 2.0}],
    "RLAD, no clamp": [RLAD | {"teacher_log_ratio_clip": None}],
    "KDRL, bounded, 0.05": [BOUNDED | {"teacher_kl_coef": 0.05}],
    "KDRL, bounded, 1": [BOUNDED | {"teacher_kl_coef": 1.0}],
    "RLAD + named, 0.1": [NAMED | {"teacher_kl_coef": 0.1}],
    "RLAD + named, 0.3": [NAMED | {"teacher_kl_coef": 0.3}],
    "TRL's distillation, reverse": [{"beta": 1.0}],
    "TRL's distillation, forward": [{"beta": 0.0}],
    "RLAD + named, shuffled teacher": [NAMED | {"guide": "ShuffledGuide"}],
    "random gate": [RLAD | {"guide": "RandomGateGuide"}],
}
TRUSTED = {
    "RLAD + named, trusted": "RLAD + named",
    f"{EVERYWHERE}, trusted": EVERYWHERE,
    "acceptance + bounded divergence, trusted": "acceptance + bounded divergence",
}
SHARED_RATE = TRUSTED | {  # run at the rate of another method, with which they are to be compared
    "GRPO + named": "RLAD + named",
    "RLAD + named, shuffled teacher": "RLAD + named",
    "random gate": "RLAD",
    "credit, normalized": "credit",
}
FEW = ("GRPO", "RLAD", "KDRL", "on-policy distillation", "offline distillation")
BOTH = ("RLAD + bounded divergence", "acceptance + bounded divergence")
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
            EVERYWHERE,
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
        "methods": (*FEW, "credit", "credit, normalized", "RLAD + named", "RLAD + named, trusted", *BOTH, EVERYWHERE),
        "flawed": ("GRPO", "RLAD", "offline distillation", "credit", "RLAD + named", "RLAD + named, trusted"),
    },
    "sheltered": {
        "seeds": (1, 2, 3, 4, 5),
        "steps": 80,
        "eval_steps": 16,
        "rollouts": 128,
        "methods": (*FEW, "credit", "RLAD + named", "RLAD + named, trusted", *BOTH, EVERYWHERE),
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
# Of `--quick`: the flawed teacher only as far as the trust in it matters
QUICK = {
    "rates": (3e-4,),
    "seeds": (1, 2),
    "methods": ("GRPO", "RLAD", "offline distillation", "RLAD + named", "RLAD + named, trusted"),
    "flawed": ("GRPO", "RLAD + named", "RLAD + named, trusted"),
}
MINI_RATES = (1e-4, 3e-4, 1e-3)
KNIGHTS_MEASURED = "200 for each number of people, sampled at temperature 0.6 and top-p 0.95"
CHAINS_MEASURED = "4,000 once each at temperature 1 (1,000 on the way), and 240 sixteen times for Pass@16"
REGIME_QUICK = {
    "rates": (2e-4, 5e-4),
    "seeds": (1, 2),
    "methods": ("GRPO", "RLAD", "KDRL, bounded", "RLAD + named"),
    "flawed": (),
}
# Of half-learned and far students. Two updates for each batch of rollouts; the order is that in which they run
REGIME = {
    "seeds": (1, 2, 3, 4, 5),
    "shared_rate": TRUSTED,
    "rates": (3e-4, 1e-4, 2e-4, 5e-4),
    "steps": 300,
    "eval_steps": 50,
    "rollouts": 128,
    "updates": 2,
    "methods": (
        "GRPO",
        "on-policy distillation, bounded",  # these two say whether the bed is in the regime
        "RLAD",
        "KDRL, bounded",
        "RLAD + named",
        "GRPO + named",
        "offline distillation",
        "TRL's distillation, reverse",
        "TRL's distillation, forward",
        "on-policy distillation, forward",
        "KDRL, bounded, 0.05",
        "KDRL, bounded, 1",
        "KDRL",
        "RLAD, no clamp",
        "RLAD, clamp 2",
        "credit",
        "RLAD + named, 0.1",
        "RLAD + named, 0.3",
        "RLAD's gate alone",
        "credit + bounded divergence",
        "acceptance",
        *BOTH,
        "half acceptance + bounded divergence",
        "acceptance + named",
        EVERYWHERE,
        "offline, then RLAD + named",
        "distil, then GRPO",
        "RLAD + named, trusted",
        f"{EVERYWHERE}, trusted",
        "acceptance + bounded divergence, trusted",
    ),
    "shown": (
        "GRPO",
        "RLAD",
        "KDRL, bounded",
        "on-policy distillation, bounded",
        "offline distillation",
        "RLAD + named",
        "GRPO + named",
        "TRL's distillation, reverse",
    ),
    "flawed": (
        "GRPO",
        "RLAD",
        "offline distillation",
        "RLAD + named",
        "RLAD + named, trusted",
        f"{EVERYWHERE}, trusted",
        "acceptance + bounded divergence",
        "acceptance + bounded divergence, trusted",
    ),
}
JOB = ("student", "method", "teacher", "rate", "seed", "steps")  # what tells one run from another
LOGGED = ("entropy", "teacher/log_ratio", "teacher/clamped", "teacher/kl") + tuple(
    f"clip_ratio/{side}_by_{whose}" for side in ("high", "low") for whose in ("policy", "teacher")
)
COMMAND = f"python {shlex.join(sys.argv)}"


def make_trainer(student, phase, job, steps, output_dir):
    """The trainer of one phase, for a student at a path."""
    bed, updates = BEDS[job["student"]], job.get("updates", 1)
    kwargs = {
        "output_dir": str(output_dir / "trainer"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": job["rate"],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "max_steps": steps * updates,
        "per_device_train_batch_size": job["rollouts"] // updates,
        "seed": job["seed"],
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    length, reward = bed.task.MAX_COMPLETION_LENGTH, bed.task.correctness_reward
    teacher = bed.teachers[job["teacher"]]
    teacher_path = str(bed.path(teacher, output_dir))
    puzzles = bed.train_puzzles(steps * job["rollouts"] // GROUP, job["seed"])
    name = f"{teacher}_{{}}_{bed.pool or len(puzzles)}_{job['seed']}"  # of a file that other runs share
    if phase is OFFLINE:
        path = output_dir / name.format("samples")
        samples = read_samples(teacher_path, Task(puzzles, None, reward), path, length)
        return distil.make_trainer(student, samples, SFTConfig(**kwargs))
    if "beta" in phase:  # TRL's own trainer samples one completion for each row, and anew for each update
        puzzles = puzzles.select([row for row in range(len(puzzles)) for _ in range(GROUP)])
        args = DistillationConfig(max_completion_length=length, **kwargs, **phase)
        return DistillationTrainer(student, teacher_path, args, puzzles)

    settings = {name: value for name, value in phase.items() if name not in ("guide", "trusted")}
    if phase.get("trusted"):
        with FileLock(output_dir / "lock"):
            sampling = {"max_new_tokens": length, "batch_size": 256, "seed": job["seed"]}
            path = output_dir / f"{name.format('weights')}.json"
            puzzles = add_teacher_weight(Task(puzzles, None, reward), teacher_path, 4, path, **sampling)
    args = RLADConfig(max_completion_length=length, steps_per_generation=updates, **kwargs, **settings)
    trainer = RLADTrainer(student, reward, args, puzzles, teacher_model=teacher_path if args.needs_teacher else None)
    if "guide" in phase:
        trainer.guide = getattr(variants, phase["guide"])(trainer, trainer.teacher_scorer)
    return trainer


def read_samples(teacher, task, path, length):
    """The right ones of a teacher's answers, one for each rollout that other methods draw or, of a pool, for 8."""
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            samples, counts = distil.collect(teacher, task, GROUP, length, batch_size=1000)
            print(f"{path.name}: {counts}")
            samples.save_to_disk(path)
    return load_from_disk(path)


def run(job):
    """Train and measure once. Returns the job with its results."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    bed, output_dir, phases = BEDS[job["student"]], Path(job["output_dir"]), METHODS[job["method"]]
    student, start = str(bed.path(bed.student, output_dir)), (time.perf_counter(), time.process_time())
    curve, by_operator, logs = [[0, *bed.measure_before(output_dir)[0]]], {}, []

    class Curve(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            step, rest = divmod(state.global_step, job.get("updates", 1))
            if (step := first + step) % job["eval_steps"] == rest == 0:
                by_difficulty, shares = bed.measure(model, at_end=step == job["steps"])
                curve.append([step, *by_difficulty])
                by_operator.update(shares)

    for index, phase in enumerate(phases):
        first, steps = index * job["steps"] // len(phases), job["steps"] // len(phases)
        trainer = make_trainer(student, phase, job, steps, output_dir)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Curve())
        trainer.train()
        logs += trainer.state.log_history
        if index + 1 < len(phases):
            student = str(output_dir / "between" / str(os.getpid()))
            trainer.save_model(student)
    return {
        **{name: job[name] for name in JOB},
        "seconds": round(time.perf_counter() - start[0], 1),
        "cpu_seconds": round(time.process_time() - start[1], 1),  # the machine may be shared
        "curve": curve,
        "by_operator": by_operator,
        "pass@16": bed.measure_pass(trainer.model),
        "logs": {name: thin([log[name] for log in logs if log.get(name) is not None]) for name in LOGGED},
        "versions": {name: version(name) for name in PACKAGES},
        "command": job["command"],
    }


def thin(values, parts=6):
    """Means over equal parts of a run."""
    size = max(1, len(values) // parts)
    return [round(mean(values[i : i + size]), 4) for i in range(0, len(values), size)]


def run_missing(jobs, output_dir):
    """Run, two at a time, the jobs that `runs.jsonl` doesn't have. Returns the results of all runs it then has."""
    path = output_dir / "runs.jsonl"
    results = read_results(path)
    done = {identify(result) for result in results}
    jobs = [job | {"output_dir": str(output_dir)} for job in jobs if identify(job) not in done]
    for bed, teacher in dict.fromkeys((job["student"], job["teacher"]) for job in jobs):
        BEDS[bed].prepare(teacher, output_dir)
    with multiprocessing.get_context("spawn").Pool(2) as pool, path.open("a") as file:
        for result in tqdm(pool.imap_unordered(run, jobs), total=len(jobs), desc="Runs"):
            file.write(json.dumps(result) + "\n")
            file.flush()
            results.append(result)
    return results


def identify(job):
    return tuple(job[name] for name in JOB)


def sweep(plans, output_dir):
    """Run what chooses the learning rates."""
    jobs = [job for plan in plans for job in sweep_jobs(shorten(plan))]
    return run_missing(sorted(jobs, key=lambda job: RATES.index(job["rate"])), output_dir)


def study(plans, output_dir):
    """Run everything. Returns all results."""
    results = sweep([plan for plan in plans if len(plan["rates"]) > 1], output_dir)
    jobs = [job for plan in plans for job in final_jobs(plan, choose_rates(select(results, shorten(plan)), plan))]
    return run_missing(sorted(jobs, key=lambda job: (job["teacher"] != "strong", job["seed"])), output_dir)


def split(results, plan):
    """A plan's results, the runs that chose its rates, and the rate of each method."""
    swept = select(results, shorten(plan))
    return select(results, plan), swept, choose_rates(swept, plan)


def sweep_jobs(plan):
    """The runs that choose the learning rates."""
    methods = [method for method in plan["methods"] if method not in plan["shared_rate"]]
    return make_jobs(plan, [(method, rate) for rate in plan["rates"] for method in methods], "strong", [0])


def final_jobs(plan, rates):
    """The runs that are reported."""
    flawed = {method: rate for method, rate in rates.items() if method in plan["flawed"]}
    return [
        *make_jobs(plan, rates.items(), "strong", plan["seeds"]),
        *make_jobs(plan, flawed.items(), "flawed", plan["seeds"]),
    ]


def shorten(plan):
    """The plan of the runs that choose the learning rates: the same, unless it names a shorter one."""
    return plan | plan.get("sweep", {})


def make_jobs(plan, pairs, teacher, seeds):
    """Jobs for pairs of a method and a learning rate."""
    settings = {name: plan[name] for name in ("student", "steps", "eval_steps", "rollouts", "updates") if name in plan}
    return [
        {**settings, "method": method, "teacher": teacher, "rate": rate, "seed": seed, "command": COMMAND}
        for method, rate in pairs
        for seed in seeds
        if (method, teacher) != ("GRPO", "flawed")  # it has no teacher
    ]


def make_plan(bed):
    """What is run on a bed."""
    if bed in STUDENTS:
        plan = {"rates": MINI_RATES, "shared_rate": SHARED_RATE} | STUDENTS[bed]
    else:
        plan = REGIME
    measured = CHAINS_MEASURED if BEDS[bed].task is chains else KNIGHTS_MEASURED
    return {"student": bed, "measured": measured} | plan


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs", "comparison"),
        help="where the models, the runs and the report go",
    )
    parser.add_argument("--bed", choices=BEDS, nargs="+", default=["mistaken"], help="student, and puzzles")
    parser.add_argument("--methods", choices=METHODS, nargs="+", help="only these")
    parser.add_argument("--rates", type=float, nargs="+", help="only these learning rates")
    parser.add_argument("--quick", action="store_true", help="two seeds, fewer learning rates and methods")
    parser.add_argument("--report", action="store_true", help="only the tables of the runs that are there")
    parser.add_argument("--sweep", action="store_true", help="only the runs that choose the learning rates")
    args = parser.parse_args()
    plans = [make_plan(bed) for bed in args.bed]
    if args.quick:
        plans = [plan | (QUICK if plan["student"] in STUDENTS else REGIME_QUICK) for plan in plans]
    asked = plans
    if args.methods:
        asked = [
            plan | {name: [m for m in plan[name] if m in args.methods] for name in ("methods", "flawed")}
            for plan in asked
        ]
    if args.rates:
        asked = [plan | {"rates": [rate for rate in plan["rates"] if rate in args.rates]} for plan in asked]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # for the processes that train
    if args.sweep:
        sweep(asked, args.output_dir)
        return
    results = read_results(args.output_dir / "runs.jsonl") if args.report else study(asked, args.output_dir)
    for plan in plans:
        name = f"comparison_{plan['student']}" + "_quick" * args.quick
        report(*split(results, plan), plan, args.output_dir / f"{name}.md", COMMAND)


if __name__ == "__main__":
    main()
