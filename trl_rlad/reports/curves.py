"""Curves of runs over their steps, as SVG that stands in HTML. A plotting library takes seconds to import."""

import re
from collections.abc import Callable
from html import escape
from math import inf
from statistics import mean


# A panel of curves, and for each of its lines its label and the names of metrics to be added up
PANELS = {
    "reward": {"": ["reward"]},
    "student against teacher: log(student / teacher), nats": {
        "all": ["teacher/log_ratio"],
        "rewarded": ["teacher/log_ratio_rewarded"],
        "punished": ["teacher/log_ratio_punished"],
    },
    "divergence from the teacher, nats": {"": ["teacher/kl"]},
    "tokens that are the teacher's first choice, share": {"": ["teacher/top1"]},
    "how undecided the teacher is: entropy, nats": {"": ["teacher/entropy"]},
    "tokens clipped, share": {
        "by the teacher": ["clip_ratio/high_by_teacher", "clip_ratio/low_by_teacher"],
        "by the policy": ["clip_ratio/high_by_policy", "clip_ratio/low_by_policy"],
    },
    "pass@1 in evaluation": {},  # of each reward function
    "seconds": {"step": ["step_time"], "generation": ["generation_time"], "scoring": ["teacher/scoring_time"]},
}
DASHES = ("", "6 3", "2 3", "8 2 2 2", "1 2")
COLORS = ("#3b7dd8", "#e0711c", "#2f9e62", "#b455c9", "#c9a100", "#d14a6b")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 170, 52, 56, 8, 22  # of a panel, and of its margins


def draw_curves(logs: dict[str, list[list[dict]]]) -> str:
    """
    Draw the curves of runs by their name, a picture for each panel, without what none of them has.

    Args:
        logs (`dict[str, list[list[dict]]]`):
            Of each name the logs of its runs, as transformers keeps them in `trainer_state.json`.

    Returns:
        `str`: HTML, empty without any curve.
    """
    figures = []
    for title, lines in _panels(logs).items():
        curves = []  # name of the run, label, number of the line, values of each run by step
        for number, (label, metrics) in enumerate(lines.items()):
            for name, of_name in logs.items():
                if found := [curve for log in of_name if (curve := _curve(log, metrics))]:
                    curves.append((name, label, number, found))
        if curves:
            figures.append(_figure(title, curves, dict(zip(logs, _colors(logs), strict=True))))
    if not figures:
        return ""
    keys = zip(logs, _colors(logs), strict=True)
    legend = "".join(f'<span class="key" style="background:{color}"></span>{escape(name)}' for name, color in keys)
    band = ""
    if any(len(of_name) > 1 for of_name in logs.values()):
        band = " A line is the mean of the runs of one name, and its band reaches from the lowest to the highest."
    hint = f"<small>Point at a dot for its value.{band}</small>"
    return f'<p>{legend}</p><div class="curves">{"".join(figures)}</div>{hint}'


def _colors(logs):
    return [COLORS[number % len(COLORS)] for number in range(len(logs))]


def _curve(log: list[dict], names: list[str]) -> dict[int, float]:
    """Values by step of the sum of some metrics; the mean where a step has several, such as those of parts of a data
    set."""
    values: dict[int, list[float]] = {}
    for entry in log:
        if found := [entry[name] for name in names if entry.get(name) is not None]:
            values.setdefault(entry["step"], []).append(sum(found))
    return {step: mean(of_step) for step, of_step in values.items()}


def _panels(logs: dict[str, list[list[dict]]]) -> dict[str, dict[str, list[str]]]:
    """`PANELS`, with the reward functions of these runs."""
    names = sorted({name for of_name in logs.values() for log in of_name for entry in log for name in entry})
    rewards = [name.split("/")[1] for name in names if re.fullmatch("eval_rewards/.*/pass@1", name)]
    return PANELS | {"pass@1 in evaluation": {reward: [f"eval_rewards/{reward}/pass@1"] for reward in rewards}}


def _figure(title, curves, colors):
    values = [value for *_, found in curves for curve in found for value in curve.values()]
    steps = [step for *_, found in curves for curve in found for step in curve]
    x, y = _scale(steps, LEFT, WIDTH - RIGHT), _scale(values, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<text x="{LEFT - 6}" y="{y(value) + 3:.1f}" text-anchor="end">{_short(value)}</text>'
        f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>'
        for value in sorted({min(values), max(values)})
    ]
    parts += [
        f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">step {step}</text>'
        for step in sorted({min(steps), max(steps)})
    ]
    ends = []
    for name, label, number, found in curves:
        points = _mean(found)
        of_steps = {step: [curve[step] for curve in found] for step in points}
        color, dash = colors[name], DASHES[number % len(DASHES)]
        if len(found) > 1:
            there = [(step, max(of_step)) for step, of_step in of_steps.items()]
            back = [(step, min(of_step)) for step, of_step in reversed(of_steps.items())]
            parts.append(f'<polygon fill="{color}" points="{_points(there + back, x, y)}"/>')
        if points:
            line = f'stroke="{color}" stroke-dasharray="{dash}" points="{_points(points.items(), x, y)}"'
            parts.append(f"<polyline {line}/>")
            ends.append((y(list(points.values())[-1]), color, list(points.values())[-1]))
        for step, value in points.items():
            said = escape(", ".join(filter(None, (name, label, f"step {step}: {value:.4g}"))))
            parts.append(
                f'<circle fill="{color}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"><title>{said}</title></circle>'
            )
    # The last values beside their lines, one above the other: not on the steps below, nor over the edge above
    ends.sort()
    places, place = [], inf
    for end, *_ in reversed(ends):
        place = min(end + 3, place - 10)
        places.append(place)
    place = TOP - 10
    for lowest, (_, color, value) in zip(reversed(places), ends, strict=True):
        place = max(lowest, place + 10)
        parts.append(f'<text fill="{color}" x="{WIDTH - RIGHT + 6}" y="{place:.1f}">{_short(value)}</text>')
    keys = "".join(
        f'<span><svg viewBox="0 0 24 6"><polyline stroke="currentColor" points="0,3 24,3" '
        f'stroke-dasharray="{DASHES[number % len(DASHES)]}"/></svg>{escape(label)}</span>'
        for label, number in {label: number for _, label, number, _ in curves if label}.items()
    )
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}, by step">{"".join(parts)}</svg>'
    )
    return f'<figure><figcaption>{escape(title)}</figcaption>{picture}<div class="keys">{keys}</div></figure>'


def _short(value):
    return f"{value:.3g}" if abs(value) >= 0.1 or value == 0.0 else f"{value:.2g}"


def _scale(values: list[float], start: float, end: float) -> Callable[[float], float]:
    low, high = min(values), max(values)
    return lambda value: start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def _mean(curves: list[dict[int, float]]) -> dict[int, float]:
    """The mean of several curves, at the steps that all have."""
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: mean(curve[step] for curve in curves) for step in steps}


def _points(points, x, y):
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
