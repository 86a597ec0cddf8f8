"""Several teachers, each for the rows that name it."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from .teacher_scorer import TeacherScorer


def teacher_numbers(teacher_ids: Iterable[str | None], names: Collection[str]) -> torch.Tensor:
    """
    Numbers, among `names`, of the teachers that rows have in their column `teacher_id`, `int64`.

    Raises:
        `ValueError`: if one of them is no teacher.
    """
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    teacher_ids = list(teacher_ids)
    if unknown := set(teacher_ids) - numbers.keys():
        raise ValueError(
            f"The dataset's column `teacher_id` has {min(map(repr, unknown))}, which is no teacher. They are "
            f"{', '.join(map(repr, numbers))}."
        )
    return torch.tensor([numbers[name] for name in teacher_ids], dtype=torch.long)


class RoutedScorer:
    """
    A [`TeacherScorer`] for each of several teachers, and what sends a row to its own.

    Args:
        scorers (`dict[str, TeacherScorer]`):
            The scorers by the names that rows have in their column `teacher_id`.
    """

    def __init__(self, scorers: dict[str, TeacherScorer]):
        self.scorers = scorers

    @property
    def seconds(self) -> float:
        """Time the last call of `score` took."""
        return sum(scorer.seconds for scorer in self.scorers.values())

    @property
    def failed_rows(self) -> int:
        """Number of rows of the last call of `score` to which a teacher has had no answer."""
        return sum(scorer.failed_rows for scorer in self.scorers.values())

    def release(self):
        """Let the weights of all teachers go."""
        for scorer in self.scorers.values():
            scorer.release()

    def score(
        self,
        batch: dict[str, torch.Tensor],
        mask: torch.Tensor,
        top_k: int = 0,
        prompts: Sequence[torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """As [`TeacherScorer.score`], each row by the teacher whose number it has in `teacher_index`, of shape `(B,)`."""
        top_k = min(top_k, *(scorer.teacher.vocab_size for scorer in self.scorers.values()))
        parts = []
        for number, scorer in enumerate(self.scorers.values()):
            mine = (batch["teacher_index"] == number).unsqueeze(1)
            parts.append(scorer.score(batch, mask * mine, top_k, prompts))
        # Outside of its own rows a part is 0, and what it names there at -inf
        merged = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return {
            name: part.amax(0) if part.dtype == torch.bool or name == "teacher_top_logps" else part.sum(0)
            for name, part in merged.items()
        }

    def begin(self, prompts, completions, masks, top_k=0, *, teacher_index: torch.Tensor):
        """As [`TeacherScorer.begin`], each row for the teacher whose number it has in `teacher_index`."""
        for scorer, rows in self._rows_of_each(teacher_index, prompts, completions, masks):
            scorer.begin(*rows, top_k)

    @contextmanager
    def ahead(self, prompts, completions, masks, top_k=0, *, teacher_index: torch.Tensor) -> Iterator[None]:
        """As [`TeacherScorer.ahead`], each row by the teacher whose number it has in `teacher_index`."""
        with ExitStack() as stack:
            for scorer, rows in self._rows_of_each(teacher_index, prompts, completions, masks):
                stack.enter_context(scorer.ahead(*rows, top_k))
            yield

    def _rows_of_each(self, teacher_index, *columns):
        for number, scorer in enumerate(self.scorers.values()):
            mine = (teacher_index == number).nonzero().flatten().tolist()
            yield scorer, [[column[i] for i in mine] for column in columns]
