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

import json
import sys
from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from shlex import join

import pyarrow as pa
import pyarrow.parquet as pq

from .._trl.names import get_config_model_id
from ..reports.advice import OFFLINE, recommend, settings_to_paste
from ..reports.probe import Estimate, report
from ..reports.probe_output import print_report, render_page, write_picture
from ..reports.probe_run import Probe, check_trainer, describe, run_until_training
from ..scripts import train
from ..scripts.arguments import read_config


def main(arguments: list[str] | None = None):
    parser = ArgumentParser("trl-rlad probe", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="number of training prompts (default: 32)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs", "probe.json"),
        help="figures, with .html, .png and .parquet beside them (default: outputs/probe.json)",
    )
    parser.add_argument("--sample_teacher", action="store_true", help="have the teacher answer the prompts, too")
    parser.add_argument("script", help="`train`, or a training script of yours")
    parser.add_argument("arguments", nargs=REMAINDER, help="its arguments")
    args = parser.parse_args(arguments)
    check(parser, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    stdout = sys.stdout

    def probe(trainer):
        try:
            make_report(trainer, args, stdout)
        except ValueError as error:
            refuse(error)

    def train_in(folder):
        train.main([*args.arguments, "--output_dir", folder, "--resume_from_checkpoint", "false"])

    def refuse(error):  # what the trainer refuses, with its remedy
        args.output.write_text(json.dumps({"refused": str(error)}, indent=2) + "\n")
        raise SystemExit(f"Refused: {error}") from error

    try:
        run_until_training(args.script, args.arguments, probe, train_in if args.script == "train" else None)
    except ValueError as error:
        refuse(error)


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


def make_report(trainer, args, stdout):
    """Probe a trainer, and write what came out."""
    check_trainer(trainer)
    probe = Probe(trainer)
    probe.run(args.prompts)
    answers = probe.sample_teacher(args.prompts) if args.sample_teacher else {}
    if not trainer.is_world_process_zero():
        return
    bounds = (trainer.args.teacher_log_ratio_clip, trainer.epsilon_low, trainer.epsilon_high)
    figures = report(probe.rollouts, trainer.args.success_reward, *bounds, trainer.eos_token_ids)
    figures |= describe(probe) | answers
    advice = figures["advice"] = recommend(figures)
    settings = settings_to_paste(advice, trainer.args, args.script, args.arguments)
    is_offline = advice["method"] == OFFLINE
    advice["paste"] = offline_command(trainer, args.script, args.arguments) if is_offline else settings
    advice["then"] += f"\n{settings}" if is_offline else ""
    print_report(figures, stdout)
    write_picture(probe.rollouts, figures, args.output.with_suffix(".png"))
    pq.write_table(pa.Table.from_pylist(probe.rollouts), args.output.with_suffix(".parquet"))
    page = args.output.with_suffix(".html")
    page.write_text(render_page(figures, args.output.with_suffix(".png"), probe.rollouts), encoding="utf-8")
    args.output.write_text(json.dumps({name: _plain(value) for name, value in figures.items()}, indent=2) + "\n")
    print(f"Wrote {page}, with the rollouts, and {args.output}, with the figures", file=stdout)


def offline_command(trainer, script: str, arguments: list[str]) -> str:
    """The command that has the student imitate the teacher's right answers: ours where the job is a task's."""
    config, others = read_config(arguments) if script == "train" else ({}, [])
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("task", "task_kwargs", "model_name_or_path", "teacher_model_name_or_path"):
        parser.add_argument(f"--{name}", default=config.get(name))
    given, rest = parser.parse_known_args(others)
    if script == "train" and not {"dataset_name", "datasets"} & (config.keys() | {word[2:] for word in rest}):
        named = {name: json.dumps(x) if isinstance(x, dict) else x for name, x in vars(given).items() if x is not None}
        words = [word for name, value in named.items() for word in (f"--{name}", value)]
        return join(["trl-rlad", "distil", *words, "--output_dir", "outputs/offline"])
    student = get_config_model_id(trainer.model.config)
    command = f"trl sft --model_name_or_path {student} --dataset_name ANSWERS --output_dir outputs/offline"
    return f"{command}  # ANSWERS: the teacher's right ones to your prompts, as prompt and completion"


def _plain(value):
    """A value for JSON, which has no NaN."""
    if isinstance(value, Estimate):
        return {name: _plain(each) for name, each in value._asdict().items()}
    if isinstance(value, float):
        return None if value != value else round(value, 4)
    return value
