"""The job of `trl-rlad probe`: bring a script to its training, probe there, and write what came out."""

import json
import sys
from argparse import ArgumentParser
from shlex import join

import pyarrow as pa
import pyarrow.parquet as pq

from .._trl.names import get_config_model_id
from ..reports.advice import OFFLINE, recommend, settings_to_paste
from ..reports.probe import Estimate, report
from ..reports.probe_output import decide, print_report, render_page, write_picture
from ..reports.probe_run import Probe, check_trainer, describe, run_until_training
from ..scripts import train
from ..scripts.arguments import read_config


def run(args):
    """Run the command, with its arguments parsed and checked."""
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
    advice["then"] += f"; the student is outputs/offline\n{settings}" if is_offline else ""
    print_report(figures, stdout)
    write_picture(probe.rollouts, figures, args.output.with_suffix(".png"))
    pq.write_table(pa.Table.from_pylist(probe.rollouts), args.output.with_suffix(".parquet"))
    page = args.output.with_suffix(".html")
    page.write_text(render_page(figures, args.output.with_suffix(".png"), probe.rollouts), encoding="utf-8")
    args.output.write_text(json.dumps({name: _plain(value) for name, value in figures.items()}, indent=2) + "\n")
    # The report is longer than a screen, of which this is the end
    print("", *decide(figures)[::2], sep="\n", file=stdout)
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
