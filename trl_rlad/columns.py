"""
The columns that a dataset may have for the teacher, and what is wrong with them.

A dataset is looked at before training, a stream as it comes: `where` then ends the sentence "row 3 ...".
"""

from collections.abc import Iterable, Sequence

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
