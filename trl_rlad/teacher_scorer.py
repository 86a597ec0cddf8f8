"""From a padded rollout batch to the teacher's log-probabilities, and back."""

import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from threading import Lock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import TrainerCallback

from ._trl import split_images
from .packing import cut, cut_shared, deal, group_rows
from .teachers import Teacher, TokenScores
from .watchdog import barrier_group, time_limit


logger = get_logger(__name__)

ONE_AT_A_TIME = Lock()  # of several teachers that score ahead: they share the device, and DeepSpeed's configuration


@dataclass
class Row:
    """Token ids of a prompt and of its completion, unpadded, and what the images add, all on the CPU."""

    prompt: torch.Tensor
    completion: torch.Tensor
    images: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def key(self) -> tuple:
        """What rows with the same scores have in common. A row with images is a row of its own."""
        return self.prompt.numpy().tobytes(), self.completion.numpy().tobytes(), id(self) if self.images else None

    @property
    def shapes(self) -> tuple:
        """What rows must agree on to run in one micro-batch; empty without images."""
        return tuple((name, value.shape[1:]) for name, value in self.images.items())


class TeacherScorer(TrainerCallback):
    """
    Scores each rollout batch with the teacher, once, and lets the teacher go when training has ended.

    A [`~transformers.TrainerCallback`] never sees the rollouts, so the [`RLADTrainer`] calls `score`.

    Args:
        teacher ([`~trl_rlad.teachers.Teacher`]):
            What scores token sequences.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the other processes.
        tokens_per_batch (`int`):
            Number of tokens the teacher scores at once, padding counted. Halved when the device runs out of memory.
        unknown_ids (`Collection[int]`, *optional*):
            Token ids on which the teacher has no say, see [`~trl_rlad.token_contract.find_unknown_ids`].
        timeout (`float`, *optional*, defaults to `1800.0`):
            Seconds within which all processes must have scored a rollout batch.
        shared_ids (`Collection[int]`, *optional*):
            Token ids that the teacher may name, see [`~trl_rlad.token_contract.find_shared_ids`].
        image_problem (`str`, *optional*):
            Why the teacher can't read the student's images, see [`~trl_rlad.token_contract.find_image_problem`].

    Attributes:
        seconds (`float`):
            Time the last call of `score` took.
        failed_rows (`int`):
            Number of rows that the last call of `score` has left to GRPO, as a teacher behind a URL had no answer.
    """

    failed_rows = 0

    def __init__(
        self,
        teacher: Teacher,
        accelerator: Accelerator,
        tokens_per_batch: int,
        unknown_ids: Collection[int] = (),
        timeout: float = 1800.0,
        shared_ids: Collection[int] = (),
        image_problem: str | None = None,
    ):
        self.teacher = teacher
        self.accelerator = accelerator
        self.tokens_per_batch = tokens_per_batch
        self.unknown_ids = torch.tensor(sorted(unknown_ids), dtype=torch.long)
        self.timeout, self.image_problem = timeout, image_problem
        self.is_shared = torch.zeros(teacher.vocab_size, dtype=torch.bool)
        self.is_shared[torch.tensor(sorted(shared_ids), dtype=torch.long)] = True
        self.calls, self.seconds, self.has_trained = 0, 0.0, False
        self._ahead: dict[tuple, TokenScores] = {}  # what `ahead` has scored,
        self._waited = 0.0  # and how long it was waited for
        barrier_group()

    def release(self):
        """Let the teacher's weights go."""
        self.teacher.release()

    def on_train_begin(self, args, state, control, **kwargs):
        self.has_trained = False

    def on_train_end(self, args, state, control, **kwargs):
        self.has_trained = True
        self.release()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.has_trained:
            self.release()

    def score(
        self,
        batch: dict[str, torch.Tensor],
        mask: torch.Tensor,
        top_k: int = 0,
        prompts: Sequence[torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            batch (`dict[str, torch.Tensor]`):
                `prompt_ids` and `prompt_mask` of shape `(B, P)`, `completion_ids` and `completion_mask` of shape
                `(B, T)`, and what TRL adds to it for images.
            mask (`torch.Tensor` of shape `(B, T)`):
                Tokens for which the teacher's log-probability is wanted. Rows without any are not scored at all.
            top_k (`int`, *optional*, defaults to `0`):
                Number of the teacher's likeliest tokens to return beside each.
            prompts (`Sequence[torch.Tensor]`, *optional*):
                Token ids of each row's prompt as the teacher is to read it, `int64`. `None` takes those of the batch.

        Returns:
            `dict[str, torch.Tensor]`:
                `teacher_mask`, bool, of shape `(B, T)`: the tokens on which the teacher has a say, and
                `teacher_per_token_logps`, `float32`, of the same shape, in nats, zero elsewhere. With `top_k` also
                `teacher_top_ids`, `int64`, and `teacher_top_logps`, `float32`, in nats, of shape `(B, T, k)`; a token that
                the student doesn't share has the log-probability `-inf`.

        Raises:
            `ValueError`: if a token id lies beyond the teacher's vocabulary, a row beyond its positions, or it can't read the
                images.
            `FloatingPointError`: if the teacher returns a log-probability that isn't finite.
        """
        start = time.perf_counter()
        completion_ids = batch["completion_ids"]
        mask = mask.bool() & self._is_known(completion_ids)

        which = mask.any(dim=1).nonzero().flatten().tolist()
        prompt_ids, prompt_mask = batch["prompt_ids"].cpu(), batch["prompt_mask"].cpu().bool()
        ids, ids_mask, wanted = completion_ids.cpu(), batch["completion_mask"].cpu().bool(), mask.cpu()
        images = split_images(batch)
        # With images, the tensors beside the tokens are as long as these
        ends = [ids_mask[i] if images[i] else wanted[i] for i in range(len(ids))]
        if prompts is None:
            prompts = [row[is_token] for row, is_token in zip(prompt_ids, prompt_mask, strict=True)]
        elif any(images):
            raise ValueError("A row with images can't have a `teacher_prompt`: its images belong to the prompt.")
        rows = [Row(prompts[i], cut_end(ids[i], ends[i]), images[i]) for i in which]
        self._check(rows)
        if self.image_problem and any(row.images for row in rows):
            raise ValueError(self.image_problem)
        # Equal rows are scored once, and those that were scored ahead not again
        keys = [row.key for row in rows]
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._ahead}

        self.calls += 1
        with time_limit(self.timeout, f"call {self.calls} of TeacherScorer.score"):
            scores = self._score_with_all_processes(list(missing.values()), top_k)
        known = self._ahead | dict(zip(missing, scores, strict=True))
        scores, self._ahead = [known[key] for key in keys], {}
        logps = torch.zeros(completion_ids.shape, dtype=torch.float32, device=completion_ids.device)
        top_k = min(top_k, self.teacher.vocab_size)
        top_ids = completion_ids.new_zeros(*logps.shape, top_k)
        top_logps = logps.new_full(top_ids.shape, -float("inf"))
        for i, score in zip(which, scores, strict=True):
            if score is None:  # behind a URL that doesn't answer
                mask[i] = False
                continue
            logps[i, : len(score.logps)] = score.logps
            is_shared = self.is_shared.to(score.top_ids.device)[score.top_ids]
            top_ids[i, : len(score.top_ids)] = score.top_ids.where(is_shared, 0)
            top_logps[i, : len(score.top_ids)] = score.top_logps.masked_fill(~is_shared, -float("inf"))
        logps = torch.where(mask, logps, 0.0)
        if not logps.isfinite().all():
            raise FloatingPointError(
                f"The teacher returned {(~logps.isfinite()).sum()} log-probabilities that are not finite, of "
                f"{mask.sum()}. Its weights may be damaged, or it overflows in float16: train with `bf16=True`, or load it "
                'with `teacher_model_init_kwargs={"dtype": "bfloat16"}`.'
            )
        self.seconds, self._waited = time.perf_counter() - start + self._waited, 0.0
        result = {"teacher_per_token_logps": logps, "teacher_mask": mask}
        return result | ({"teacher_top_ids": top_ids, "teacher_top_logps": top_logps} if top_k else {})

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]],
        top_k: int = 0,
    ):
        """Told of rows when they have been generated, as in `ahead`. A teacher in these processes waits, as it would only
        take the student's place on the device."""

    @contextmanager
    def ahead(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]],
        top_k: int = 0,
    ) -> Iterator[None]:
        """
        Score rows in a thread while the body of the context runs, for the next call of `score`.

        No process waits for another one meanwhile, since the body may: each scores its own rows, and a sharded teacher, which
        needs all processes, scores none.

        Args:
            prompts, completions (`Sequence[Sequence[int]]`):
                Token ids of each row.
            masks (`Sequence[Sequence[int]]`):
                1 where the teacher's log-probability may be wanted, for each token of the completions.
            top_k (`int`, *optional*, defaults to `0`):
                As in the next call of `score`.

        Raises:
            Whatever the teacher raises, when the body has ended.
        """
        if self.teacher.is_sharded:
            yield
            return
        rows = self._find_rows(prompts, completions, masks)

        def run():
            if self.accelerator.device.type == "cuda":
                torch.cuda.set_device(self.accelerator.device)  # each thread has its own
            with ONE_AT_A_TIME:
                return self._score(list(rows.values()), top_k)

        with ThreadPoolExecutor(max_workers=1) as pool:
            scores = pool.submit(run)
            yield
            start = time.perf_counter()
            self._ahead = dict(zip(rows, scores.result(), strict=True))
            self._waited = time.perf_counter() - start

    def _find_rows(self, prompts, completions, masks) -> dict[tuple, Row]:
        """The different rows that the teacher is to score of these, by what makes them different."""
        rows = []
        for prompt, completion, mask in zip(prompts, completions, masks, strict=True):
            completion = torch.tensor(completion)
            wanted = torch.tensor(mask).bool() & self._is_known(completion)
            if wanted.any():
                rows.append(Row(torch.tensor(prompt), cut_end(completion, wanted), {}))
        self._check(rows)
        return {row.key: row for row in rows}

    def _score_with_all_processes(self, rows: list[Row], top_k: int) -> Sequence[TokenScores | None]:
        """Score this process's rows, after those of all processes have been dealt out evenly among them."""
        if self.accelerator.num_processes == 1:
            return self._score(rows, top_k)
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
        scores = self._score([every_row[i] for i in mine] + at_home, top_k)
        scores = [TokenScores(*(part.cpu() for part in score)) for score in scores]
        dealt = dict(chain.from_iterable(self._all_gather(list(zip(mine, scores, strict=False)))))
        texts, images = (dealt[i] for i in range(first, len(dealt))), iter(scores[len(mine) :])
        return [next(images if row.images else texts) for row in rows]

    def _score(self, rows: list[Row], top_k: int) -> list[TokenScores]:
        """Score rows here, in micro-batches."""
        groups = self._group(rows)
        alone: dict[tuple, list[int]] = {}
        for group in groups:
            if len(group) == 1:
                alone.setdefault(rows[group[0]].shapes, []).append(group[0])
        image_batches: list[list[int]] = []
        text_batches: list[list[int]] = []
        for shapes, items in alone.items():
            batches = image_batches if shapes else text_batches
            batches += select(items, cut([len(rows[i]) for i in items], self.tokens_per_batch))
        for group in groups:
            if len(group) > 1:
                completion_lengths = [len(rows[i].completion) for i in group]
                cuts = cut_shared(len(rows[group[0]].prompt), completion_lengths, self.tokens_per_batch)
                text_batches += select(group, cuts)
        if self.teacher.is_sharded:
            self._keep_pace(image_batches, text_batches)
        scores: dict[int, TokenScores] = {}
        if image_batches or text_batches:
            with self.teacher.placed():
                for batch in image_batches + text_batches:
                    scores |= zip(batch, self._score_batch([rows[i] for i in batch], top_k), strict=True)
        return [scores[i] for i in range(len(rows))]

    def _keep_pace(self, image_batches: list[list[int]], text_batches: list[list[int]]):
        """
        Add micro-batches until there are as many as on the busiest process, as a sharded teacher runs on all of them at
        once: without rows, or where its vision tower is to run, of the first row again.
        """
        counts = torch.tensor([[len(image_batches), len(text_batches)]], device=self.accelerator.device)
        counts = self.accelerator.gather(counts)
        if len((counts[:, 0] > 0).unique()) > 1:
            raise ValueError(
                "A sharded teacher runs its vision tower on all processes at once, but in this batch some of them have no "
                "completion with an image to score. Keep the teacher whole (`teacher_zero_stage=0`; under FSDP choose "
                "another launcher), or train on data of which every row has an image."
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

    def _is_known(self, ids):
        return ~torch.isin(ids, self.unknown_ids.to(ids.device))

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

    def _check(self, rows):
        longest = max(map(len, rows), default=0)
        if longest > self.teacher.max_length:
            raise ValueError(
                f"A rollout has {longest} tokens with its prompt, but the teacher {self.teacher.name} knows only "
                f"{self.teacher.max_length:.0f} positions. Lower `max_completion_length`, leave out longer prompts, choose a "
                f"`teacher_model` for longer texts or {self.teacher.length_remedy}."
            )
        highest = torch.cat([ids for row in rows for ids in (row.prompt, row.completion)]).max().item() if rows else 0
        if highest >= self.teacher.vocab_size:
            raise ValueError(
                f"A rollout has the token id {highest}, but the teacher's vocabulary has only {self.teacher.vocab_size} "
                "rows. Choose a `teacher_model` that knows it. If it is the student that emits it, "
                '`generation_kwargs={"suppress_tokens": [...]}` keeps it from doing so.'
            )


def cut_end(completion: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A completion up to the last token of the mask: a causal model needn't run what comes behind."""
    return completion[: mask.nonzero().max() + 1]


def select(items: list, batches: list[list[int]]) -> list[list]:
    return [[items[i] for i in batch] for batch in batches]
