"""The rows of one teacher, scored in slices and micro-batches."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from math import ceil
from threading import Lock

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..packing import cut, cut_shared, group_rows, slice_rows
from ..teachers import Teacher, TokenContract, TokenScores
from .exchange import exchange
from .rows import Row


logger = get_logger(__name__)

# About as many tokens of each process are sent around and scored at once: with eight named tokens, 80 MB
SLICE = 2**20
ONE_AT_A_TIME = Lock()  # of several teachers that score early: they share the device, and DeepSpeed's configuration


class RowScorer:
    """
    Scores rows with one teacher.

    Args:
        teacher ([`~trl_rlad.teachers.Teacher`]), accelerator ([`~accelerate.Accelerator`]):
            What scores token sequences, and what knows the other processes.
        tokens_per_batch (`int`):
            Number of tokens the teacher scores at once, padding counted. Halved when the device runs out of memory.
        contract ([`~trl_rlad.teachers.TokenContract`], *optional*):
            What the teacher can read and name. `None` lets it read all tokens and name none.
    """

    # Of the last call of `score`, rows without scores, and requests that had no place in flight when it began
    failed_rows = queued_rows = 0

    def __init__(
        self, teacher: Teacher, accelerator: Accelerator, tokens_per_batch: int, contract: TokenContract | None = None
    ):
        self.teacher, self.accelerator = teacher, accelerator
        self.tokens_per_batch = self._budget = tokens_per_batch  # `_budget` is that of all processes, never halved
        self.contract = contract or TokenContract(teacher)
        self.seconds = 0.0  # that the last call of `score` took, and the wait for early scores with it
        self._early: dict[tuple, TokenScores] = {}  # for the next call,
        self._waited = 0.0  # and how long they were waited for

    def release(self):
        """Let the teacher's weights go."""
        self.teacher.release()

    def begin(self, rows: list[Row], top_k: int = 0):
        """No-op for a teacher in these processes: scoring now would compete with the student for the device."""

    @contextmanager
    def score_early(self, rows: list[Row], top_k: int = 0) -> Iterator[None]:
        """Score rows in a thread while the body of the context runs, see [`TeacherScorer.score_early`]."""
        if self.teacher.is_sharded:
            yield
            return
        self.contract.check(rows)
        different = {row.key: row for row in rows}

        def run():
            if self.accelerator.device.type == "cuda":
                torch.cuda.set_device(self.accelerator.device)  # each thread has its own
            with ONE_AT_A_TIME:
                return self._score_here(list(different.values()), top_k)

        with ThreadPoolExecutor(max_workers=1) as pool:
            scores = pool.submit(run)
            yield
            start = time.perf_counter()
            self._early = dict(zip(different, scores.result(), strict=True))
            self._waited = time.perf_counter() - start

    def score(self, rows: list[Row], top_k: int = 0) -> Iterator[tuple[list[int], TokenScores | None]]:
        """
        Yield scores, each with the numbers of this process's rows whose they are; `None` where the teacher had no
        answer. Equal rows are scored once, and those that were scored early not again. All processes call it at once,
        also without rows.
        """
        start = time.perf_counter()
        numbers: dict[tuple, list[int]] = {}
        for number, row in enumerate(rows):
            numbers.setdefault(row.key, []).append(number)
        early, self._early = self._early, {}
        missing = [equal for key, equal in numbers.items() if key not in early]
        yield from ((equal, early[key]) for key, equal in numbers.items() if key in early)
        early.clear()
        yield from zip(missing, self._score_slices([rows[equal[0]] for equal in missing], top_k), strict=True)
        self.seconds, self._waited = time.perf_counter() - start + self._waited, 0.0

    def _score_slices(self, rows: list[Row], top_k: int) -> Iterable[TokenScores | None]:
        """Score rows, those of all processes together, no more at once than fit into a slice."""
        lengths = [len(row) for row in rows]
        totals = self.accelerator.gather(torch.tensor([sum(lengths)], device=self.accelerator.device))
        for numbers in slice_rows(lengths, max(1, ceil(totals.max().item() / SLICE))):
            yield from self._score_with_all_processes([rows[i] for i in numbers], top_k)

    def _score_with_all_processes(self, rows: list[Row], top_k: int) -> list[TokenScores]:
        if self.accelerator.num_processes == 1:
            return self._score_here(rows, top_k)
        score = partial(self._score_here, top_k=top_k)
        return exchange(rows, score, self.teacher, self._budget, top_k, self.accelerator)

    def _score_here(self, rows: list[Row], top_k: int) -> list[TokenScores]:
        """Score rows in this process, in micro-batches."""
        groups = self._group(rows)
        budget = self.tokens_per_batch if self.teacher.mixes_rows else 1  # which no two rows fit into
        alone: dict[tuple, list[int]] = {}
        for group in groups:
            if len(group) == 1:
                alone.setdefault(rows[group[0]].shapes, []).append(group[0])
        image_batches: list[list[int]] = []
        text_batches: list[list[int]] = []
        for shapes, items in alone.items():
            batches = image_batches if shapes else text_batches
            batches += _pick(items, cut([len(rows[i]) for i in items], budget))
        for group in groups:
            if len(group) > 1:
                completion_lengths = [len(rows[i].completion) for i in group]
                cuts = cut_shared(len(rows[group[0]].prompt), completion_lengths, self.tokens_per_batch)
                text_batches += _pick(group, cuts)
        if self.teacher.is_sharded:
            self._keep_pace(image_batches, text_batches)
        scores: dict[int, TokenScores] = {}
        if image_batches or text_batches:
            with self.teacher.placed():
                for batch in image_batches + text_batches:
                    scores |= zip(batch, self._score_batch([rows[i] for i in batch], top_k), strict=True)
        return [scores[i] for i in range(len(rows))]

    def _keep_pace(self, image_batches: list[list[int]], text_batches: list[list[int]]):
        """Add micro-batches until there are as many as on the busiest process, as a sharded teacher runs on all of
        them at once: without rows, or where its vision tower is to run, of the first row again."""
        counts = torch.tensor([[len(image_batches), len(text_batches)]], device=self.accelerator.device)
        counts = self.accelerator.gather(counts)
        if len((counts[:, 0] > 0).unique()) > 1:
            raise ValueError(
                "A sharded teacher runs its vision tower on all processes at once, but in this batch some of them "
                "have no completion with an image to score. Keep the teacher whole (`teacher_zero_stage=0`; under "
                "FSDP choose another launcher), or train on data of which every row has an image."
            )
        rounds = counts.amax(0).tolist()
        image_batches += [image_batches[0][:1] for _ in range(rounds[0] - len(image_batches))]
        text_batches += [[] for _ in range(rounds[1] - len(text_batches))]

    def _score_batch(self, rows: list[Row], top_k: int) -> list[TokenScores]:
        try:
            parts = zip(*((row.prompt, row.completion, row.images) for row in rows), strict=True)
            prompts, completions, images = map(list, parts) if rows else ([], [], [])
            return self.teacher.score(prompts, completions, top_k, images)
        except torch.OutOfMemoryError:
            if len(rows) < 2 or self.teacher.is_sharded:  # the other processes are in the middle of it
                raise
        half = len(rows) // 2
        self.tokens_per_batch = min(self.tokens_per_batch, half * max(map(len, rows)))
        logger.warning(
            f"The teacher ran out of memory. It goes on with {self.tokens_per_batch} tokens at once: set "
            f"`teacher_tokens_per_batch={self.tokens_per_batch}` to have it so from the start."
        )
        torch.cuda.empty_cache()
        return self._score_batch(rows[:half], top_k) + self._score_batch(rows[half:], top_k)

    def _group(self, rows):
        if not self.teacher.shares_prompts:
            return [[i] for i in range(len(rows))]
        return group_rows(
            # Rows with images share nothing
            [i if row.images else tuple(row.prompt.tolist()) for i, row in enumerate(rows)],
            [len(row.prompt) for row in rows],
            [len(row.completion) for row in rows],
            self.tokens_per_batch,
        )


def _pick(items: list, batches: list[list[int]]) -> list[list]:
    return [[items[i] for i in batch] for batch in batches]
