"""The rows of a rollout batch, to a teacher behind a URL and back."""

from concurrent.futures import Future
from contextlib import nullcontext

from accelerate.logging import get_logger

from ..teachers import ServedTeacher, ServerError, TokenScores
from .row_scorer import RowScorer
from .rows import Row


logger = get_logger(__name__)

# A run ends when this share of a process's rows so far, of which there are taken to be this many at least, have failed
FAILED_SHARE, LEAST_ROWS = 0.1, 10_000


class ServedRowScorer(RowScorer):
    """
    A [`RowScorer`] that sends rows off when they have been generated, and waits for them when the loss needs them.

    Each process sends its own rows: the servers share out the work, and nothing has to be gathered. Rows that turn out
    not to be needed, for want of an advantage, are called back. With `on_failure="raise"` a row that no server answers
    is a [`ServerError`]; with `"grpo"` it has no scores, until these are more than a tenth of all rows so far, and
    more than a thousand.
    """

    teacher: ServedTeacher

    def __init__(self, *args, on_failure: str = "raise"):
        super().__init__(*args)
        self.on_failure = on_failure
        self._sent: dict[tuple, Future] = {}
        self._asked = self._failed = 0  # in all of the run

    def begin(self, rows, top_k=0):
        self._call_back()
        self.contract.check(rows)
        different = {row.key: row for row in rows}
        self._sent = {key: self.teacher.submit(row.prompt, row.completion, top_k) for key, row in different.items()}

    def score_early(self, rows, top_k=0):
        return nullcontext()  # they are on their way

    def release(self):
        self._call_back()
        self.teacher.release()

    def _call_back(self):
        for future in self._sent.values():
            future.cancel()  # of a coroutine: that ends its request
        self._sent = {}

    def _score_slices(self, rows: list[Row], top_k: int) -> list[TokenScores | None]:
        try:
            return self._collect(rows, top_k)
        except BaseException:  # training ends
            self.release()
            raise

    def _collect(self, rows: list[Row], top_k: int) -> list[TokenScores | None]:
        futures, self.queued_rows = [], self.teacher.servers.queued
        for row in rows:
            sent = self._sent.pop(row.key) if row.key in self._sent else None
            futures.append(sent or self.teacher.submit(row.prompt, row.completion, top_k))
        self._call_back()
        scores: list[TokenScores | None] = []
        for future in futures:
            try:
                scores.append(future.result())
            except ServerError as error:
                if self.on_failure == "raise":
                    raise ServerError(
                        f"The teacher has no answer: {error}. Start its server and go on from the last checkpoint, "
                        'with `resume_from_checkpoint`. With `on_teacher_failure="grpo"` such rows train without the '
                        "teacher."
                    ) from error
                scores.append(None)
                cause = error
        self.failed_rows = scores.count(None)
        if self.failed_rows and not self._failed:
            logger.warning(
                f"The teacher has no answer for {self.failed_rows} rows, which train without it "
                f"(`on_teacher_failure='grpo'`, counted in `teacher/failed_rows`): {cause}",
                main_process_only=False,
            )
        self._asked, self._failed = self._asked + len(rows), self._failed + self.failed_rows
        if self._failed > FAILED_SHARE * max(self._asked, LEAST_ROWS):
            raise ServerError(
                f"The teacher has had no answer for {self._failed} of {self._asked} rows, which is more than "
                "`on_teacher_failure='grpo'` puts up with. Go on from the last checkpoint when it answers again. "
                f"{cause}"
            ) from cause
        return scores
