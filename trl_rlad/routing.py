"""Several teachers, each for the rows that name it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from .teacher_scorer import TeacherScorer


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

    def release(self):
        """Let the weights of all teachers go."""
        for scorer in self.scorers.values():
            scorer.release()

    def find(self, names: Iterable[str | None]) -> torch.Tensor:
        """Numbers of the teachers of these names, `int64`. Raises a `ValueError` at a name that none has."""
        numbers = {name: number for number, name in enumerate(self.scorers)}
        names = list(names)
        if unknown := set(names) - numbers.keys():
            raise ValueError(
                f"The dataset's column `teacher_id` has {sorted(map(repr, unknown))[0]}, which is no teacher. Those of "
                f"`teacher_model` are {', '.join(map(repr, numbers))}."
            )
        return torch.tensor([numbers[name] for name in names], dtype=torch.long)

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

    @contextmanager
    def ahead(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]],
        top_k: int = 0,
        teacher_index: torch.Tensor | None = None,
    ) -> Iterator[None]:
        """As [`TeacherScorer.ahead`], each row by the teacher whose number it has in `teacher_index`."""
        with ExitStack() as stack:
            for number, scorer in enumerate(self.scorers.values()):
                mine = (teacher_index == number).nonzero().flatten().tolist()
                rows = ([column[i] for i in mine] for column in (prompts, completions, masks))
                stack.enter_context(scorer.ahead(*rows, top_k))
            yield
