"""What the example scripts ask of their arguments."""

import json
import sys
from pathlib import Path

import torch
import yaml
from transformers import TrainingArguments
from trl import ModelConfig, TrlParser

from ..checkpoints import last_checkpoint


MINI = Path(__file__).parent / "mini"
METHODS = Path(__file__).parent / "methods"


def read_method(name: str) -> dict:
    """The settings of a file in `examples/methods/`."""
    return yaml.safe_load((METHODS / f"{name}.yaml").read_text())


def parse_arguments(parser: TrlParser, base: Path) -> tuple:
    """
    Parses the command line and the file that its `--config` names.

    Where neither names a task or a model, as no file in `examples/methods/` does, both override the file `base`.
    Without an accelerator `bf16` isn't the default that it is in TRL, which refuses it there.
    """
    arguments = sys.argv[1:]
    named = {argument.split("=")[0].replace("-", "_").lstrip("_") for argument in arguments}
    if "--config" in arguments[:-1]:
        named.update(yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text()) or ())
    if not torch.accelerator.is_available():
        parser.set_defaults_with_config(bf16=False)
    if not named & {"task", "model_name_or_path", "help", "h"}:
        parser.set_defaults_with_config(**yaml.safe_load(base.read_text()))
    return parser.parse_args_and_config(arguments)


def require(args, least: int, *names: str):
    """Raises a `ValueError` if one of these arguments is given and less than `least`."""
    for name in names:
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"`--{name}` must be at least {least}, but is {value}.")


def parse_task_kwargs(task_kwargs: dict | str | None) -> dict:
    """The settings of a task, from JSON or YAML."""
    try:
        parsed = json.loads(task_kwargs) if isinstance(task_kwargs, str) else task_kwargs or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"`--task_kwargs` must be JSON, but is {task_kwargs!r}: {error}.") from error
    if not isinstance(parsed, dict):
        raise ValueError(
            f"`--task_kwargs` must be settings with names, as in '{{\"n_people\": [3, 4]}}', not {parsed!r}."
        )
    return parsed


def get_init_kwargs(args: TrainingArguments, model_args: ModelConfig) -> dict:
    """The `model_init_kwargs` of a training configuration, with what a `ModelConfig` says of the student."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }


def find_checkpoint(args: TrainingArguments) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` names, by its path or as `true`, the last one in the output folder.

    Raises a `ValueError` if there is none, or if there are some and training was not to go on from them.
    """
    last = last_checkpoint(args.output_dir)
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        if last is not None:
            raise ValueError(
                f"`--output_dir {args.output_dir}` has the checkpoints of another run, which this one would replace. "
                "Go on from the last of them with `--resume_from_checkpoint true`, or choose another folder."
            )
        return None
    checkpoint = last if str(wanted).lower() == "true" else wanted
    if checkpoint is None or not Path(checkpoint).is_dir():
        where = args.output_dir if checkpoint is None else checkpoint
        raise ValueError(f"`--resume_from_checkpoint {wanted}`: there is no checkpoint in {where}.")
    return checkpoint
