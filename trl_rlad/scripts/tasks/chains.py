"""
Chains of operators: a task whose right answers a model of 100K parameters can learn step by step, in a minute.

Each of twenty operators is a fixed random permutation of the ten digits. A prompt is eight operators and a digit, and
a solution the digit after each of them. So every step of a solution is alike: it takes the token before it, and the
operator that stands eight places back.

    prompt    a f t b b c q o 3
    solution  8 0 1 9 4 4 2 7

There are 2.6e11 prompts, so drawn ones are new ones. A second form of each digit, in letters, lets a solution be
written in many ways: the prompt has figures only, and the reward takes either.
"""

import json
import random
from string import ascii_lowercase

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from .mini import EOS, PAD, make_word_tokenizer
from .task import Task


LENGTH = 8  # operators in a prompt
MAX_COMPLETION_LENGTH = LENGTH + 1
DIGITS = "0123456789"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VALUES = {word: value for words in (DIGITS, WORDS) for value, word in enumerate(words)}


def make_operators(names: str, seed: int) -> dict[str, list[int]]:
    """Draw a permutation of the digits for each name."""
    rng = random.Random(seed)
    return {name: rng.sample(range(10), 10) for name in names}


OPERATORS = make_operators(ascii_lowercase[:20], seed=0)


def solve(prompt: str, operators: dict[str, list[int]] = OPERATORS) -> list[int]:
    """Work out the digit after each operator of a prompt."""
    *names, start = prompt.split()
    values = [int(start)]
    for name in names:
        values.append(operators[name][values[-1]])
    return values[1:]


def draw_prompt(rng: random.Random, names: str = "".join(OPERATORS)) -> str:
    """Draw a prompt with operators of these `names`."""
    return " ".join([*rng.choices(names, k=LENGTH), rng.choice(DIGITS)])


def make_dataset(size: int, seed: int, held_out: bool) -> Dataset:
    """Make `size` puzzles, with `prompt`, `solution` and `difficulty` (empty, as all are alike)."""
    rng = random.Random(f"{seed} {held_out}")
    prompts = [draw_prompt(rng) for _ in range(size)]
    rows = [{"prompt": each, "solution": " ".join(map(str, solve(each))), "difficulty": ""} for each in prompts]
    return Dataset.from_list(rows)


def correctness_reward(completions: list[str], solution: list[str], **kwargs) -> list[float]:
    """Reward 1.0 for as many digits as there are operators, the last of them right, and 0.0 for anything else."""
    # A completion without an end is one token longer
    return [
        float(len(words := completion.split()) == LENGTH and VALUES.get(words[-1]) == int(worked.split()[-1]))
        for completion, worked in zip(completions, solution, strict=True)
    ]


def load_chains(train_size: int, eval_size: int = 0, seed: int = 0, task_kwargs: dict | None = None) -> Task:
    """Make the task, which has no settings."""
    if task_kwargs:
        raise ValueError(f"`--task chains` has no `--task_kwargs`, but got {json.dumps(task_kwargs)}.")
    train_dataset = make_dataset(train_size, seed, held_out=False)
    return Task(train_dataset, make_dataset(eval_size, seed, held_out=True), correctness_reward)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make the word-level tokenizer that teacher and student share."""
    return make_word_tokenizer([PAD, EOS, *DIGITS, *WORDS, *OPERATORS])
