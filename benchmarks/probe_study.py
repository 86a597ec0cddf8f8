"""
Does `trl-rlad probe` foretell which method wins? Its figures beside the results of `comparison.py`.

    python benchmarks/probe_study.py
    python benchmarks/probe_study.py --write    # only what the probe quotes, from the results that are there

For each student and each teacher of that study, whose runs are in `results/comparison_runs.jsonl` and
`chains_runs.jsonl`. It takes five minutes on a CPU core, and another five the first time, for the models of the
study. What the probe quotes of it goes to `trl_rlad/reports/study.json`.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean

import comparison
import tables
import torch

from trl_rlad.reports.advice import OFFLINE, WORDS, recommend
from trl_rlad.reports.probe import report
from trl_rlad.reports.probe_run import Probe
from trl_rlad.scripts.arguments import read_method


RESULTS = Path(__file__).parent / "results"
QUOTED = Path(__file__).parents[1] / "trl_rlad" / "reports" / "study.json"
HALF = [("half_gpt", "strong"), ("half_qwen3", "strong")]
CASES = [(student, teacher) for student in comparison.STUDENTS for teacher in ("strong", "flawed")] + HALF
LATER = [("soft_qwen3", "strong"), ("far_qwen3", "strong")]  # on which the rule was tried when it was there
PAIRS = CASES + LATER
FIGURES = (
    "mean@1 pass@k signal all_failed student_entropy gap beyond_clip discrimination teacher_auc student_auc "
    "prefers_rewarded prefers_punished contradicted_failed contradicted_succeeded top1 entropy clip_high@0.5 "
    "clip_low@0.5"
).split()
METHODS = (
    "RLAD",
    "credit",
    "KDRL",
    "KDRL, bounded",
    "on-policy distillation",
    "on-policy distillation, bounded",
    "RLAD + named",
    comparison.EVERYWHERE,
    "offline distillation",
)
# Read off the cases by eye: `contradicted_failed` is .99 where only naming helped and at most .48 elsewhere,
# `contradicted_succeeded` 0 to .02 of each strong teacher and .12 at least of a flawed one; `student_entropy` is .75
# nats at least where RLAD helped and .16 at most elsewhere, `signal` .70 and .35
BOUNDS = {
    "contradicted_failed": 0.75,
    "contradicted_succeeded": 0.05,
    "student_entropy": 0.35,
    "signal": 0.5,
    "teacher_accuracy": 0.9,
    "teacher_rescues": 0.25,
}
LIMITS = (
    "The bounds were read off eight pairs of small models on two tasks, and tried on two more of one task. The probe "
    "tells what the teacher could teach, not whether the student can learn it."
)


HEAD = """# The probe beside the study

`python benchmarks/probe_study.py`: figures of `trl-rlad probe` on {prompts} prompts with 8 completions each, before
any training, in brackets their 95% intervals (bootstrap over prompts); below them, the gain of each method over GRPO
after training, in points, from the runs of [the comparison](../../comparison.py).
"""


def gains(student, teacher, methods=METHODS):
    """Gain over GRPO of each method in the study, in points, with half the width of its 95% interval."""
    plan = comparison.make_plan(student)
    results = [run for name in ("comparison", "chains") for run in tables.read_results(RESULTS / f"{name}_runs.jsonl")]
    rates = tables.choose_rates(tables.select(results, comparison.shorten(plan)), plan)
    runs = tables.select(results, plan)
    grpo = tables.pick(runs, "GRPO", teacher, rates["GRPO"], plan["seeds"])
    found = {}
    for method in methods:
        of_method = tables.pick(runs, method, teacher, rates.get(method), plan["seeds"]) if method in rates else []
        if len(of_method) == len(grpo):  # all seeds have run
            differences = [100 * (tables.final(a) - tables.final(b)) for a, b in zip(of_method, grpo, strict=True)]
            found[method] = mean(differences), tables.interval(differences)
    return found


def probe(student, teacher, prompts, models):
    plan = comparison.make_plan(student)
    job = {"student": student, "teacher": teacher, "rate": 0.0, "seed": 0, "rollouts": 128}
    bed = comparison.BEDS[student]
    trainer = comparison.make_trainer(str(bed.path(bed.student, models)), {}, job, plan["steps"], models)
    trainer.args.per_device_eval_batch_size = 128
    probe = Probe(trainer)
    probe.run(prompts)
    figures = report(probe.rollouts, eos_token_ids=trainer.eos_token_ids)
    return figures | probe.sample_teacher(prompts)


def read_figure(name):
    """A figure of each case, from the table."""
    table = (RESULTS / "probe" / "study.md").read_text()
    row = re.search(rf"^\| `{name}` \| (.*) \|$", table, re.MULTILINE)[1]
    return dict(zip(PAIRS, (float(cell.split()[0]) for cell in row.split(" | ")), strict=True))


def leave_out(study, figure):
    """
    Whether a bound on a figure, halfway (in the logarithm) between the cases in which RLAD gained and those in which
    it didn't, says for each student whether RLAD gains, if that student has no part in the bound.
    """
    gained = {case: points - width > 0.0 for case, (points, width) in ((c, s["RLAD"]) for c, s in study.items())}
    right = {}
    for student in dict(CASES):
        others = [case for case in CASES if case[0] != student]
        low = max(figure[case] for case in others if not gained[case])
        high = min(figure[case] for case in others if gained[case])
        right[student] = all(
            (figure[case] > (low * high) ** 0.5) == gained[case] for case in CASES if case[0] == student
        )
    return right


def quote():
    """What `trl_rlad.reports.advice` goes by and says of the study, in points of accuracy over or below GRPO's."""
    contradicted, entropy = read_figure("contradicted_failed"), read_figure("student_entropy")
    accuracy = read_figure("teacher_accuracy")
    study = {case: gains(*case, comparison.METHODS) for case in PAIRS}
    soft, far = LATER
    flawed = [case for case in CASES if case[1] == "flawed"]
    sure = ("mistaken", "strong")  # the case in which naming helps
    offline = [study[case]["offline distillation"][0] for case in CASES]
    elsewhere = [100 * share for (student, _), share in contradicted.items() if student in ("hasty", "sheltered")]
    best_in = sum(max(study[case].values())[0] == best for case, best in zip(CASES, offline, strict=True))
    worst = min(accuracy[case] for case in CASES)
    trusted = max((-study[case]["RLAD + named, trusted"][0], case) for case in flawed)[1]

    def gain(case, method, sign=1):
        points, plus_minus = study[case][method]
        return f"{sign * points:.1f} ± {plus_minus:.1f}"

    def both(cases, method, sign=1):
        return " and ".join(gain(case, method, sign) for case in cases)

    def span(values):
        return f"{min(values):.0f} to {max(values):.0f}"

    costs = span([-study[case]["RLAD + named"][0] for case in flawed])
    by_flawed = [(student, "flawed") for student, _ in HALF]  # right on a quarter of the chains
    pool = ("half_gpt_64", "strong")
    study |= {case: gains(*case, comparison.METHODS) for case in [*by_flawed, pool]}
    return {
        "source": "python benchmarks/probe_study.py --write",
        "basis": "eight pairs of small models",
        "bounds": BOUNDS,
        "evidence": {
            "contradicted_failed": f"To sure students naming gained {gain(sure, 'RLAD + named')} points over GRPO "
            f"where contradicted_failed was {contradicted[sure]:.0%}, and nothing at {span(elsewhere)}%; afterwards, "
            f"at {contradicted[far]:.0%}, {gain(far, 'RLAD + named')}.",
            "contradicted_succeeded": "A teacher that contradicts successes, or is often wrong, cost "
            f"{costs} points when it named what failed without teacher_weight; with it at most "
            f"{gain(trusted, 'RLAD + named, trusted', -1)}.",
            "student_entropy": f"On two half-learned students RLAD gained {both(HALF, 'RLAD')} points over GRPO, and "
            f"{both(HALF, comparison.EVERYWHERE)} if the teacher named too, on all completions. They had "
            f"{' and '.join(f'{entropy[case]:.2f}' for case in HALF)} nats; where RLAD gained nothing it was "
            f"{max(entropy[case] for case in CASES if case not in HALF):.2f} at most. A third one, afterwards, with "
            f"{entropy[soft]:.2f} nats: {gain(soft, 'RLAD')} and {gain(soft, comparison.EVERYWHERE)}; a far one, with "
            f"{entropy[far]:.2f}: {gain(far, 'RLAD')} and {gain(far, comparison.EVERYWHERE)}.",
            "teacher_accuracy": "From a teacher that was right on a quarter of the prompts, these two gained "
            f"{both(by_flawed, 'RLAD + named, trusted')} points with teacher_weight where it named what failed alone, "
            f"and {both(by_flawed, f'{comparison.EVERYWHERE}, trusted')} where it named everywhere; without "
            f"teacher_weight they ended {both(by_flawed, 'RLAD + named', -1)} below GRPO.",
            "teacher_rescues": f"Offline distillation was best in {best_in} of {len(CASES)} cases (new prompts, a "
            f"teacher that is right on {worst:.0%} at least), by {span(offline)} points over GRPO, and better alone "
            f"than with half of its steps given to RLAD ({gain(sure, 'offline distillation')} against "
            f"{gain(sure, 'offline, then RLAD + named')}). Of 64 prompts, used again and again, it gained "
            f"{gain(pool, 'offline distillation')}, and a teacher that named {gain(pool, 'RLAD + named')}.",
        },
        "limits": LIMITS,
        "settings": {name: read_method(name) for name in WORDS if name != OFFLINE},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96, help="prompts of each probe, with 8 completions each")
    parser.add_argument(
        "--models", type=Path, default=Path("outputs", "comparison"), help="where the models are or go"
    )
    parser.add_argument("--write", action="store_true", help="only write what the probe quotes")
    args = parser.parse_args()
    if not args.write:
        run(args)
    QUOTED.parent.mkdir(exist_ok=True)
    QUOTED.write_text(json.dumps(quote(), indent=2) + "\n")
    print(f"Wrote {QUOTED}")


def run(args):
    """Probe every case, and write the table."""
    torch.set_num_threads(1)
    args.models.mkdir(parents=True, exist_ok=True)
    for student, teacher in PAIRS:
        comparison.BEDS[student].prepare(teacher, args.models)
    found = {case: probe(*case, args.prompts, args.models) for case in PAIRS}

    rows = [["", *(f"{student}, {teacher}" for student, teacher in PAIRS)]]
    rows.append(["---"] * len(rows[0]))
    for name in FIGURES:
        rows.append([f"`{name}`", *("{:.2f} ({:.2f} to {:.2f})".format(*found[case][name]) for case in PAIRS)])
    for name in ("teacher_accuracy", "teacher_rescues"):
        rows.append([f"`{name}`", *(f"{found[case][name].value:.2f}" for case in PAIRS)])
    study = {case: gains(*case) for case in PAIRS}
    for method in METHODS:
        cells = [study[case].get(method) for case in PAIRS]
        rows.append([f"{method}, over GRPO", *("{:+.1f} ± {:.1f}".format(*cell) if cell else "-" for cell in cells)])
    for name in ("do", "then"):
        rows.append([f"the probe's advice: {name}", *(recommend(found[case])[name] or "-" for case in PAIRS)])
    right = leave_out(study, {case: found[case]["student_entropy"].value for case in PAIRS})
    table = "\n".join("| " + " | ".join(row).replace("nan (nan to nan)", "-") + " |" for row in rows)
    path = RESULTS / "probe" / "study.md"
    path.parent.mkdir(exist_ok=True)
    foretold = (
        "Whether RLAD gains over GRPO, foretold by `student_entropy` with the bound fitted without the student in "
        f"question: right for {sum(right.values())} of {len(right)} students. The last {len(LATER)} columns are of "
        "pairs that came after the rule, and have no part in its bounds."
    )
    path.write_text(f"{HEAD.format(prompts=args.prompts)}\n{table}\n\n{foretold}\n")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
