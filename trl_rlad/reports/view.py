"""One HTML file, without a script and without an outside address, that shows what a teacher did to a run."""

import re
from collections.abc import Iterable, Iterator
from html import escape
from io import StringIO
from itertools import groupby
from math import exp
from pathlib import Path
from statistics import mean
from typing import Any

from ..runs import CLIPPED, log_ratios


STEPS = (0.1, 0.3, 1.0, 2.0, 4.0)  # nats of disagreement from which a token is coloured more deeply
INK = "#123456"  # stands in the picture for the colour of the text, light or dark
# A panel of curves, and for each of its lines its label and the names of metrics to be added up
PANELS = {
    "reward": {"": ["reward"]},
    "log(student / teacher), nats": {
        "": ["teacher/log_ratio"],
        "rewarded": ["teacher/log_ratio_rewarded"],
        "punished": ["teacher/log_ratio_punished"],
    },
    "share of tokens clipped": {
        "by the teacher": ["clip_ratio/high_by_teacher", "clip_ratio/low_by_teacher"],
        "by the policy": ["clip_ratio/high_by_policy", "clip_ratio/low_by_policy"],
    },
    "pass@1 in evaluation": {},  # of each reward function
    "seconds": {"step": ["step_time"], "generation": ["generation_time"], "scoring": ["teacher/scoring_time"]},
}
STYLES = ("-", "--", ":")
COLORS = ("#3b7dd8", "#e0711c", "#2f9e62", "#b455c9", "#c9a100", "#d14a6b")

CSS = Path(__file__).with_suffix(".css").read_text() + "".join(
    f".{side}{depth} {{ background: rgb({color} / {0.13 + 0.14 * depth:.2f}); }}\n"
    for side, color in (("s", "233 113 23"), ("t", "52 120 235"))
    for depth in range(len(STEPS))
)


def render(runs: list[tuple[str, list[dict], list[dict]]], max_tokens: int = 20_000) -> str:
    """
    Write the page.

    Args:
        runs (`list[tuple[str, list[dict], list[dict]]]`):
            Of each run its name, the records of its rollouts (see [`~trl_rlad.rollouts.describe_rollouts`]) and its
            log, as transformers keeps it in `trainer_state.json`. Runs of the same name, such as those of several
            seeds, share a curve.
        max_tokens (`int`, *optional*, defaults to `20_000`):
            Groups of completions are shown, those first that the teacher changed most, until they have this many
            tokens.

    Returns:
        `str`: HTML. Whatever comes from the runs is escaped.
    """
    logs: dict[str, list[list[dict]]] = {}
    for name, _, log in runs:
        logs.setdefault(name, []).append(log)
    groups = sorted(_groups(runs), key=lambda group: -group[0])
    shown, tokens = 0, 0
    while shown < len(groups) and (tokens := tokens + sum(len(r["tokens"]) for r in groups[shown][3])) <= max_tokens:
        shown += 1
    shown = max(shown, min(len(groups), 1))
    cards = "".join(_card(number < 3, *group) for number, group in enumerate(groups[:shown]))
    legend = "".join(f'<span class="s{d}"> &gt; {x} </span>' for d, x in reversed(list(enumerate(STEPS))))
    legend += " 0 " + "".join(f'<span class="t{d}"> &lt; -{x} </span>' for d, x in enumerate(STEPS))
    parts = ["<h1>What the teacher did</h1>"]
    if curves := draw_curves(logs):
        keys = (f'<span class="key" style="background:{color}"></span>{escape(name)}' for name, color in _colors(logs))
        parts.append(f"<h2>Curves</h2><p>{''.join(keys)}</p>{curves}")
        if any(len(of_name) > 1 for of_name in logs.values()):
            parts.append(
                "<small>A line is the mean of the runs of one name, and its band reaches from the lowest to the "
                "highest.</small>"
            )
    if groups:
        parts.append(
            f"<h2>Rollouts</h2><p>{shown} of {len(groups)} groups, those first that the teacher changed most: by the "
            "mean of |advantage| times |log(student / teacher)|, bounded by 1. Point at a token for its figures.</p>"
            f'<p class="legend tokens">log(student / teacher): {legend}\n'
            '<span class="teacher">clipped by the teacher alone</span>  '
            '<span class="policy">clipped by the policy</span>  '
            f'<span class="mute">not scored by the teacher</span></p>{cards}'
        )
    if len(parts) == 1:
        parts.append(
            "<p>There is nothing to see: no log and no rollouts. Rollouts are written with "
            "<code>log_completions=True</code>.</p>"
        )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Rollouts</title>'
    head += f"<style>{CSS}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _groups(runs: Iterable) -> Iterator[tuple[float, str, tuple, list[dict]]]:
    """How much the teacher changed each group, the group's run, its number there, and its records."""
    for name, records, _ in runs:
        for key, group in groupby(records, key=lambda record: (record["step"], record["group"])):
            group = list(group)
            changes = [
                abs(record["advantage"]) * min(abs(x), 1.0)
                for record in group
                for x in log_ratios(record)
                if x is not None
            ]
            yield mean(changes) if changes else 0.0, name, key, group


def _card(is_open, change, name, key, records):
    rows = []
    # The same completion several times is shown once
    records = sorted(records, key=lambda record: (-record["advantage"], record["tokens"]))
    for _, same in groupby(records, key=lambda record: (-record["advantage"], record["tokens"])):
        record, *others = same
        gaps = [x for x in log_ratios(record) if x is not None]
        reward = "not judged" if record["reward"] is None else f"reward {record['reward']:g}"
        side = "up" if record["advantage"] > 0 else "down" if record["advantage"] < 0 else ""
        facts = [f'<span class="{side}">A = {record["advantage"]:+.2f}</span> · {reward}']
        facts += [f"{1 + len(others)} times the same"] if others else []
        facts.append(f"mean {mean(gaps):+z.2f}" if gaps else "not read by the teacher")
        clipped = record.get("clipped") or []
        facts += [
            f"{clipped.count(number) / len(clipped):.0%} clipped by the {cause}"
            for number, cause in enumerate(CLIPPED)
            if number and number in clipped
        ]
        tokens = "".join(_token(*token) for token in _tokens(record))
        rows.append(
            f'<div class="row"><div class="soft">{"<br>".join(facts)}</div><div class="tokens">{tokens}</div></div>'
        )
    title = f"{escape(name)} · step {escape(str(key[0]))} · group {escape(str(key[1]))} · changed by {change:.2f}"
    prompt = f'<div class="prompt">{escape(records[0]["prompt"])}</div>'
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>{prompt}{''.join(rows)}</details>"


def _tokens(record):
    clipped = record.get("clipped") or [0] * len(record["tokens"])
    return zip(record["tokens"], record["logps"], record["teacher_logps"], clipped, strict=True)


def _token(text, logp, teacher_logp, clipped):
    classes, facts = [], [f"student {_percent(logp)}"]
    if teacher_logp is None:
        classes.append("mute")
        facts.append("not scored by the teacher")
    else:
        gap = logp - teacher_logp
        depth = sum(abs(gap) > step for step in STEPS)
        if depth:
            classes.append(f"{'s' if gap > 0 else 't'}{depth - 1}")
        facts += [f"teacher {_percent(teacher_logp)}", f"log ratio {gap:+.2f}"]
    if clipped:
        classes.append(CLIPPED[clipped])
        facts.append(f"clipped by the {CLIPPED[clipped]}")
    facts = escape("   ".join([text.strip() or repr(text), *facts]))
    shown = escape(text).replace("\n", "⏎\n")
    return f'<span class="{" ".join(classes)}" data-x="{facts}">{shown}</span>'


def _percent(logp):
    probability = exp(logp)
    return f"{probability:.1%}" if probability >= 0.001 else f"{probability:.0e}"


def _colors(logs):
    return [(name, COLORS[number % len(COLORS)]) for number, name in enumerate(logs)]


def _curve(log: list[dict], names: list[str]) -> dict[int, float]:
    """Values by step of the sum of some metrics; the mean where a step has several, such as those of parts of a data
    set."""
    values: dict[int, list[float]] = {}
    for entry in log:
        if found := [entry[name] for name in names if entry.get(name) is not None]:
            values.setdefault(entry["step"], []).append(sum(found))
    return {step: mean(of_step) for step, of_step in values.items()}


def _lines(logs: dict[str, list[list[dict]]]) -> dict[str, dict[str, list[str]]]:
    """`PANELS`, with the reward functions of these runs."""
    names = sorted({name for of_name in logs.values() for log in of_name for entry in log for name in entry})
    rewards = [name.split("/")[1] for name in names if re.fullmatch("eval_rewards/.*/pass@1", name)]
    return PANELS | {"pass@1 in evaluation": {reward: [f"eval_rewards/{reward}/pass@1"] for reward in rewards}}


def draw_curves(logs: dict[str, list[list[dict]]]) -> str:
    """
    Draw the curves of runs by their name as SVG, to stand in HTML, without what none of them has.

    matplotlib draws them: it is there already, a picture of its own takes some KB where the scripts of Plotly take
    millions, and there is nothing to zoom into that the log doesn't tell better.
    """
    panels: dict[str, dict[str, dict[str, list]]] = {}
    for title, lines in _lines(logs).items():
        for label, metrics in lines.items():
            curves = {name: [_curve(log, metrics) for log in of_name] for name, of_name in logs.items()}
            if any(map(any, curves.values())):
                panels.setdefault(title, {})[label] = curves
    if not panels:
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "", "font.family": "sans-serif", "font.size": 9}
    settings["text.parse_math"] = False  # a dollar sign in a name is one
    settings |= {f"{part}.color": INK for part in ("text", "xtick", "ytick")} | {
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
    }
    with matplotlib.rc_context(settings):
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(3.7 * columns, 2.6 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes[len(panels) :]:
            axis.remove()
        for axis, (title, lines) in zip(axes, panels.items(), strict=False):
            axis.set_title(title, fontsize=9)
            axis.patch.set_visible(False)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.15, color=INK)
            for (label, curves), style in zip(lines.items(), STYLES, strict=False):
                for name, color in _colors(logs):
                    _draw(axis, [curve for curve in curves[name] if curve], style, color)
                if label:
                    axis.plot([], [], style, color=INK, label=label)
            axis.set_xlabel("step")
            if any(lines):
                axis.legend(frameon=False, fontsize=8)
        file = StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace(INK, "currentColor")


def _draw(axis, curves, style, color):
    if not curves:
        return
    steps = sorted(set.intersection(*map(set, curves)))
    marker = "." if len(steps) == 1 else ""
    axis.plot(
        steps, [mean(curve[step] for curve in curves) for step in steps], style + marker, color=color, linewidth=1.4
    )
    if len(curves) > 1:
        bounds = ([bound(curve[step] for curve in curves) for step in steps] for bound in (min, max))
        axis.fill_between(steps, *bounds, color=color, alpha=0.15, linewidth=0)
