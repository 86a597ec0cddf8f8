"""One HTML file, without an outside address, that shows what a teacher did to a run."""

import json
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from itertools import groupby
from math import exp
from pathlib import Path
from typing import Any

import numpy as np

from ..rollouts import log_ratios
from .curves import draw_curves


STEPS = (0.1, 0.3, 1.0, 2.0, 4.0)  # nats of disagreement from which a token is coloured more deeply
GRID, LOWEST, UNSCORED = 500, -65.0, 1  # log-probabilities are whole numbers of 1/500 nat; of none there is 1

SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
CSS = Path(__file__).with_suffix(".css").read_text(encoding="utf-8") + "".join(
    f".{side}{depth} {{ background: rgb({color} / {0.13 + 0.14 * depth:.2f}); }}\n"
    for side, color in (("s", "233 113 23"), ("t", "52 120 235"))
    for depth in range(len(STEPS))
)
NOTHING = """<p>There is nothing to see: no log and no rollouts. A run with a teacher writes rollouts by itself, unless
<code>log_rollouts=False</code>; any other with <code>log_completions=True</code>.</p>"""


def render(runs: list[tuple[str, list[dict], list[dict]]], max_tokens: int = 2_000_000) -> str:
    """
    Write the page.

    Args:
        runs (`list[tuple[str, list[dict], list[dict]]]`):
            Of each run its name, the records of its rollouts (see [`~trl_rlad.rollout_log.describe_rollouts`]) and its
            log, as transformers keeps it in `trainer_state.json`. Runs of the same name, such as those of several
            seeds, share a curve.
        max_tokens (`int`, *optional*, defaults to `2_000_000`):
            Groups of completions are shown, those first in whose loss the teacher has the largest part, until they
            have this many tokens.

    Returns:
        `str`: HTML. Whatever comes from the runs is text in it.
    """
    logs: dict[str, list[list[dict]]] = {}
    for name, _, log in runs:
        logs.setdefault(name, []).append(log)
    parts = []
    if curves := draw_curves(logs):
        parts.append(f"<h2>Curves</h2>{curves}")
    if any(records for _, records, _ in runs):
        parts.append("<h2>Rollouts</h2>" + draw_rollouts([(name, records) for name, records, _ in runs], max_tokens))
    return make_page("What the teacher did: " + ", ".join(logs), "".join(parts) or NOTHING)


def make_page(title: str, body: str) -> str:
    """A page around a body of HTML, with the script and the style of [`draw_rollouts`]. It loads nothing, and no
    script runs in it but ours, whatever the body holds."""
    digest = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><h1>{escape(title)}</h1>{body}"
        f'<div id="facts" role="status" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )


def draw_rollouts(runs: list[tuple[str, list[dict]]], max_tokens: int = 2_000_000) -> str:
    """
    The panel of rollouts, for the body of [`make_page`]: once in a page.

    Args:
        runs (`list[tuple[str, list[dict]]]`):
            Of each run its name and the records of its rollouts.
        max_tokens (`int`, *optional*, defaults to `2_000_000`):
            Groups are shown until they have this many tokens, one at least.

    Returns:
        `str`: HTML.
    """
    groups = sorted(_groups(runs), key=lambda group: (group["split"] == "eval", -group["part"]))
    shown: list[dict[str, Any]] = []
    tokens = 0
    for group in groups:
        tokens += sum(len(record["tokens"]) for record in group["rows"])
        if shown and tokens > max_tokens:
            break
        shown.append(group)
    texts: dict[str, int] = {}
    data = {
        "steps": STEPS,
        "grid": GRID,
        "unscored": UNSCORED,
        "groups": [group | {"rows": _rows(group["rows"], texts)} for group in shown],
        "texts": list(texts),
    }
    # In a script of data nothing ends but by `</script>`, nor becomes a comment but by `<!--`
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    names = any(record.get("named") for group in shown for record in group["rows"])
    say = '<span class="say">In a frame</span>: what the teacher would say instead.'
    if not names:
        say = 'What it would say instead is known where it names: <code>teacher_kl="forward"</code>.'
    left = f" Of {len(groups)} groups, {len(shown)} are here." if len(shown) < len(groups) else ""
    legend = "".join(f'<span class="s{depth}">&emsp;</span>' for depth in reversed(range(len(STEPS))))
    legend += "<span>&emsp;</span>" + "".join(f'<span class="t{depth}">&emsp;</span>' for depth in range(len(STEPS)))
    factors = ", ".join(f"{exp(step):.2g}" for step in STEPS)
    return f"""<p>Each group has completions of one prompt. First come those of training in whose loss the teacher has
the largest part.{left}</p><p class="legend"><span class="s4">orange</span>: the student likes this token more than the
teacher; <span class="t4">blue</span>: the teacher likes it more. {legend} The deeper, the more: from {factors} times
as likely. <span class="teacher">Underlined</span>: clipped because of the teacher; <span class="policy">dotted</span>:
clipped in any case. <span class="mute">Pale</span>: the teacher hasn't read it. {say} Point at a token or touch it for
its figures; <kbd>n</kbd> and <kbd>p</kbd> lead to the next large disagreement and back, the arrows to the next
token.</p>
<form id="filters"></form><div id="groups"></div>
<noscript>The rollouts are drawn by the script in this file, which is turned off.</noscript>
<script type="application/json" id="data">{text}</script>"""


def _groups(runs: Iterable[tuple[str, list[dict]]]) -> Iterable[dict[str, Any]]:
    """What the title of each group says, and its records."""
    for name, records in runs:
        for (step, split, number), group in groupby(
            records, key=lambda record: (record["step"], record.get("split") or "", record["group"])
        ):
            rows = list(group)
            parts = [part for row in rows for part in _parts(row)]
            yield {
                "run": name,
                "step": step,
                "split": split,
                "group": number,
                "kind": rows[0].get("kind") or "",
                "prompt": rows[0]["prompt"],
                "rewards": rows[0].get("rewards") or [row["reward"] for row in rows],
                "part": round(sum(parts) / len(parts), 4) if parts else 0.0,
                "rows": rows,
            }


def _parts(record):
    """The teacher's part in the loss of each token; where there was no such loss, as in a probe, how much it
    disagrees, bounded as the loss bounds it."""
    return record.get("part") or [min(abs(x), 1.0) for x in log_ratios(record) if x is not None]


def _rows(records: list[dict], texts: dict[str, int]) -> list[dict[str, Any]]:
    """Completions as the script reads them, the rewarded first. `texts` numbers the texts of tokens."""
    rows = []
    # The same completion several times is shown once
    key = lambda record: (-record["advantage"], record["tokens"])  # noqa: E731
    for _, same in groupby(sorted(records, key=key), key=key):
        record, *others = same
        gaps = [x for x in log_ratios(record) if x is not None]
        numbers = [_number(text, texts) for text in record["tokens"]]
        is_wide = len(texts) > 2**16
        row = {
            "reward": record["reward"],
            "advantage": round(record["advantage"], 4),
            "solved": record.get("solved", record["reward"] is not None and record["reward"] > 0.0),
            "teacher": record.get("teacher") or "",
            "times": 1 + len(others),
            "mean": round(sum(gaps) / len(gaps), 4) if gaps else None,
            "part": round(sum(_parts(record)) / max(1, len(record["tokens"])), 4),
            "length": len(numbers),
            "wide": is_wide,
            "tokens": _encode(numbers, np.uint32 if is_wide else np.uint16),
            "student": _encode(_on_grid(record["logps"]), np.int16),
            "scored": _encode(_on_grid(record["teacher_logps"]), np.int16),
        }
        if any(record.get("clipped") or ()):
            row["clipped"] = _encode(record["clipped"], np.uint8)
        if record.get("named"):
            row["named"] = _named(record, texts)
        rows.append(row)
    return rows


def _named(record, texts):
    """What the teacher would say, by the number of the token, where it isn't the token and nothing else: texts and
    percents in turn."""
    named = {}
    for number, (token, names, logps) in enumerate(
        zip(record["tokens"], record["named"], record["named_logps"], strict=True)
    ):
        if names and (names[0].strip() != token.strip() or logps[0] < -STEPS[0]):
            pairs = zip(names, logps, strict=True)
            named[number] = [x for name, logp in pairs for x in (_number(name, texts), round(100 * exp(logp)))]
    return named


def _number(text, texts):
    return texts.setdefault(text, len(texts))


def _on_grid(logps):
    values = np.array([UNSCORED / GRID if logp is None else min(logp, 0.0) for logp in logps], dtype=np.float64)
    return np.round(np.maximum(values, LOWEST) * GRID)


def _encode(values, kind) -> str:
    return b64encode(np.asarray(values).astype(kind).tobytes()).decode()
