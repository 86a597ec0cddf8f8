r"""
Measure a model on held-out puzzles: Mean@n, the mean accuracy of n samples per puzzle, and Pass@k, the probability
that at least one of k samples is right.

Without arguments: the student in miniature, before training.

    trl-rlad evaluate
    trl-rlad evaluate --model_name_or_path outputs/chains-rlad --output outputs/chains-rlad/evaluation.json

Any of reasoning-gym's tasks. With the seed, the `eval_size` and the `task_kwargs` of a training run these are the
puzzles that it held out:

    trl-rlad evaluate --task knights_knaves --task_kwargs '{"n_people": [3, 4, 5, 6]}' \
        --model_name_or_path outputs/qwen3-0.6b-rlad --backend vllm --num_samples 32 --k 1 8 32

For mathematics take [lighteval](https://github.com/huggingface/lighteval), which has AIME and MATH-500 (written for
0.13):

    lighteval vllm "model_name=outputs/math,generation_parameters={max_new_tokens:8192,temperature:0.6,top_p:0.95}" \
        aime24_avg,aime25_avg,math_500
"""

import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from ..config import with_help
from ..trainer import check_writable
from .arguments import MINIATURES, Parser, own_fields, parse_arguments, parse_task_kwargs, require
from .sampling import evaluate
from .tasks import Task, load_task


PACKAGES = {"torch", "transformers", "trl", "trl-rlad", "reasoning_gym", "vllm"}


@with_help
@dataclass
class EvaluationArguments:
    """
    Arguments of this script.

    Args:
        model_name_or_path (`str`, *optional*):
            Name or path of the model. `None` takes the student of a task in miniature.
        task (`str`, *optional*, defaults to `"chains"`):
            Task: `"chains"`, `"mini"`, `"math"`, or the name of one of reasoning-gym, as in `trl-rlad train`.
        task_kwargs (`str` or `dict`, *optional*):
            Settings of the task, as JSON.
        eval_size (`int`, *optional*, defaults to `384`):
            Number of held-out puzzles.
        num_samples (`int`, *optional*, defaults to `8`):
            Number of samples per puzzle.
        k (`list[int]`, *optional*):
            The k of Pass@k, each at most `num_samples`. `None` takes 1 and `num_samples`.
        temperature (`float`, *optional*, defaults to `0.6`):
            Temperature.
        top_p (`float`, *optional*, defaults to `0.95`):
            Probability mass of the tokens to draw from.
        max_completion_length (`int`, *optional*):
            Completions are cut at this length. `None` takes what a task in miniature needs, and 2,048 for any other.
        backend (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"` or `"vllm"`.
        batch_size (`int`, *optional*, defaults to `128`):
            Number of completions to draw at once. vLLM finds its own.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the puzzles and of the samples. The default is that of TRL's trainers.
        output (`str`, *optional*):
            JSON file for the figures, the settings and the versions.
    """

    model_name_or_path: str | None = None
    task: str = "chains"
    task_kwargs: dict | str | None = None
    eval_size: int = 384
    num_samples: int = 8
    k: list[int] | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    max_completion_length: int | None = None
    backend: str = "transformers"
    batch_size: int = 128
    seed: int = 42
    output: str | None = None

    def __post_init__(self):
        student, _, default_length = MINIATURES.get(self.task, (None, None, 2048))
        if student is not None:
            # Relative, as the path goes into the JSON file
            self.model_name_or_path = self.model_name_or_path or os.path.relpath(student)
        if self.model_name_or_path is None:
            raise ValueError(f"`--task {self.task}` needs a model: name it with `--model_name_or_path`.")
        require(self, 1, "eval_size", "num_samples", "max_completion_length", "batch_size")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"`--top_p` must be above 0 and at most 1, but is {self.top_p}.")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"`--temperature` must be a positive number, but is {self.temperature}.")
        if self.backend not in ("transformers", "vllm"):
            raise ValueError(f"`--backend` must be 'transformers' or 'vllm', but is {self.backend!r}.")
        self.max_completion_length = self.max_completion_length or default_length
        self.k = sorted(set(self.k or [1, self.num_samples]))


def make_parser() -> Parser:
    groups = {"arguments": own_fields(EvaluationArguments)}
    return Parser("trl-rlad evaluate", __doc__ or "", (EvaluationArguments,), groups)


def prepare(arguments: list[str] | None = None) -> tuple:
    """From the command line to the arguments of [`run`], with all checks."""
    (args,) = parse_arguments(make_parser(), None, arguments)
    if args.output is not None:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        check_writable(str(Path(args.output).parent))
    # One training puzzle, as none is needed
    task_kwargs = parse_task_kwargs(args.task_kwargs)
    task = load_task(args.task, 1, args.eval_size, args.seed, task_kwargs, tokenizer=args.model_name_or_path)
    return args, task


def run(args: Any, task: Task):
    """Measure, print and write down."""
    scores = evaluate(
        args.model_name_or_path,
        task,
        num_samples=args.num_samples,
        k=args.k,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_completion_length,
        batch_size=args.batch_size,
        seed=args.seed,
        backend=args.backend,
    )
    metrics = [name for name in scores["overall"] if "@" in name]
    print(f"{'difficulty':>10}{'puzzles':>9}" + "".join(f"{name.title():>10}" for name in metrics))
    for name, row in scores.items():
        print(f"{name:>10}{row['puzzles']:>9}" + "".join(f"{row[metric]:>10.1%}" for metric in metrics))
    if args.output is not None:
        versions = {package.name: package.version for package in distributions() if package.name in PACKAGES}
        result = {"settings": asdict(args), "versions": versions, "scores": scores}
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


def main(arguments: list[str] | None = None):
    """Evaluate in this process."""
    run(*prepare(arguments))
