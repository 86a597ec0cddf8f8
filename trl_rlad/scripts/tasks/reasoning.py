"""
Turns any task of [reasoning-gym](https://github.com/open-thought/reasoning-gym) into one of ours.

Some of its scorers evaluate the model's answer as Python, so all but that of `knights_knaves`, which is scored here,
run in processes apart, see `sandbox.py`.
"""

import random
import re
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from itertools import chain, islice

from datasets import Dataset

from .sandbox import Sandbox
from .task import Task


SYSTEM_PROMPT = (
    "Reason about the problem first, then answer it. Put the reasoning in <think> tags and nothing but the final "
    "answer in <answer> tags, like this:\n<think>reasoning</think><answer>{example}</answer>"
)
ROLES_PROMPT = SYSTEM_PROMPT.format(example="(1) Zoey is a knight\n(2) Oliver is a knave") + (
    "\nGive the role of each person exactly once, and call the roles what the puzzle calls them."
)
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def extract_answer(message: dict) -> str | None:
    """
    Returns what an assistant message has between its answer tags, or `None` if its format is wrong.

    The format is right if the tags `<think>`, `</think>`, `<answer>` and `</answer>` occur exactly once each and in
    this order. Text outside of them is free, as reasoning models like to sum up before they answer. The opening
    `<think>` may be missing, as some chat templates (of Qwen3.5 and the DeepSeek-R1 distillations, for instance) write
    it at the end of the prompt.

    Args:
        message (`dict`):
            Message as TRL passes it to reward functions. If the tokenizer has a response template, TRL has moved the
            reasoning, without its tags, from `"content"` to `"reasoning_content"` or `"thinking"`.

    Returns:
        `str` or `None`:
            Answer, stripped and possibly empty, or `None`.
    """
    text = message["content"]
    if reasoning := message.get("reasoning_content") or message.get("thinking"):
        text = f"<think>{reasoning}</think>{text}"
    if re.findall("|".join(TAGS), text) not in (TAGS, TAGS[1:]):
        return None
    return text.split("<answer>")[1].split("</answer>")[0].strip()


def score_roles(answer: str | None, entry: dict) -> float:
    """
    Scores an answer to a `knights_knaves` puzzle with the rule-based reward of
    [Logic-RL](https://huggingface.co/papers/2502.14768): 1 or -1 for the format, to which the answer adds 2 if right,
    -1.5 if wrong and -2 if unreadable.

    Args:
        answer (`str` or `None`):
            Answer, or `None` if the format was wrong. It is readable if it gives one of the puzzle's two roles to each
            of the puzzle's people exactly once, in any order, case and punctuation, and says nothing else. So neither
            "Zoey is not a knight" nor "Zoey is a knight or a knave" can be read.
        entry (`dict`):
            Entry of reasoning-gym's dataset.

    Returns:
        `float`:
            3 if right, -0.5 if wrong, -1 if unreadable, -3 if the format was wrong.
    """
    if answer is None:
        return -1.0 - 2.0
    puzzle = entry["metadata"]
    knave, knight = (puzzle["knight_knave_terms"][role] for role in ("knave", "knight"))
    solution = {
        name.lower(): knight if is_knight else knave
        for name, is_knight in zip(puzzle["names"], puzzle["solution"], strict=True)
    }
    words = [word for word in re.findall(r"[^\W\d_]+", answer.lower()) if word not in ("is", "a", "an", "and")]
    people, roles = words[::2], words[1::2]
    if sorted(people) != sorted(solution) or len(roles) != len(people) or not {knave, knight}.issuperset(roles):
        return 1.0 - 2.0
    return 1.0 + 2.0 if roles == [solution[name] for name in people] else 1.0 - 1.5


def distinct(entries, key: Callable):
    """Skips the entries whose key an earlier one had."""
    seen = set()
    for entry in entries:
        if key(entry) not in seen:
            seen.add(key(entry))
            yield entry


def load_reasoning(
    task: str, train_size: int, eval_size: int = 0, seed: int = 0, task_kwargs: dict | None = None
) -> Task:
    """
    Generates a training set and a held-out set of a reasoning-gym task that share no question, and their reward.

    The same seed gives the same held-out set whatever the `train_size`. The questions of `isomorphic_strings`,
    `polynomial_multiplication` and `ransom_note` also depend on the environment variable `PYTHONHASHSEED`: set it if
    several processes train together.

    Args:
        task (`str`):
            Name of the task, such as `"knights_knaves"` or `"chain_sum"`.
        train_size (`int`):
            Number of training questions.
        eval_size (`int`, *optional*, defaults to `0`):
            Number of held-out questions.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the questions.
        task_kwargs (`dict`, *optional*):
            Settings of the task. For `knights_knaves`, `n_people` may also be a list of numbers, to be mixed in equal
            shares.

    Returns:
        [`Task`]:
            With the columns `prompt` (conversational), `question`, `answer` (empty where the task has no single right
            one) and `difficulty` (the number of people for `knights_knaves`, otherwise empty). The reward is
            [`score_roles`] for `knights_knaves`; for any other task it is reasoning-gym's own score from 0 to 1, in a
            [`~sandbox.Sandbox`], and 0 for a wrong format. It finds an entry by its `question`, and knows those of
            these two sets only. What the sandbox has had to end is logged as `scorer_failures`.

    Example:

    ```python
    >>> task = load_reasoning("knights_knaves", train_size=1000, eval_size=100, task_kwargs={"n_people": [3, 4, 5]})
    ```
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ImportError('The tasks come from reasoning-gym: `pip install "trl-rlad[tasks]"`.') from error

    if task not in DATASETS:
        matches = ", ".join(get_close_matches(task, DATASETS, n=5) or sorted(DATASETS))
        raise ValueError(f"Unknown `task` {task!r}. Close to it among the {len(DATASETS)} tasks: {matches}.")
    task_kwargs = task_kwargs or {}
    settings = {field.name for field in fields(DATASETS[task][1])} - {"seed", "size"}
    if unknown := task_kwargs.keys() - settings:
        raise ValueError(f"Unknown `task_kwargs` {sorted(unknown)}. The settings of {task!r}: {sorted(settings)}.")

    is_roles = task == "knights_knaves"
    n_people = task_kwargs.get("n_people")
    variants = [{"n_people": n} for n in n_people] if is_roles and isinstance(n_people, list) else [{}]
    size = train_size + eval_size
    draws = 10 * size  # lazy, and enough to replace the repeated questions of all but tiny tasks
    random.seed(seed)  # `list_functions` draws from the global generator
    task_seed = random.getrandbits(31)  # entry i has seed + i, so that neighboring seeds would share their questions
    try:
        sources = [create_dataset(task, seed=task_seed, size=draws, **task_kwargs | variant) for variant in variants]
        configs = [source.config for source in sources]
        if is_roles and any(c.depth_constraint < 2 or not 2 <= c.width_constraint < 2 * c.n_people for c in configs):
            # reasoning-gym would fail or search forever, for want of different statements or of a unique solution
            raise ValueError("it takes `depth_constraint` >= 2 and 2 <= `width_constraint` < 2 * `n_people`")
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"Bad `task_kwargs` {task_kwargs} for {task!r}: {error}.") from error

    # Names, role words and wording are drawn apart from the statements, which are what makes the puzzle
    key = (lambda entry: entry["metadata"]["statements"]) if is_roles else (lambda entry: entry["question"])
    rounds = zip(*(distinct(source, key) for source in sources), strict=False)
    entries = {entry["question"]: entry for entry in islice(chain.from_iterable(rounds), size)}
    if len(entries) < size:
        raise ValueError(
            f"Found only {len(entries)} different questions of {task!r} for `train_size` + `eval_size` = {size}. Ask "
            f"for fewer, or make room with `task_kwargs` ({task_kwargs}; the settings: {sorted(settings)})."
        )

    rows = [
        {
            "prompt": [
                {"role": "system", "content": ROLES_PROMPT if is_roles else SYSTEM_PROMPT.format(example="answer")},
                # The puzzle's own format hint would contradict the system prompt
                {"role": "user", "content": question.split(" (Format your answer")[0] if is_roles else question},
            ],
            "question": question,
            "answer": entry["answer"] or "",
            "difficulty": str(len(entry["metadata"]["names"])) if is_roles else "",
        }
        for question, entry in entries.items()
    ]
    config = {field.name: getattr(sources[0].config, field.name) for field in fields(sources[0].config)}
    sandbox = Sandbox(task, config)

    def reward(completions, question, log_metric=None, **kwargs):
        answers = [extract_answer(completion[0]) for completion in completions]
        asked = [entries[key] for key in question]
        if is_roles:
            return [score_roles(answer, entry) for answer, entry in zip(answers, asked, strict=True)]
        read, failures = [i for i, answer in enumerate(answers) if answer is not None], sandbox.failures
        scores = sandbox.score([answers[i] for i in read], [asked[i] for i in read])
        if log_metric is not None:
            log_metric("scorer_failures", sandbox.failures - failures)
        known = dict(zip(read, scores, strict=True))
        return [known.get(i, 0.0) for i in range(len(answers))]

    reward.__name__ = f"{task}_reward"
    best = 3.0 if is_roles else 1.0
    return Task(Dataset.from_list(rows[eval_size:]), Dataset.from_list(rows[:eval_size]), reward, best)
