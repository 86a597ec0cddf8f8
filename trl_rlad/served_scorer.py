"""The rows of a rollout batch, to a teacher behind a URL and back."""

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext

from accelerate.logging import get_logger

from .teacher_scorer import Row, TeacherScorer
from .teachers import ServedTeacher, ServerError, TokenScores


logger = get_logger(__name__)

# Of a process's rows so far, of which there are taken to be this many at least
FAILED_SHARE, LEAST_ROWS = 0.1, 10_000


class ServedScorer(TeacherScorer):
    """
    A [`TeacherScorer`] whose rows are sent off when they have been generated, and waited for when the loss needs them.

    Each process sends its own rows: it is the servers that share out the work, and nothing has to be gathered. Rows that turn
    out not to be needed, for want of an advantage, are called back.

    Args:
        *args, **kwargs:
            As in [`TeacherScorer`], with a [`~trl_rlad.teachers.ServedTeacher`].
        failure (`str`, *optional*, defaults to `"raise"`):
            What to do about a row that no server answers: `"raise"` ends training, `"grpo"` leaves the teacher without a say
            on it, until these are more than a tenth of all rows so far, and more than a thousand.

    Raises:
        [`ServerError`]: when rows have failed, according to `failure`.
    """

    teacher: ServedTeacher

    def __init__(self, *args, failure: str = "raise", **kwargs):
        super().__init__(*args, **kwargs)
        self.failure = failure
        self._sent: dict[tuple, Future] = {}
        self._asked = self._failed = 0  # in all of the run

    def begin(self, prompts, completions, masks, top_k=0):
        self._call_back()
        rows = self._find_rows(prompts, completions, masks)
        self._sent = {key: self.teacher.submit(row.prompt, row.completion, top_k) for key, row in rows.items()}

    def ahead(self, prompts, completions, masks, top_k=0):
        return nullcontext()  # they are on their way

    def release(self):
        self._call_back()

    def _call_back(self):
        for future in self._sent.values():
            future.cancel()
        self._sent = {}

    def _score_with_all_processes(self, rows: list[Row], top_k: int) -> Sequence[TokenScores | None]:
        futures = []
        for row in rows:
            sent = self._sent.pop(row.key) if row.key in self._sent else None
            futures.append(sent or self.teacher.submit(row.prompt, row.completion, top_k))
        self._call_back()
        scores: list[TokenScores | None] = []
        for future in futures:
            try:
                scores.append(future.result())
            except ServerError as error:
                if self.failure == "raise":
                    raise ServerError(
                        f"The teacher has no answer: {error}. Start its server and go on from the last checkpoint, with "
                        '`resume_from_checkpoint`. With `on_teacher_failure="grpo"` such rows train without the teacher.'
                    ) from error
                scores.append(None)
                cause = error
        self.failed_rows = scores.count(None)
        if self.failed_rows and not self._failed:
            logger.warning(
                f"The teacher has no answer for {self.failed_rows} rows, which train without it (`on_teacher_failure='grpo'`, "
                f"counted in `teacher/failed_rows`): {cause}",
                main_process_only=False,
            )
        self._asked, self._failed = self._asked + len(rows), self._failed + self.failed_rows
        if self._failed > FAILED_SHARE * max(self._asked, LEAST_ROWS):
            raise ServerError(
                f"The teacher has had no answer for {self._failed} of {self._asked} rows, which is more than "
                f"`on_teacher_failure='grpo'` puts up with. Go on from the last checkpoint when it answers again. {cause}"
            ) from cause
        return scores
