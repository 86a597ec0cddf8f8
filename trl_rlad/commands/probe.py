"""
See whether a teacher is worth it for a student and a task, before training.

    trl-rlad probe train
    trl-rlad probe --prompts 64 --output probe.json train --config FILE.yaml --alpha 0.5
    trl-rlad probe my_script.py

It runs `trl-rlad train` or a training script of yours, with the arguments that you would train with, up to where its
RLADTrainer would train; an evaluation before that is skipped. There it samples `num_generations` completions of some
training prompts, has them rewarded and read by the teacher, reports what came out, and ends. Nothing is trained. What
each figure means is in the docstring of `trl_rlad.reports.probe.report`.
"""

import json
from argparse import REMAINDER, ArgumentParser
from pathlib import Path

from . import HelpFormatter


def main(arguments: list[str] | None = None):
    parser = ArgumentParser("trl-rlad probe", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="number of training prompts")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs", "probe.json"), help="report, with .png and .parquet beside it"
    )
    parser.add_argument("--sample_teacher", action="store_true", help="have the teacher answer the prompts, too")
    parser.add_argument("script", help="`train`, or a training script of yours")
    parser.add_argument("arguments", nargs=REMAINDER, help="its arguments")
    args = parser.parse_args(arguments)
    if args.prompts < 1:
        parser.error(f"--prompts must be at least 1, but is {args.prompts}")
    if args.script != "train" and not Path(args.script).is_file():
        parser.error(f"there is no script {args.script}")
    if args.output.is_dir() or args.output.suffix in (".png", ".parquet"):
        parser.error(f"--output must be a file for JSON, but is {args.output}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ..reports.probe import recommend, report
    from ..reports.probe_output import print_report, write_picture
    from ..reports.probe_run import Probe, describe, load_trainer
    from ..scripts import train

    try:
        trainer = load_trainer(args.script, args.arguments, train.main if args.script == "train" else None)
        probe = Probe(trainer)
        probe.run(args.prompts)
        answers = probe.sample_teacher(args.prompts) if args.sample_teacher else {}
    except ValueError as error:  # what the trainer refuses, with its remedy
        args.output.write_text(json.dumps({"refused": str(error)}, indent=2) + "\n")
        raise SystemExit(f"Refused: {error}") from error
    if not trainer.is_world_process_zero():
        return
    bounds = (trainer.args.teacher_log_ratio_clip, trainer.epsilon_low, trainer.epsilon_high)
    figures = report(probe.rollouts, trainer.args.success_reward, *bounds, trainer.eos_token_ids)
    figures |= describe(probe) | answers
    figures["advice"] = recommend(figures)
    print_report(figures)
    write_picture(probe.rollouts, figures, args.output.with_suffix(".png"))
    pq.write_table(pa.Table.from_pylist(probe.rollouts), args.output.with_suffix(".parquet"))
    text = json.dumps({name: _plain(value) for name, value in figures.items()}, indent=2)
    args.output.write_text(text + "\n")
    print(f"Wrote {args.output}, and beside it the picture and, for `trl-rlad view`, the rollouts")


def _plain(value):
    """A value for JSON, which has no NaN."""
    if hasattr(value, "_asdict"):  # an `Estimate`
        return {name: _plain(each) for name, each in value._asdict().items()}
    if isinstance(value, float):
        return None if value != value else round(value, 4)
    return value
