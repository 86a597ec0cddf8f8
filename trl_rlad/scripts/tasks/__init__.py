"""The tasks of the example scripts, by name."""

from .chains import load_chains
from .mathematics import load_math
from .mini import load_mini
from .reasoning import load_reasoning
from .task import Task


def load_task(
    name: str,
    train_size: int,
    eval_size: int = 0,
    seed: int = 0,
    task_kwargs: dict | None = None,
    tokenizer: str | None = None,
) -> Task:
    """
    Loads a task.

    The same seed gives the same held-out set whatever the `train_size`.

    Args:
        name (`str`):
            `"chains"`, `"mini"`, `"math"` or the name of a task of reasoning-gym, such as `"knights_knaves"`.
        train_size (`int`):
            Number of training puzzles.
        eval_size (`int`, *optional*, defaults to `0`):
            Number of held-out puzzles.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the puzzles.
        task_kwargs (`dict`, *optional*):
            Settings of the task: see [`~mini.load_mini`], [`~mathematics.load_math`], [`~reasoning.load_reasoning`].
        tokenizer (`str`, *optional*):
            Name or path of the tokenizer that measures the prompts of `"math"`.
    """
    if name == "chains":
        return load_chains(train_size, eval_size, seed, task_kwargs)
    if name == "mini":
        return load_mini(train_size, eval_size, seed, task_kwargs)
    if name == "math":
        return load_math(train_size, eval_size, seed, tokenizer, **task_kwargs or {})
    return load_reasoning(name, train_size, eval_size, seed, task_kwargs)
