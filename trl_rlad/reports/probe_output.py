"""The report of a probe as a table and as a picture."""

from pathlib import Path

from ..runs import log_ratios
from .probe import ALPHAS


END = 6.0  # nats, of the picture
SHARES = (
    "mean@1 pass@k signal discrimination prefers_rewarded prefers_punished contradicted_failed contradicted_succeeded "
    "top1"
).split()


def write_picture(rollouts: list[dict], figures: dict, path: Path):
    """Draw the gap over the tokens, by success, and the shares with their intervals."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for rollout in rollouts:
        known = [min(max(x, -END), END) for x in log_ratios(rollout) if x is not None]
        if rollout["reward"] is not None:
            gaps[rollout["reward"] > figures["success_reward"]] += known
    labels = ["tokens of successes", "tokens of failures"]
    axes[0].hist(
        list(gaps.values()), bins=40, range=(-END, END), log=True, histtype="step", linewidth=1.5, label=labels
    )
    axes[0].set(xlabel=f"log(student / teacher), nats (at the ends, {END:g} and more)", ylabel="tokens")
    axes[0].legend(frameon=False, fontsize=8)
    names = [name for name in SHARES if figures[name].value >= 0][::-1]
    for place, name in enumerate(names):
        value, low, high = figures[name]
        axes[1].errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color="C0", capsize=3)
    axes[1].axvline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes[1].set(xlim=(-0.03, 1.03), yticks=range(len(names)), yticklabels=names)
    figure.savefig(path, dpi=120)
    plt.close(figure)


SHARE, NATS = "{:.0%}", "{:+z.2f}"  # `z` writes no -0.00
# What the table shows: figures, how to write them, and what they tell
TABLE = {
    "student and task": {
        "mean@1": (SHARE, "completions that succeed"),
        "pass@k": (SHARE, "prompts with a success among all completions"),
        "signal": (SHARE, "groups whose rewards differ: all that GRPO learns from"),
        "all_failed": (SHARE, "groups without a success"),
        "student_entropy": ("{:.2f}", "how undecided the student is, in nats"),
    },
    "what the teacher knows": {
        "discrimination": ("{:.2f}", "it favours the better of two completions, against the student; chance .5"),
        "teacher_auc": ("{:.2f}", "the better of two completions is likelier to it"),
        "student_auc": ("{:.2f}", "the same of the student"),
        "prefers_rewarded": (SHARE, "rewarded tokens that it likes more than the student"),
        "prefers_punished": (SHARE, "punished tokens that it likes more than the student"),
        "contradicted_failed": (SHARE, "failed completions in which it contradicts what the student is sure of"),
        "contradicted_succeeded": (SHARE, "the same of those that succeeded: is it to be believed?"),
        "entropy": ("{:.2f}", "how undecided it is, in nats, over its likeliest 20 tokens"),
    },
    "gap, log(student / teacher) in nats": {
        "gap": (NATS, "mean"),
        "gap_rewarded": (NATS, "on rewarded completions"),
        "gap_punished": (NATS, "on punished completions"),
        "gap_first": (NATS, "at the first token"),
        "gap_eos": (NATS, "at the end of a completion"),
        "beyond_clip": (SHARE, "beyond teacher_log_ratio_clip"),
        "top1": (SHARE, "tokens that are the teacher's likeliest"),
    },
    "tokens that RLAD would clip at first": {
        f"clip_{side}@{alpha}": (SHARE, f"{tokens}, at alpha = {alpha}")
        for alpha in ALPHAS
        for side, tokens in (("high", "rewarded"), ("low", "punished"))
    },
}


def print_report(figures: dict):
    """Print the figures as a table, and the advice."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{figures['completions']} completions of {figures['prompts']} prompts, {figures['tokens']} tokens; the "
        f"teacher has scored all but {figures['tokens_without_say']}. Student: {figures['student']}; teacher: "
        f"{figures['teacher']}.",
        highlight=False,
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for column in ("", "", "95%", ""):
        table.add_column(column, justify="right" if column == "95%" else "left")
    for title, rows in TABLE.items():
        table.add_row(f"[bold]{title}", "", "", "")
        for name, (form, meaning) in rows.items():
            value, low, high = figures[name]
            cells = ("-", "") if value != value else (form.format(value), f"{form.format(low)} to {form.format(high)}")
            table.add_row(f"  {name}", *cells, meaning)
    console.print(table)
    quantiles = ", ".join(f"{q}%: {value:+z.2f}" for q, value in figures["gap_quantiles"].items())
    console.print(f"Quantiles of the gap: {quantiles}", highlight=False)
    if "teacher_accuracy" in figures:
        text = f"The teacher's own completions of these prompts: {figures['teacher_accuracy']:.0%} succeed"
        if figures["teacher_rescues"] >= 0.0:  # not NaN
            text += f"; it answers {figures['teacher_rescues']:.0%} of those on which the student fails throughout"
        console.print(text, highlight=False)
    seconds, memory = figures["seconds"], figures["device_memory_gib"]
    costs = f"{seconds['scoring']:.1f} s of scoring beside {seconds['generation']:.1f} s of generation"
    if memory:
        costs += f"; {memory['scoring']:.1f} GiB beside {memory['generation']:.1f}"
    console.print(costs, highlight=False)
    for name, text in figures["advice"].items():
        console.print(f"[bold]{name}[/]: {text}", highlight=False)
