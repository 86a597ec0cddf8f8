"""Where prompts and rewards come from: a task of ours, or any dataset with reward functions, as in `trl grpo`."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import DatasetMixtureConfig, get_dataset
from trl.rewards import (
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

from .._trl.names import is_async_callable
from .tasks import Task, load_task


# As in `trl.scripts.grpo`, where they are within a function
REWARD_FUNCS: dict[str, Callable] = {
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256),
}


class Source(NamedTuple):
    """
    Prompts, and what rewards the completions.

    Attributes:
        train_dataset (`Dataset`):
            What is trained on.
        eval_dataset (`Dataset` or `None`):
            What is measured before and after training.
        reward_funcs (`list`):
            Reward functions and reward models, in TRL's form.
        task (`Task`, *optional*):
            The same with one reward that is 1 for a right completion, by which a teacher's answers are judged. `None`
            if that takes more than calling functions.
        measured (`list[str]`, *optional*):
            The names of the reward functions that an evaluation reports. `None`: of all.
    """

    train_dataset: Any
    eval_dataset: Any
    reward_funcs: list
    task: Task | None
    measured: list[str] | None = None


def load_source(script_args, args, dataset_args: DatasetMixtureConfig, tokenizer: str | None) -> Source:
    """
    Load what a run trains on.

    Args:
        script_args ([`~train.ScriptArguments`]):
            Task or dataset, and reward functions.
        args ([`RLADConfig`]):
            Settings of training.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            Mixture of datasets.
        tokenizer (`str` or `None`):
            Name or path of the tokenizer that measures prompts and a teacher's answers.
    """
    if script_args.task is not None:
        sizes = script_args.train_size, script_args.eval_size
        task = load_task(script_args.task, *sizes, args.seed, script_args.task_kwargs, tokenizer=tokenizer)
        rewards = [task.reward, task.accuracy]  # the accuracy is only logged
        return Source(task.train_dataset, task.eval_dataset, rewards, task, ["accuracy"])
    reward_funcs = load_reward_funcs(script_args.reward_model_name_or_path, script_args.reward_funcs)
    if not reward_funcs and args.distillation_fraction < 1.0:
        raise ValueError(
            "A dataset needs rewards: name `--reward_funcs`, such as accuracy_reward, or a "
            "`--reward_model_name_or_path`. Only `--distillation_fraction 1.0` needs none."
        )
    splits = get_dataset(dataset_args) if dataset_args.datasets else load_splits(script_args)
    train = take_split(splits, script_args.dataset_train_split, "dataset_train_split")
    held_out = None
    if args.eval_strategy != "no":
        held_out = take_split(splits, script_args.dataset_test_split, "dataset_test_split")
    task = None
    can_judge = bool(reward_funcs) and all(callable(f) and not is_async_callable(f) for f in reward_funcs)
    if isinstance(train, Dataset) and can_judge:
        reward = judge(reward_funcs, args.reward_weights, args.success_reward, tokenizer)
        task = Task(train, held_out, reward)
    return Source(train, held_out, reward_funcs, task)


def load_reward_funcs(model: str | None, names: list[str] | None) -> list:
    """Reward model and reward functions, these by their names in TRL or by dotted path, as in `trl grpo`."""
    found: list = [model] if model else []
    for name in names or []:
        if name in REWARD_FUNCS:
            found.append(REWARD_FUNCS[name])
            continue
        module, _, attribute = name.rpartition(".")
        if not module:
            raise ValueError(
                f"`--reward_funcs {name}` is none of {', '.join(REWARD_FUNCS)}, nor a dotted path such as "
                "my_rewards.right, of a file my_rewards.py in this folder."
            )
        sys.path.insert(0, os.getcwd())
        try:
            found.append(getattr(import_module(module), attribute))
        except (ModuleNotFoundError, AttributeError) as error:
            raise ValueError(f"`--reward_funcs {name}`: {error}.") from error
        finally:
            sys.path.remove(os.getcwd())
    return found


def load_splits(script_args):
    """The splits of a dataset by its name on the Hub, or its folder or file."""
    path, settings = Path(script_args.dataset_name), {"streaming": script_args.dataset_streaming}
    if path.is_file():
        return load_dataset(str(path.absolute().parent), data_files=path.name, **settings)
    return load_dataset(script_args.dataset_name, name=script_args.dataset_config, **settings)


def take_split(splits, name: str, setting: str):
    """One split of a dataset. Raises a `ValueError` that names the others if there is none."""
    if name not in splits:
        raise ValueError(f"`--{setting} {name}`: the dataset has no such split, but {', '.join(splits)}.")
    return splits[name]


def judge(reward_funcs: list, weights: list[float] | None, success_reward: float, tokenizer: str | None) -> Callable:
    """A reward function that is 1 where the weighted sum of some reward functions is a success, else 0, and `None`
    where none of them can tell."""
    weights = weights or [1.0] * len(reward_funcs)

    def reward(completions, **columns) -> list[float | None]:
        texts = [c if isinstance(c, str) else "".join(m["content"] for m in c) for c in completions]
        ids = AutoTokenizer.from_pretrained(tokenizer)(texts, add_special_tokens=False)["input_ids"]
        scores = [f(completions=completions, completion_ids=ids, **columns) for f in reward_funcs]
        totals: list[float | None] = []
        for row in zip(*scores, strict=True):
            told = [weight * score for weight, score in zip(weights, row, strict=True) if score is not None]
            totals.append(float(sum(told) > success_reward) if told else None)
        return totals

    return reward
