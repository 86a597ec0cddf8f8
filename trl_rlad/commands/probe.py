"""
See whether a teacher is worth it for a student and a task, before training.

    trl-rlad probe --sample_teacher train
    trl-rlad probe --prompts 64 --output probe.json train --config FILE.yaml --alpha 0.5
    trl-rlad probe my_script.py

It runs `trl-rlad train` or a training script of yours, with the arguments that you would train with, up to where its
first trainer would train; an evaluation before that is skipped. There it samples `num_generations` completions of some
training prompts, has them rewarded and read by the teacher, reports what came out, and ends. Nothing is trained, and
nothing of the run's is written or pushed: the script ends there, and its output folder is a temporary one. The first
three lines of the report say what to do, how sure that is, and what to paste.
"""

from argparse import REMAINDER, ArgumentParser
from pathlib import Path
from shlex import join

from . import HelpFormatter


def main(arguments: list[str] | None = None):
    parser = ArgumentParser("trl-rlad probe", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="number of training prompts")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs", "probe.json"),
        help="figures, with .html, .png and .parquet beside them",
    )
    parser.add_argument("--sample_teacher", action="store_true", help="have the teacher answer the prompts, too")
    parser.add_argument("script", help="`train`, or a training script of yours")
    parser.add_argument("arguments", nargs=REMAINDER, help="its arguments")
    args = parser.parse_args(arguments)
    check(parser, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    from .probe_job import run

    run(args)


def check(parser: ArgumentParser, args):
    """Refuses what the command itself can't do; takes the `--` off the script's arguments."""
    own = parser._option_string_actions.keys() - {"-h", "--help"}
    misplaced = [word for word in args.arguments if word.split("=")[0] in own]
    if args.arguments[:1] == ["--"]:
        args.arguments = args.arguments[1:]
    elif misplaced:
        parser.error(
            f"{misplaced[0]} is the probe's own, and belongs before the script: trl-rlad probe {misplaced[0]} ... "
            f"{args.script}. If {args.script} has one of that name: trl-rlad probe {args.script} -- "
            f"{join(args.arguments)}"
        )
    if args.prompts < 1:
        parser.error(f"--prompts must be at least 1, but is {args.prompts}")
    if args.script != "train" and not Path(args.script).is_file():
        parser.error(f"there is no script {args.script}")
    if args.output.is_dir() or args.output.suffix in (".html", ".png", ".parquet"):
        parser.error(f"--output must be a file for JSON, but is {args.output}")
