"""
The columns that a dataset needs and may have for the teacher, and what is wrong with them or with who reads them.

A dataset is looked at before training, a stream as it comes: `where` then ends the sentence "row 3 ...".
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from trl.data_utils import is_conversational


NAMES = ("teacher_id", "teacher_prompt", "teacher_weight")
IN_BATCH = " of a generation batch"
NO_PROMPTS = (
    '`teacher_model="self"` is the student, and knows no more unless the dataset\'s column `teacher_prompt` tells it, '
    "which is missing or empty. Add the column, such as `dataset.map(lambda row: {'teacher_prompt': "
    "f\"{row['prompt']} Solution: {row['solution']}\"})`, or name another teacher."
)


def read_weights(values: Iterable[float | None], where: str = "") -> torch.Tensor:
    """The column `teacher_weight`, `float32`, 1 where it is `None`. Raises a `ValueError` if it leaves `[0, 1]`."""
    weights = []
    for row, value in enumerate(values):
        try:
            weights.append(1.0 if value is None else float(value))
        except (TypeError, ValueError):
            weights.append(float("nan"))
        if isinstance(value, str) or not 0.0 <= weights[-1] <= 1.0:
            raise ValueError(
                "The dataset's column `teacher_weight` must be in [0, 1] (0: GRPO, 1: the teacher in full), a number "
                f"or `None`, but row {row}{where} has {value!r}."
            )
    return torch.tensor(weights, dtype=torch.float32)


def number_teachers(teacher_ids: Iterable[str | None], names: Iterable[str], where: str = "") -> torch.Tensor:
    """
    Numbers, among `names`, of the teachers that rows have in their column `teacher_id`, `int64`.

    Raises:
        `ValueError`: if one of them is no teacher.
    """
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    found = []
    for row, teacher_id in enumerate(teacher_ids):
        if not isinstance(teacher_id, str) or teacher_id not in numbers:
            hint = " Cast the column from `ClassLabel` to strings." if isinstance(teacher_id, int) else ""
            raise ValueError(
                f"The dataset's column `teacher_id` has {teacher_id!r} in row {row}{where}, which is no teacher. They "
                f"are {', '.join(map(repr, numbers))}.{hint}"
            )
        found.append(numbers[teacher_id])
    return torch.tensor(found, dtype=torch.long)


def check_prompts(values: Sequence, where: str = ""):
    """Raises a `ValueError` unless the column `teacher_prompt` has text or messages throughout, `None` aside."""
    kinds: dict[bool, int] = {}
    for row, value in enumerate(values):
        is_text = isinstance(value, str) and bool(value.strip())
        if value is not None and not is_text and not (value and is_conversational({"prompt": value})):
            raise ValueError(
                "The dataset's column `teacher_prompt` must be text or messages, or `None` where the teacher is to "
                f"read what the student has read, but row {row}{where} has {value!r}."
            )
        if value is not None:
            kinds.setdefault(is_text, row)
    if len(kinds) == 2:
        raise ValueError(
            f"The dataset's column `teacher_prompt` has text in row {kinds[True]}{where}, and messages in row "
            f"{kinds[False]}. Choose one of the two."
        )


def check_readers(datasets: dict[str, Any], reward_funcs: Any):
    """
    Refuse a dataset without prompts, and a reward function that can't be called with what the first dataset has. Where
    columns are unknown, as those of a stream may be and those that a transform makes are, nothing is.

    Args:
        datasets (`dict[str, Any]`):
            Datasets by what to call them.
        reward_funcs:
            As in [`~trl.GRPOTrainer`].

    Raises:
        `TypeError`: if a reward function doesn't take its arguments.
        `ValueError`: if a dataset has no column `prompt`.
    """
    known = {
        name: each.column_names
        for name, each in datasets.items()
        if isinstance(getattr(each, "column_names", None), list)
        and getattr(each, "format", {}).get("type") != "custom"
    }
    for name, columns in known.items():
        if "prompt" not in columns:
            raise ValueError(
                f"`{name}` has no column `prompt`, but {', '.join(columns)}. Rename the one with the prompts, such as "
                f'`{name}.rename_column("{columns[0]}", "prompt")`.'
            )
    columns = next(iter(known.values()), None)
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if columns is None or not inspect.isroutine(function):
            continue
        given = ["prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"]
        given += [name for name in columns if name not in ("prompt", "completion", "completion_ids")]
        try:
            inspect.signature(function).bind(**dict.fromkeys(given))
        except TypeError as error:
            raise TypeError(
                f"The reward function `{function.__name__}` can't be called: {error}. It is given {', '.join(given)} "
                "by name: take those that it needs, and all others as `**kwargs`."
            ) from None
