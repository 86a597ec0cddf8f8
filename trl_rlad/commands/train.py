"""
`trl-rlad train`: in this process or, where there are several GPUs or flags of `accelerate launch`, by that.

As in `trl grpo`, flags and settings that the script doesn't know are the launcher's.
"""

import sys
from argparse import ArgumentParser
from importlib.resources import files
from pathlib import Path

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..config import did_you_mean
from ..scripts import train
from ..scripts.arguments import Parser, how_to_go_on, read_config, run_command


CONFIGS = (Path(train.__file__).parent / "accelerate_configs", files("trl.accelerate_configs"))


def split(parser: Parser, arguments: list[str]) -> tuple[list[str], list[str]]:
    """
    The launcher's arguments, those in the file of `--config` included, and the script's.

    Exits with 2 and a suggestion if a flag is neither's.
    """
    config, others = read_config(arguments)
    in_file = parser.set_defaults_with_config(**{name: value for name, value in config.items() if name != "env"})
    _, on_command_line = parser.parse_known_args(others)
    rest = list(on_command_line)
    of_script = [word for word in arguments if not (rest and word == rest[0] and rest.pop(0))]
    ours, launch = ArgumentParser(add_help=False, allow_abbrev=False), launch_command_parser()
    ours.add_argument("--accelerate_config")
    named, of_launcher = ours.parse_known_args(in_file + on_command_line)
    for word in of_launcher:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in launch._option_string_actions:
            known = [*parser._option_string_actions, *launch._option_string_actions]
            parser.error(f"there is no {flag}.{did_you_mean(flag, known)}")
    if named.accelerate_config is not None:
        of_launcher = ["--config_file", find_config(named.accelerate_config), *of_launcher]
    return of_launcher, of_script


def find_config(name: str) -> str:
    """The path of a configuration of accelerate: a file, or by its name one of ours or of TRL's."""
    paths = [Path(name), *(Path(str(folder.joinpath(f"{name}.yaml"))) for folder in CONFIGS)]
    for path in paths:
        if path.is_file():
            return str(path)
    known = sorted({path.stem for path in CONFIGS[0].glob("*.yaml")})
    raise ValueError(f"`--accelerate_config {name}` is neither a file nor one of {', '.join(known)}.")


def main(arguments: list[str]):
    parser = train.make_parser()
    try:
        of_launcher, of_script = split(parser, arguments)
    except (ValueError, OSError) as error:
        print(f"Refused: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    num_gpus = torch.accelerator.device_count()
    has_config = "--config_file" in of_launcher or Path(default_config_file).is_file()
    if not of_launcher and not has_config and num_gpus <= 1:
        run_command(lambda arguments: train.prepare(arguments, is_launched=True), train.run, of_script)
    if not has_config:  # what accelerate would choose, and warn that it did
        defaults = f"--num_processes {max(num_gpus, 1)} --num_machines 1 --mixed_precision no --dynamo_backend no"
        of_launcher = defaults.split() + (of_launcher or ["--multi_gpu"])
    launch = [*of_launcher, "--quiet", "--module", train.__name__, *of_script]
    args = launch_command_parser().parse_args(launch)
    if not has_config and num_gpus == 0 and args.num_processes > 1:  # accelerate would start one
        parser.error(f"{args.num_processes} processes without GPUs need a configuration: --accelerate_config zero3")
    try:
        launch_command(args)
    except ChildFailedError as error:  # the processes have said why
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, SignalException):
        defaults = parser.parse_known_args(of_script)[0]
        print(f"\n{how_to_go_on(defaults.output_dir or 'trainer_output')}")
        raise SystemExit(130) from None
