"""
Mathematics with one checkable answer, such as the math split of
[Skywork-OR1-RL-Data](https://huggingface.co/datasets/Skywork/Skywork-OR1-RL-Data), for TRL.
"""

import json

from datasets import load_dataset
from transformers import AutoTokenizer
from trl.rewards import accuracy_reward

from .task import Task


INSTRUCTION = "Reason step by step, and put the final answer in \\boxed{}."


def math_reward(completions, solution, **kwargs) -> list[float | None]:
    """[`~trl.rewards.accuracy_reward`] without its columns in TRL's table of completions."""
    return accuracy_reward(completions, solution)


def load_math(
    train_size: int,
    eval_size: int = 0,
    seed: int = 0,
    tokenizer: str | None = None,
    dataset: str = "Skywork/Skywork-OR1-RL-Data",
    split: str = "math",
    max_prompt_length: int = 2048,
) -> Task:
    """
    Loads problems in the form of Skywork-OR1 and splits off a held-out set.

    The same seed gives the same held-out set whatever the `train_size`.

    Args:
        train_size (`int`):
            Largest number of training problems.
        eval_size (`int`, *optional*, defaults to `0`):
            Number of held-out problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the problems.
        tokenizer (`str`, *optional*):
            Name or path of the tokenizer that measures the prompts. If `None`, long prompts stay.
        dataset (`str`, *optional*, defaults to `"Skywork/Skywork-OR1-RL-Data"`):
            Name or folder of a dataset with the columns `prompt` (chat messages) and `reward_model`, whose
            `ground_truth` is the acceptable answers as a JSON list. The first of them counts.
        split (`str`, *optional*, defaults to `"math"`):
            Split of the dataset.
        max_prompt_length (`int`, *optional*, defaults to `2048`):
            Problems whose prompt has more tokens are left out.

    Returns:
        [`Task`]: with the columns `prompt` (conversational), `solution` and `difficulty` (empty).
    """

    def to_row(row):
        *history, question = row["prompt"]
        content = question["content"]
        if "\\boxed" not in content:
            content = f"{content}\n\n{INSTRUCTION}"
        answer = json.loads(row["reward_model"]["ground_truth"])[0]
        prompt = [*history, {"role": question["role"], "content": content}]
        return {"prompt": prompt, "solution": f"\\boxed{{{answer}}}", "difficulty": ""}

    rows = load_dataset(dataset, split=split)
    rows = rows.map(to_row, remove_columns=rows.column_names)
    if tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)

        def is_short(row):
            encoded = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
            return len(encoded["input_ids"]) <= max_prompt_length

        rows = rows.filter(is_short)
    rows = rows.shuffle(seed)
    train_end = min(eval_size + train_size, len(rows))
    return Task(rows.select(range(eval_size, train_end)), rows.select(range(eval_size)), math_reward)
