"""The command `trl-rlad`, and what it finds its sub-commands by."""

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path


COMMANDS = {
    "train": "train a student while a teacher guides it, on any dataset; without arguments, in miniature",
    "distil": "the offline baseline: imitate a teacher's right answers",
    "evaluate": "measure a model on held-out puzzles",
    "probe": "see whether a teacher is worth it for a student and a task, before training",
    "view": "look at the rollouts and the curves of runs, in one HTML file",
    "compare": "compare the scores of a teacher behind a URL with those of a copy at hand",
    "env": "print the versions to paste into an issue",
}


# What `--help` prints of the commands whose flags are mostly TRL's, as to import that takes seconds: each script's
# `make_parser().format_help()`, to which a test holds it
HELP = Path(__file__).parent / "scripts" / "help"


def main(arguments: list[str] | None = None):
    """Run a sub-command, which is imported only now: each is a module of `trl_rlad.commands` with a
    `main(arguments)`."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        stored = HELP / f"{name}.txt"
        if stored.exists() and {"-h", "--help"} & {*rest}:
            print(stored.read_text(), end="")
            sys.exit(0)
        return import_module(f"trl_rlad.commands.{name}").main(rest)
    if name == "--version":
        print(f"trl-rlad {version('trl-rlad')}")
        return
    print("usage: trl-rlad COMMAND ...\n")
    print("\n".join(f"  {command:<9} {purpose}" for command, purpose in COMMANDS.items()))
    print("\n`trl-rlad COMMAND --help` tells more, and `trl-rlad --version` the version.")
    if name not in ("--help", "-h"):
        sys.exit(f"There is no command {name!r}.")
