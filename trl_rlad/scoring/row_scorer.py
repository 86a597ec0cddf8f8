"""The rows of all processes, dealt out evenly and scored by one teacher in micro-batches."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, chain
from threading import Lock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..packing import cut, cut_shared, deal, group_rows
from ..teachers import Teacher, TokenContract, TokenScores
from .rows import Row


logger = get_logger(__name__)

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

    failed_rows = 0  # of the last call of `score`, rows without scores

    def __init__(
        self, teacher: Teacher, accelerator: Accelerator, tokens_per_batch: int, contract: TokenContract | None = None
    ):
        self.teacher, self.accelerator, self.tokens_per_batch = teacher, accelerator, tokens_per_batch
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

    def score(self, rows: list[Row], top_k: int = 0) -> list[TokenScores | None]:
        """The scores of this process's rows, `None` where the teacher had no answer. Equal rows are scored once, and
        those that were scored early not again. All processes call it at once, also without rows."""
        start = time.perf_counter()
        keys = [row.key for row in rows]
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._early}
        scores = self._score_with_all_processes(list(missing.values()), top_k)
        known = self._early | dict(zip(missing, scores, strict=True))
        self._early = {}
        self.seconds, self._waited = time.perf_counter() - start + self._waited, 0.0
        return [known[key] for key in keys]

    def _score_with_all_processes(self, rows: list[Row], top_k: int) -> Sequence[TokenScores | None]:
        """Score this process's rows, after those of all processes have been dealt out evenly among them."""
        if self.accelerator.num_processes == 1:
            return self._score_here(rows, top_k)
        rank = self.accelerator.process_index
        # Rows with images stay here: their tensors are a thousand times the size of their tokens
        at_home = [row for row in rows if row.images]
        everyone = self._all_gather(([row for row in rows if not row.images], sum(map(len, at_home))))
        everyones_rows, loads = zip(*everyone, strict=True)
        first = [0, *accumulate(map(len, everyones_rows))][rank]
        every_row = list(chain.from_iterable(everyones_rows))
        groups = self._group(every_row)
        costs = [sum(len(every_row[i]) for i in group) for group in groups]
        mine = [i for group in deal(costs, loads)[rank] for i in groups[group]]
        scores = self._score_here([every_row[i] for i in mine] + at_home, top_k)
        scores = [TokenScores(*(part.cpu() for part in score)) for score in scores]
        dealt = dict(chain.from_iterable(self._all_gather(list(zip(mine, scores, strict=False)))))
        texts, images = (dealt[i] for i in range(first, len(dealt))), iter(scores[len(mine) :])
        return [next(images if row.images else texts) for row in rows]

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
        )

    def _all_gather(self, item):
        everyone = [None] * self.accelerator.num_processes
        dist.all_gather_object(everyone, item)
        return everyone


def _pick(items: list, batches: list[list[int]]) -> list[list]:
    return [[items[i] for i in batch] for batch in batches]
