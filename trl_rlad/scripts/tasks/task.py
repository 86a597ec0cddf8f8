"""What the example scripts train and measure on."""

from collections.abc import Callable
from typing import NamedTuple

from datasets import Dataset


class Task(NamedTuple):
    """
    Puzzles, and what tells right answers from wrong ones.

    Attributes:
        train_dataset (`Dataset`):
            Puzzles to train on, with the columns `prompt`, `difficulty` (may be empty) and those that the reward
            reads.
        eval_dataset (`Dataset`):
            Held-out puzzles, with the same columns.
        reward (`Callable`):
            Reward function in TRL's form, which returns `None` where it can't tell.
        best (`float`, *optional*, defaults to `1.0`):
            Reward of a right answer.
    """

    train_dataset: Dataset
    eval_dataset: Dataset
    reward: Callable[..., list[float | None]]
    best: float = 1.0

    def is_right(self, reward: float | None) -> bool | None:
        """Whether a reward is that of a right answer; `None` stays what it is."""
        return None if reward is None else reward == self.best

    def accuracy(self, **columns) -> list[float | None]:
        """A second reward function: 1 for a right answer and 0 for any other."""
        return [None if reward is None else float(self.is_right(reward)) for reward in self.reward(**columns)]
