"""
Look at the rollouts and the curves of runs, in one HTML file.

    trl-rlad view outputs/mini-rlad
    trl-rlad view GRPO=outputs/grpo-{0,1,2} RLAD=outputs/rlad-{0,1,2}

A run is the output folder of a training, or the `.parquet` file of a probe. Those with the same NAME= before them,
such as several seeds, share a curve. Curves come from `trainer_state.json`, or before that is written from the last
checkpoint; rollouts from what a training with `log_completions` has written.
"""

import json
import warnings
from argparse import ArgumentParser
from pathlib import Path

from . import HelpFormatter


def read_log(path: Path) -> list[dict]:
    """The numbers in the log of a run by its output folder; empty if it has none yet. A file that can't be read is
    passed over with a warning."""
    from ..runs import last_checkpoint

    for folder in (path, Path(last_checkpoint(str(path)) or path)):
        file = folder / "trainer_state.json"
        try:
            log = json.loads(file.read_text())["log_history"]
            return [
                {name: x for name, x in entry.items() if isinstance(x, (int, float))}
                for entry in log
                if entry["step"] >= 0
            ]
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            warnings.warn(f"{file} isn't a whole log, so it is passed over: {error!r}", stacklevel=2)
    return []


def read_run(run: str) -> tuple[str, list[dict], list[dict]]:
    """Name, rollouts and log of what was named on the command line."""
    from ..runs import read_rollouts

    name, _, path = run.rpartition("=") if not Path(run).exists() else ("", "", run)
    path = Path(path)
    if not path.exists():
        raise SystemExit(f"There is no run at {path}.")
    return name or path.stem or str(path), read_rollouts(path), read_log(path)


def main(arguments: list[str] | None = None):
    parser = ArgumentParser("trl-rlad view", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder, or NAME=FOLDER")
    parser.add_argument("--output", type=Path, default=Path("outputs", "view.html"), help="where the page goes")
    parser.add_argument("--step", type=int, help="show only the rollouts of this step")
    parser.add_argument("--tokens", type=int, default=20_000, help="show groups until they have this many tokens")
    args = parser.parse_args(arguments)
    if args.tokens < 1:
        parser.error(f"--tokens must be at least 1, but is {args.tokens}")
    from ..reports.view import render

    runs = [read_run(run) for run in args.runs]
    if args.step is not None:
        runs = [(name, [each for each in rollouts if each["step"] == args.step], log) for name, rollouts, log in runs]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(render(runs, args.tokens), encoding="utf-8")
    print(f"Wrote {args.output}")
