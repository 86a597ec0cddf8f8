"""
Look at the rollouts and the curves of runs, in one HTML file.

    trl-rlad view
    trl-rlad view outputs/chains-rlad --open
    trl-rlad view GRPO=outputs/grpo-{0,1,2} RLAD=outputs/rlad-{0,1,2}

A run is the output folder of a training, or the `.parquet` file of a probe; without any, the newest below this folder
is taken. Those with the same NAME= before them, such as several seeds, share a curve. Curves come from
`trainer_state.json`, or before that is written from the last checkpoint; rollouts are written by every training with a
teacher, unless `log_rollouts` is false. The page goes into the run's folder, and of several into the folder of all.
"""

import json
import os
import warnings
import webbrowser
from argparse import ArgumentParser
from itertools import chain
from pathlib import Path

from ..reports.view import render
from ..rollouts import FOLDER, read_rollouts
from . import HelpFormatter


STATE = "trainer_state.json"


def read_log(path: Path) -> list[dict]:
    """The numbers in the log of a run by its output folder; empty if it has none yet. A file that can't be read is
    passed over with a warning."""
    checkpoints = [each for each in path.glob("checkpoint-*") if each.name.partition("-")[2].isdigit()]
    for folder in (path, *sorted(checkpoints, key=lambda each: -int(each.name.partition("-")[2]))):
        try:
            log = json.loads((folder / STATE).read_text())["log_history"]
            return [
                {name: x for name, x in entry.items() if isinstance(x, (int, float))}
                for entry in log
                if entry["step"] >= 0
            ]
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            warnings.warn(f"{folder / STATE} isn't a whole log, so it is passed over: {error!r}", stacklevel=2)
    return []


def find_newest(folder: Path) -> Path:
    """The run below a folder, at most three folders deep, that has written last. Raises `SystemExit` if there is
    none."""
    written: dict[Path, float] = {}
    for depth in ("", "*/", "*/*/", "*/*/*/"):
        for file in chain(folder.glob(f"{depth}{FOLDER}/rollouts_*.parquet"), folder.glob(f"{depth}{STATE}")):
            run = file.parents[1] if file.suffix == ".parquet" else file.parent
            run = run.parent if run.name.startswith("checkpoint-") else run
            written[run] = max(file.stat().st_mtime, written.get(run, 0.0))
    if not written:
        raise SystemExit("There is no run here or in the folders below. Name its output folder: trl-rlad view FOLDER")
    return max(written, key=written.__getitem__)


def read_run(run: str) -> tuple[Path, tuple[str, list[dict], list[dict]]]:
    """The path of what was named on the command line, and its name, rollouts and log."""
    name, is_named, rest = run.partition("=")
    if Path(run).exists() or not is_named:
        name, rest = "", run
    path = Path(rest)
    if not path.exists():
        raise SystemExit(f"There is no run at {path}.")
    name = name or (path.absolute().name if path.is_dir() else path.stem)
    return path, (name, read_rollouts(path), read_log(path))


def describe(name: str, rollouts: list[dict], log: list[dict]) -> str:
    """What there is of a run, and what there isn't."""
    steps = sorted({record["step"] for record in rollouts})
    groups = {(record["step"], record.get("split"), record["group"]) for record in rollouts}
    tokens = sum(len(record["tokens"]) for record in rollouts)
    found = "no rollouts (they are written with a teacher, unless `log_rollouts` is false)"
    if rollouts:
        found = f"{len(rollouts):,} completions in {len(groups):,} groups, {tokens:,} tokens, {_steps(steps)}"
    curves = _steps(sorted({entry["step"] for entry in log})) if log else ""
    return f"{name}: {found}; {f'curves of {curves}' if log else f'no curves (there is no {STATE} yet)'}"


def _steps(steps):
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def main(arguments: list[str] | None = None):
    parser = ArgumentParser("trl-rlad view", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a folder, or NAME=FOLDER; the newest if left out")
    parser.add_argument("--output", type=Path, help="where the page goes (default: view.html in the run's folder)")
    parser.add_argument("--step", type=int, help="show only the rollouts of this step")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="show groups until they have this many tokens")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    args = parser.parse_args(arguments)
    if args.tokens < 1:
        parser.error(f"--tokens must be at least 1, but is {args.tokens}")
    found = [read_run(run) for run in args.runs or [str(find_newest(Path()))]]
    paths, runs = [path for path, _ in found], [run for _, run in found]
    for run in runs:
        print(describe(*run))
    if args.step is not None:
        steps = sorted({record["step"] for _, rollouts, _ in runs for record in rollouts})
        if args.step not in steps:
            there = f"there are those of {', '.join(map(str, steps))}" if steps else "there are none"
            raise SystemExit(f"There are no rollouts of step {args.step}: {there}.")
        runs = [(name, [each for each in rollouts if each["step"] == args.step], log) for name, rollouts, log in runs]
    if not any(rollouts or log for _, rollouts, log in runs):
        raise SystemExit("There is nothing to see, so no page is written.")
    folder = os.path.commonpath([(path if path.is_dir() else path.parent).absolute() for path in paths])
    output = args.output or Path(os.path.relpath(folder), "view.html")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(runs, args.tokens), encoding="utf-8", errors="replace")
    print(f"Wrote {output}, {output.stat().st_size / 1000:,.0f} KB")
    if args.open:
        webbrowser.open(output.absolute().as_uri())
