"""What the scripts ask of their arguments."""

import json
import os
import re
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import TrainingArguments
from trl import ModelConfig, TrlParser

from ..checkpoints import last_checkpoint
from ..config import did_you_mean


MINI = Path(__file__).parent / "mini"
METHODS = Path(__file__).parent / "methods"
MINIATURES = {  # the tasks in miniature: the folders of student and teacher, and the length of an answer
    "chains": (MINI / "chains_gpt_half", MINI / "chains_gpt_strong", 9),
    "mini": (MINI / "student", MINI / "teacher", 33),
}
METHOD_NAMES = sorted(path.stem for path in METHODS.glob("*.yaml"))


# What tells that another job is meant than that which runs without arguments
SOURCES = {"task", "dataset_name", "datasets", "model_name_or_path", "help", "h", "help_all"}


def read_method(name: str) -> dict:
    """The settings of a file in `methods/`; `distil-then-grpo` is `distil_then_grpo.yaml`."""
    name = name.replace("-", "_")
    if name not in METHOD_NAMES:
        raise ValueError(f"`--method {name}` is none of {', '.join(METHOD_NAMES)}.")
    return yaml.safe_load((METHODS / f"{name}.yaml").read_text())


class _BriefFormatter(ArgumentDefaultsHelpFormatter):
    """One spelling of each flag, the first sentence of its help, and its default, or what stands for `None`."""

    def _format_action_invocation(self, action):
        value = "" if action.nargs == 0 else f" {self._format_args(action, 'VALUE')}"
        return action.option_strings[0] + value

    def _get_help_string(self, action):
        text, *others = re.split(r"(?<=[\w`)]\.) (?=[A-Z`\"])", (action.help or "").replace("%", "%%"))
        taken = [each.removeprefix("`None` takes ").rstrip(".") for each in others if each.startswith("`None` takes ")]
        default = "%(default)s" if action.default is not None else next(iter(taken), None)
        return text if default is None else f"{text} (default: {default})"


class _HelpAll(Action):
    def __call__(self, parser, *args):
        print(super(Parser, parser).format_help())
        parser.exit()


class Parser(TrlParser):
    """
    TRL's parser, whose help is short: groups of arguments, and all the others by `--help-all`.

    Args:
        prog (`str`):
            Name of the command.
        description (`str`):
            What it does, with examples.
        dataclass_types (`tuple`):
            As in [`~trl.TrlParser`].
        groups (`dict[str, list[str]]`):
            The arguments that the short help has, by the titles of their groups.
    """

    def __init__(self, prog: str, description: str, dataclass_types: Any, groups: dict[str, list[str]]):
        usage = f"{prog} [--config FILE.yaml] [--FLAG VALUE ...]"
        super().__init__(dataclass_types, prog=prog, usage=usage)
        self.about, self.groups = description.strip(), groups
        self.add_argument("--help-all", action=_HelpAll, nargs=0, default=SUPPRESS, dest=SUPPRESS, help=SUPPRESS)

    def format_help(self) -> str:
        by_name = {action.dest: action for action in reversed(self._actions) if action.dest not in ("help", SUPPRESS)}
        formatter = _BriefFormatter(self.prog, max_help_position=34, width=100)  # wherever it is asked for
        parts = [self.format_usage(), self.about, ""]
        for title, names in self.groups.items():
            formatter.start_section(title)
            formatter.add_arguments([by_name[name] for name in names])
            formatter.end_section()
        others = len(by_name) - len({name for names in self.groups.values() for name in names})
        parts += [formatter.format_help()]
        parts += [f"`{self.prog} --help-all` has the {others} others, which are TRL's.\n"] if others else []
        return "\n".join(parts)


def own_fields(config_class: type, *others: type) -> list[str]:
    """The names of a dataclass's fields that these others don't have."""
    known = {each.name for other in others for each in fields(other)}
    return [each.name for each in fields(config_class) if each.name not in known]


def read_config(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of the file that `--config` names, and the other arguments."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    named, others = first.parse_known_args(arguments)
    if named.config is None:
        return {}, others
    config = yaml.safe_load(named.config.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"`--config {named.config}` must be settings with their names, but is {config!r}.")
    return config, others


def parse_arguments(
    parser: TrlParser, base: Path | None, arguments: list[str] | None = None, ignore_unknown: bool = False
) -> tuple:
    """
    Parses the command line and the file that its `--config` names.

    Where neither names a task, a dataset or a model, as no file in `methods/` does, both override the file `base`. A
    `--method` on the command line overrides the file; one in the file is overridden by the file's other settings.
    Without an accelerator `bf16` isn't the default that it is in TRL, which refuses it there.

    Args:
        parser ([`~trl.TrlParser`]):
            The parser.
        base (`Path` or `None`):
            Settings of the job that runs without arguments.
        arguments (`list[str]`, *optional*):
            The command line. `None` takes that of the process.
        ignore_unknown (`bool`, *optional*, defaults to `False`):
            Whether the file may have settings of the launcher too.
    """
    config, arguments = read_config(sys.argv[1:] if arguments is None else arguments)
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method")
    method = first.parse_known_args(arguments)[0].method
    flags = {argument.split("=")[0].replace("-", "_").lstrip("_") for argument in arguments}
    settings: dict[str, Any] = {}
    if base is not None and not (flags | config.keys()) & SOURCES:
        settings = yaml.safe_load(base.read_text())
    if "method" in config:
        settings |= read_method(config["method"])
    settings |= config
    if method is not None:
        settings |= read_method(method)
    for name, value in settings.pop("env", {}).items():
        os.environ[name] = str(value)
    if not torch.accelerator.is_available():
        parser.set_defaults_with_config(bf16=False)
    in_file = parser.set_defaults_with_config(**settings)
    *parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    for word in unknown + ([] if ignore_unknown else in_file):
        raise ValueError(f"There is no {word}.{did_you_mean(word, parser._option_string_actions)}")
    return tuple(parsed)


class Several(Action):
    """Values that may be given again and again. The command line's replace those of a file."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if given is self.default else given), *values])


def parse_teachers(values: Any) -> Any:
    """One teacher by its name or path, or several by the names that rows have in the column `teacher_id`: those of a
    JSON object, or else their own."""
    if isinstance(values, str):
        values = [values]
    if not values or isinstance(values, dict):
        return values or None
    if values[0].startswith("{"):
        return parse_json("teacher_model_name_or_path", " ".join(values), '{"math": "Qwen/Qwen3-8B"}')
    return values[0] if len(values) == 1 else {value: value for value in values}


def require(args, least: int, *names: str):
    """Raises a `ValueError` if one of these arguments is given and less than `least`."""
    for name in names:
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"`--{name}` must be at least {least}, but is {value}.")


def parse_json(name: str, value: dict | str | None, example: str) -> dict:
    """Settings with names, from JSON or, as they are, from YAML."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"`--{name}` must be JSON, but is {value!r}: {error}.") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"`--{name}` must be settings with names, as in '{example}', not {parsed!r}.")
    return parsed


def parse_task_kwargs(task_kwargs: dict | str | None) -> dict:
    """The settings of a task."""
    return parse_json("task_kwargs", task_kwargs, '{"n_people": [3, 4]}')


def get_init_kwargs(args: Any, model_args: ModelConfig) -> dict:
    """The `model_init_kwargs` of a training configuration, with what a `ModelConfig` says of the student."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }


def find_checkpoint(args: TrainingArguments) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` names, by its path or as `true`, the last one in the output folder.

    Raises a `ValueError` if there is none, or if there are some and training was not to go on from them.
    """
    last = last_checkpoint(str(args.output_dir))
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


def how_to_go_on(output_dir: str) -> str:
    """What to say of a run that was interrupted."""
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        return "Interrupted. Nothing was saved: `--save_steps` says how often a checkpoint is."
    return f"Interrupted. The same command goes on from {checkpoint} with `--resume_from_checkpoint true`."


def run_command(prepare: Callable, run: Callable, arguments: list[str] | None) -> NoReturn:
    """Run a script as a command: what is refused is one line instead of a traceback. Exits with 0; 1 after an error; 2
    if refused; 130 after Ctrl-C."""
    try:
        prepared = prepare(arguments)
    except ValueError as error:
        print(f"Refused: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    run(*prepared)
    raise SystemExit(0)
