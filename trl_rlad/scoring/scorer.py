"""From a padded rollout batch to its teachers' log-probabilities, and back."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from transformers import TrainerCallback

from .._trl.names import split_images
from ..columns import IN_BATCH, number_teachers
from ..teachers import Teacher
from .row_scorer import RowScorer
from .rows import Row, make_row, unpad
from .watchdog import barrier_group, time_limit


class TeacherScorer(TrainerCallback):
    """
    Scores each rollout batch, once, each row with its own teacher, and lets the teachers go when training has ended.

    A [`~transformers.TrainerCallback`] never sees the rollouts: [`TeacherGuide`] calls `begin`, `score_early` and
    `score`.

    Args:
        scorers (`dict[str, RowScorer]`):
            A scorer for each teacher, by the name that rows have in the dataset's column `teacher_id`. A single
            teacher's name is empty.
        timeout (`float`, *optional*, defaults to `1800.0`):
            Seconds within which all processes must have scored a rollout batch.

    Attributes:
        calls (`int`):
            Number of calls of `score`.
    """

    def __init__(self, scorers: dict[str, RowScorer], timeout: float = 1800.0):
        self.scorers, self.timeout = scorers, timeout
        self._contracts = [scorer.contract for scorer in scorers.values()]
        self.calls, self.has_trained = 0, False
        # The rows that `begin` has made for the next call of `score`, by their place in the batch
        self._rows: list[Row | None] | None = None
        self._numbers, self._top_k = torch.zeros(0, dtype=torch.long), 0
        barrier_group()

    @property
    def teachers(self) -> dict[str, Teacher]:
        """The teachers by name."""
        return {name: scorer.teacher for name, scorer in self.scorers.items()}

    @property
    def seconds(self) -> float:
        """Time that the teachers took in the last call of `score`, and the wait for early scores with it."""
        return sum(scorer.seconds for scorer in self.scorers.values())

    @property
    def failed_rows(self) -> int:
        """Number of rows of the last call of `score` to which a teacher has had no answer."""
        return sum(scorer.failed_rows for scorer in self.scorers.values())

    @property
    def has_begun(self) -> bool:
        """Whether the rows for the next call of `score` are there already."""
        return self._rows is not None

    def release(self):
        """Let the weights of all teachers go."""
        for scorer in self.scorers.values():
            scorer.release()

    def on_train_begin(self, args, state, control, **kwargs):
        self.has_trained = False

    def on_train_end(self, args, state, control, **kwargs):
        self.has_trained = True
        self.release()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.has_trained:
            self.release()

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]],
        top_k: int = 0,
        teacher_ids: Sequence[str | None] | None = None,
    ):
        """Make the rows for the next call of `score`, whose arguments these are, and send off those of teachers behind
        a URL. `masks` have 1 at each token of the completions whose log-probability may be wanted."""
        self._numbers, self._top_k = self._number(teacher_ids, len(prompts)), top_k
        self._rows = []
        for prompt, ids, mask, number in zip(prompts, completions, masks, self._numbers.tolist(), strict=True):
            completion = torch.tensor(ids, dtype=torch.long)
            wanted = torch.tensor(mask, dtype=torch.bool) & self._contracts[number].is_known(completion)
            self._rows.append(make_row(torch.tensor(prompt, dtype=torch.long), completion, wanted))
        for scorer, rows in self._by_scorer(self._rows, self._numbers):
            scorer.begin(rows, top_k)

    @contextmanager
    def score_early(self) -> Iterator[None]:
        """Score the rows of `begin` in a thread while the body of the context runs, and raise what the teacher raises
        when the body has ended. No process waits for another one meanwhile, since the body may: each scores its own
        rows, and a sharded teacher, which needs all processes, scores none."""
        with ExitStack() as stack:
            for scorer, rows in self._by_scorer(self._rows or [], self._numbers):
                stack.enter_context(scorer.score_early(rows, self._top_k))
            yield

    def score(
        self,
        batch: dict[str, torch.Tensor],
        mask: torch.Tensor,
        top_k: int = 0,
        prompts: Sequence[Sequence[int] | None] | None = None,
        teacher_ids: Sequence[str | None] | None = None,
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
            prompts (`Sequence[Sequence[int] | None]`, *optional*):
                Token ids of each row's prompt as its teacher is to read it. `None`, of a row or of all, takes those of
                the batch. Not read after `begin`.
            teacher_ids (`Sequence[str | None]`, *optional*):
                Names of the rows' teachers. `None` for a single teacher.

        Returns:
            `dict[str, torch.Tensor]`:
                `teacher_mask`, bool, of shape `(B, T)`: the tokens that the teacher has scored, and
                `teacher_per_token_logps`, `float32`, of the same shape, in nats, zero elsewhere. With `top_k` also
                `teacher_top_ids`, `int64`, and `teacher_top_logps`, `float32`, in nats, of shape `(B, T, k)`; a token
                that can't be named to the student has the log-probability `-inf`. Of several teachers also
                `teacher_index`, `int64`, of shape `(B,)`.

        Raises:
            `ValueError`: if a token id lies beyond the teacher's vocabulary, a row beyond its positions, or it can't
                read the images.
            `FloatingPointError`: if the teacher returns a log-probability that isn't finite.
        """
        ids = batch["completion_ids"]
        numbers = self._number(teacher_ids, len(ids))
        mask = mask.bool()
        for number, contract in enumerate(self._contracts):
            mine = (numbers == number).to(ids.device).unsqueeze(1)
            mask = mask & (contract.is_known(ids) | ~mine)
        rows = self._make_rows(batch, mask, prompts)
        parts = self._by_scorer(rows, numbers)
        for scorer, of_scorer in parts:  # by all processes, before one waits for another
            scorer.contract.check(of_scorer)

        self.calls += 1
        with time_limit(self.timeout, f"call {self.calls} of TeacherScorer.score"):
            scores = [iter(scorer.score(of_scorer, top_k)) for scorer, of_scorer in parts]
        result = self._pad(ids, mask, rows, numbers.tolist(), scores, top_k)
        return result if teacher_ids is None else result | {"teacher_index": numbers.to(ids.device)}

    def _make_rows(self, batch, mask, prompts) -> list[Row | None]:
        """The row of each completion with wanted tokens: that of `begin`, if there is one."""
        begun, self._rows = self._rows, None
        images, wanted = split_images(batch), mask.cpu()
        if begun is not None and not any(images):
            return [row if is_wanted else None for row, is_wanted in zip(begun, wanted.any(1).tolist(), strict=True)]
        prompts = prompts or [None] * len(images)
        if any(own is not None and image for own, image in zip(prompts, images, strict=True)):
            raise ValueError("A row with images can't have a `teacher_prompt`: its images belong to the prompt.")
        read = unpad(batch["prompt_ids"], batch["prompt_mask"])
        prompts = [ids if own is None else torch.tensor(own) for ids, own in zip(read, prompts, strict=True)]
        completions = unpad(batch["completion_ids"], batch["completion_mask"])
        return [
            make_row(prompt, completion, of_row[: len(completion)], row_images)
            for prompt, completion, of_row, row_images in zip(prompts, completions, wanted, images, strict=True)
        ]

    def _pad(self, ids, mask, rows, numbers, scores, top_k) -> dict[str, torch.Tensor]:
        """What `score` returns, given for each of `scorers` an iterator over the scores of its rows."""
        top_k = min(top_k, *(scorer.teacher.vocab_size for scorer in self.scorers.values()))
        logps = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        top_ids = ids.new_zeros(*ids.shape, top_k)
        top_logps = logps.new_full(top_ids.shape, -float("inf"))
        for i, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            if row is None:
                continue
            score = next(scores[number])
            if score is None:  # behind a URL that doesn't answer
                mask[i] = False
                continue
            length = len(score.logps)
            logps[i, :length] = score.logps
            named, named_logps = score.top_ids[:, :top_k], score.top_logps[:, :top_k]
            can_be_named = self._contracts[number].can_be_named(named)
            top_ids[i, :length] = named.where(can_be_named, 0)
            top_logps[i, :length] = named_logps.masked_fill(~can_be_named, -float("inf"))
        logps = torch.where(mask, logps, 0.0)
        if not logps.isfinite().all():
            raise FloatingPointError(
                f"The teacher returned {(~logps.isfinite()).sum()} log-probabilities that are not finite, of "
                f"{mask.sum()}. Its weights may be damaged, or it overflows in float16: train with `bf16=True`, or "
                'load it with `teacher_model_init_kwargs={"dtype": "bfloat16"}`.'
            )
        result = {"teacher_per_token_logps": logps, "teacher_mask": mask}
        return result | ({"teacher_top_ids": top_ids, "teacher_top_logps": top_logps} if top_k else {})

    def _number(self, teacher_ids, size) -> torch.Tensor:
        """The number of each row's teacher among `scorers`, `int64` of shape `(B,)`."""
        if teacher_ids is None:
            return torch.zeros(size, dtype=torch.long)
        return number_teachers(teacher_ids, self.scorers, IN_BATCH)

    def _by_scorer(self, rows, numbers) -> list[tuple[RowScorer, list[Row]]]:
        """The rows of each scorer, in their order."""
        return [
            (
                scorer,
                [
                    row
                    for row, mine in zip(rows, (numbers == number).tolist(), strict=True)
                    if mine and row is not None
                ],
            )
            for number, scorer in enumerate(self.scorers.values())
        ]
