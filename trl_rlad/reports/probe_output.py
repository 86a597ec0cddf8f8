"""The report of a probe as text, as a picture and as a page."""

from base64 import b64encode
from html import escape
from pathlib import Path
from typing import TextIO

from ..rollouts import log_ratios
from .probe import ALPHAS, FEW, widen
from .view import draw_rollouts, make_page


END = 6.0  # nats, of the picture
SHARES = (
    "mean@1 pass@k signal discrimination prefers_rewarded prefers_punished contradicted_failed contradicted_succeeded "
    "top1"
).split()


def write_picture(rollouts: list[dict], figures: dict, path: Path):
    """Draw the gap over the tokens, by success, and the shares with their intervals."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(6, 7), layout="constrained")  # for a telephone, too
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
    axes[0].set_title("where student and teacher disagree", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    names = [name for name in SHARES if figures[name].value >= 0][::-1]
    for place, name in enumerate(names):
        value, low, high, _ = widen(figures[name])
        axes[1].errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color="C0", capsize=3)
    axes[1].axvline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes[1].set_title("shares, with their 95% intervals", fontsize=10)
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


# What the three first lines say, by the names of an advice
DECISION = {"do": "What to do:", "sure": "How sure:  ", "paste": "Paste:     "}
COLUMNS = ("", "", "95%", "groups", "")


def decide(figures: dict) -> list[str]:
    """The three first lines. YAML to paste goes on in more."""
    return [f"{title} {figures['advice'][name]}" for name, title in DECISION.items()]


def _rows(figures: dict):
    """The table: a title alone, or name, value, interval, number of groups, and meaning."""
    answers = {
        "teacher_accuracy": (SHARE, "the teacher's own answers that succeed"),
        "teacher_rescues": (SHARE, "prompts that it answers, of those on which the student fails throughout"),
    }
    for title, rows in {**TABLE, "the teacher's own answers": answers}.items():
        known = {name: row for name, row in rows.items() if name in figures}
        if known:
            yield (title,)
        for name, (form, meaning) in known.items():
            value, low, high, groups = widen(figures[name]) if form == SHARE else figures[name]
            interval = f"too few ({groups})" if groups < FEW else f"{form.format(low)} to {form.format(high)}"
            yield name, form.format(value) if groups else "-", interval, str(groups), meaning


def _facts(figures: dict) -> list[str]:
    """What the table doesn't have, a line each."""
    seconds, memory = figures["seconds"], figures["device_memory_gib"]
    costs = f"{seconds['scoring']:.1f} s of scoring beside {seconds['generation']:.1f} s of generation"
    if memory:
        costs += f"; {memory['scoring']:.1f} GiB beside {memory['generation']:.1f}"
    quantiles = ", ".join(f"{q}%: {value:+z.2f}" for q, value in figures["gap_quantiles"].items())
    return [
        f"{figures['completions']} completions of {figures['prompts']} prompts, {figures['tokens']} tokens; the "
        f"teacher has scored all but {figures['tokens_without_say']}. Student: {figures['student']}; teacher: "
        f"{figures['teacher']}.",
        f"Quantiles of the gap: {quantiles}",
        costs,
    ]


def _reasons(figures: dict) -> list[str]:
    return [f"{name}: {figures['advice'][name]}" for name in ("then", "evidence", "limits") if figures["advice"][name]]


def print_report(figures: dict, file: TextIO):
    """Print the decision, what speaks for it, and the figures."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, width=None if file.isatty() else 140, highlight=False, markup=False)
    # Not by the console, which would break what is to be pasted
    print(*decide(figures), "", *_reasons(figures), "", sep="\n", file=file)
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for name, *cells in _rows(figures):
        table.add_row(f"  {name}" if cells else name, *cells, style=None if cells else "bold")
    console.print(table)
    for fact in _facts(figures):
        console.print(fact)


def render_page(figures: dict, picture: Path, rollouts: list[dict]) -> str:
    """The report as one HTML page: the decision, the picture, the figures, and the rollouts as `trl-rlad view` shows
    them. Whatever comes from the run is escaped."""
    advice, table = figures["advice"], ""
    for name, *cells in _rows(figures):
        row = f"<td>{escape(name)}" + "".join(f"<td>{escape(cell)}" for cell in cells)
        table += f"<tr>{row}" if cells else f"<tr><th colspan=5 align=left>{escape(name)}"
    source = f"data:image/png;base64,{b64encode(picture.read_bytes()).decode()}"
    parts = [
        f"<p><b>What to do: {escape(advice['do'])}</b><p>How sure: {escape(advice['sure'])}"
        f"<p>Paste:<pre style='white-space:pre-wrap'>{escape(advice['paste'])}</pre>",
        *(f"<p style='white-space:pre-wrap'>{escape(text)}</p>" for text in _reasons(figures)),
        f'<p><img src="{source}" style="max-width:100%" alt="The gap over the tokens, and the shares"></p>',
        f"<details><summary>All figures</summary>{''.join(f'<p>{escape(fact)}</p>' for fact in _facts(figures))}",
        f"<div style='overflow:auto'><table><tr>{''.join(f'<th>{name}' for name in COLUMNS)}{table}</table></div>",
        f"</details><h2>Rollouts</h2>{draw_rollouts([('the probe', rollouts)])}",
    ]
    title = f"{figures['student']}, taught by {figures['teacher']}: a probe before training"
    return make_page(title, "".join(parts))
