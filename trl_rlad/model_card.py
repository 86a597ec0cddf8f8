"""The model card of a student."""

import os
import re
import shlex
import sys
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, get_token
from transformers import TrainerState

from ._trl.names import run_links
from .config import RLADConfig
from .objective.schedule import Objective


TEMPLATE = Path(__file__).with_name("model_card.md")
SECRET = "(?i:token|secret|passw(?:or)?d|api[-_]?key|access[-_]?key|credentials?)"  # in the name of one
PACKAGES = "trl-rlad trl transformers accelerate torch datasets tokenizers peft deepspeed vllm".split()
OBJECTIVE = [each.name for each in fields(Objective) if each.name != "teacher_kl_coef_final"] + ["success_reward"]
SCHEDULE = (
    "learning_rate lr_scheduler_type warmup_steps num_generations max_completion_length temperature loss_type epsilon "
    "epsilon_high beta seed"
).split()


def write_model_card(
    args: RLADConfig,
    state: TrainerState,
    num_processes: int,
    teachers: dict[str, dict[str, Any]],
    dataset_name: str | None,
    hub_model_id: str | None,
    paper: dict[str, str],
):
    """Write the card of a student in the place of TRL's, a `README.md` in `args.output_dir`, of which only the
    metadata is kept. `teachers` are described as by [`~trl_rlad.checkpoints.describe_teacher`]. Where there is
    matplotlib, training is drawn."""
    log_history, path = state.log_history, Path(str(args.output_dir), "README.md")
    data = ModelCard.load(path).data
    values = args.to_dict()
    if args.teacher_kl_coef_final is not None:
        values["teacher_kl_coef"] = f"{args.teacher_kl_coef} to {args.teacher_kl_coef_final}"
    settings = {
        "Teacher": ", ".join(name_teacher(each, args.teacher_model_revision) for each in teachers.values()) or "none",
        "Dataset": plain(dataset_name or "not named"),
        **{f"`{name}`": plain(values[name]) for name in OBJECTIVE},
        "Steps": state.global_step,
        "Completions in a step": args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes,
        **{f"`{name}`": plain(values[name]) for name in SCHEDULE},
    }
    command = launch_command(sys.argv, {args.hub_token, get_token(), *chain(*args.teacher_servers.values())})
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=plain(data.model_name or path.parent.name),
        base_model=data.base_model and link(data.base_model),
        hub_model_id=hub_model_id,
        paper=paper,
        evaluations=[[plain(cell) for cell in row] for row in tabulate(log_history)],
        picture=draw(log_history, path.with_name("training.png")),
        links=run_links(),
        command=command,
        fence="`" * max([3, *(len(run) + 1 for run in re.findall("`+", command or ""))]),  # which nothing in it ends
        num_processes=num_processes,
        settings=settings,
        versions=", ".join(f"{name} {found}" for name in PACKAGES if (found := find_version(name))),
    )
    card.save(path)


def name_teacher(teacher: dict[str, Any], revision: str | None) -> str:
    """A teacher's name, and the commit or at least the revision of its weights."""
    name, commit = teacher["name"], teacher.get("commit")
    if commit:
        return f"{link(name, f'/tree/{commit}')} at `{commit[:7]}`"
    return f"{plain(name)} at {plain(revision)}" if revision else plain(name)


def link(name: str, place: str = "") -> str:
    """A link to a model on the Hub."""
    return f"[{plain(name)}](https://huggingface.co/{quote(name)}{place})"


def tabulate(log_history: list[dict[str, Any]]) -> list[list[str]]:
    """The first and the last evaluation on each dataset, as the rows of a table, its heading first; or nothing."""
    logs: dict[str, list[dict[str, Any]]] = {}
    for log in log_history:
        for name in (re.fullmatch("eval_(?:(.+)_)?runtime", key) for key in log):
            if name:
                logs.setdefault(name[1] or "", []).append(log)
    metrics = {
        key: None for log in log_history for key in log if re.fullmatch(r"eval_rewards/.*/(mean|pass@\d+)", key)
    }
    if not metrics:
        return []
    rows = [["", "step", *(key.removeprefix("eval_rewards/") for key in metrics)]]
    for name, evaluations in logs.items():
        for log in evaluations[:1] + evaluations[1:][-1:]:
            values = [log.get(key) for key in metrics]
            rows.append([name, str(log["step"]), *("" if value is None else f"{value:.3f}" for value in values)])
    return rows


def draw(log_history: list[dict[str, Any]], path: Path) -> str | None:
    """Draw the reward, and what the teacher has to say, over the steps. Returns the picture's name, if there is
    one."""
    names = ("reward", "teacher/log_ratio", "teacher/kl")
    curves = {name: [(log["step"], log[name]) for log in log_history if log.get(name) is not None] for name in names}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not curves:
        return None
    figure = Figure(figsize=(6, 2 * len(curves)), layout="tight")
    for axes, (name, points) in zip(
        figure.subplots(len(curves), sharex=True, squeeze=False).flat, curves.items(), strict=True
    ):
        axes.plot(*zip(*points, strict=True))
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(path, dpi=120)
    return path.name


def launch_command(arguments: list[str], secrets: set[str | None]) -> str | None:
    """A command line without secrets, addresses of servers and local folders. `None` where there is no script."""
    path = Path(arguments[0])
    if path.parts[-2:] == ("scripts", "train.py"):  # that `trl-rlad train` has launched
        arguments = ["trl-rlad", "train", *arguments[1:]]
    elif path.suffix != ".py" and path.name != "trl-rlad":  # a notebook, or `python -c`
        return None
    in_environment = {value for name, value in os.environ.items() if re.search(SECRET, name) and len(value) >= 8}
    words, hidden = [], "_HIDDEN_"  # which needs no quotes
    for before, word in zip(["", *arguments], arguments, strict=False):  # each before it is quoted, and so changed
        for secret in sorted(filter(None, {*secrets, *in_environment}), key=len, reverse=True):
            word = word.replace(secret, hidden)  # the longest first, as one may begin with another
        if re.fullmatch(rf"-+\S*{SECRET}", before):
            word = hidden
        word = re.sub(rf"""({SECRET}["']?\s*[=:]\s*["']?)[^"',}}]+""", rf"\1{hidden}", word)
        word = re.sub(r"\bhf_\w{8,}|(?<=://)[^/@\s]+(?=@)", hidden, word)
        words.append(re.sub(r"""(?<![\w.~/])/(?:[^/"',]+/)+""", "", word))
    return shlex.join(words).replace(hidden, "***")


def plain(value: Any) -> str:
    """A value in one line that Markdown takes for text alone: not for the end of a cell, a link or HTML."""
    return re.sub(r"[^\w .,:/+@=()-]", lambda match: f"&#{ord(match[0])};", " ".join(str(value).split()))


def find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
