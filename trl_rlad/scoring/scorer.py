"""From a padded rollout batch to its teachers' log-probabilities, and back."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from .._trl.names import split_images
from ..columns import IN_BATCH, number_teachers
from ..objective.teacher_kl import named_entropy
from ..teachers import Teacher, TokenScores
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
    def queued_rows(self) -> int:
        """Number of rows that had been sent off, but waited for a place in flight, when `score` was called last."""
        return sum(scorer.queued_rows for scorer in self.scorers.values())

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
        prompts: Sequence[Any],
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
            row = torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.bool)
            self._rows.append(make_row(self._contracts[number], prompt, *row))
        for scorer, mine in self._by_scorer(self._rows, self._numbers):
            scorer.begin(list(mine.values()), top_k)

    @contextmanager
    def score_early(self) -> Iterator[None]:
        """Score the rows of `begin` in a thread while the body of the context runs, and raise what the teacher raises
        when the body has ended. No process waits for another one meanwhile, since the body may: each scores its own
        rows, and a sharded teacher, which needs all processes, scores none."""
        with ExitStack() as stack:
            for scorer, mine in self._by_scorer(self._rows or [], self._numbers):
                stack.enter_context(scorer.score_early(list(mine.values()), self._top_k))
            yield

    def score(
        self,
        batch: dict[str, torch.Tensor],
        mask: torch.Tensor,
        top_k: int = 0,
        prompts: Sequence[Any] | None = None,
        teacher_ids: Sequence[str | None] | None = None,
        keeps_names: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """
        Args:
            batch (`dict[str, torch.Tensor]`):
                `prompt_ids` and `prompt_mask` of shape `(B, P)`, `completion_ids` and `completion_mask` of shape
                `(B, T)`, and what TRL adds to it for images.
            mask (`torch.Tensor` of shape `(B, T)`):
                Tokens for which the teacher's log-probability is wanted. Rows without any are not scored at all.
            top_k (`int`, *optional*, defaults to `0`):
                Number of the teacher's likeliest tokens to return beside each.
            prompts (`Sequence[Sequence[int] | str | list[dict] | None]`, *optional*):
                Each row's prompt as its teacher is to read it: token ids or, see `by_text`, text or messages. `None`,
                of a row or of all, takes the token ids of the batch. Not read after `begin`.
            teacher_ids (`Sequence[str | None]`, *optional*):
                Names of the rows' teachers. `None` for a single teacher.
            keeps_names (`torch.Tensor` of shape `(B,)`, *optional*):
                Rows of which the likeliest tokens are returned. `None` for all.

        Returns:
            `dict[str, torch.Tensor | list[torch.Tensor]]`:
                `teacher_mask`, bool, of shape `(B, T)`: the tokens that the teacher has scored, and
                `teacher_per_token_logps`, `float32`, of the same shape, in nats, zero elsewhere. With `top_k` also two
                lists with a tensor for each row, of shape `(N, k)` for the N tokens that are scored or `(0, k)`:
                `teacher_top_ids`, `int32`, and `teacher_top_logps`, `float32`, in nats, where a token that can't be
                named to the student has `-inf`; and `teacher_entropy`, `teacher_top1` and `teacher_named_mass`,
                `float32` of shape `(B, T)`: the entropy in nats of what is named, whether the sampled token is the
                likeliest, and how likely all that is named is. Of several teachers also `teacher_index`, `int64`, of
                shape `(B,)`. If one of them is given text, also `teacher_first`, `int64`, the place of the first
                token of each token's chunk, whose means `teacher_per_token_logps` then are, see
                [`~trl_rlad.alignment.spread`]; and `teacher_unaligned`, bool, the wanted tokens that are in none:
                both of shape `(B, T)`.

        Raises:
            `ValueError`: if a token id lies beyond the teacher's vocabulary, a row beyond its positions, or it can't
                read the images.
            `FloatingPointError`: if the teacher returns a log-probability that isn't finite.
        """
        ids = batch["completion_ids"]
        numbers = self._number(teacher_ids, len(ids))
        mask = mask.bool()
        for number, contract in enumerate(self._contracts):
            is_own = (numbers == number).to(ids.device).unsqueeze(1)
            mask = mask & (contract.is_known(ids) | ~is_own)
        rows = self._make_rows(batch, mask, prompts, numbers)
        result: dict[str, Any] = {}
        if any(contract.by_text for contract in self._contracts):
            known, first = _read_alignments(rows, mask)
            result = {"teacher_first": first, "teacher_unaligned": mask & ~known}
            mask = mask & known
        parts = self._by_scorer(rows, numbers)
        for scorer, mine in parts:  # by all processes, before one waits for another
            scorer.contract.check(list(mine.values()))

        self.calls += 1
        top_k = min(top_k, *(scorer.teacher.vocab_size for scorer in self.scorers.values()))
        logps = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        result |= {"teacher_per_token_logps": logps, "teacher_mask": mask}
        if top_k:
            result |= {
                "teacher_top_ids": [ids.new_empty(0, top_k, dtype=torch.int32)] * len(ids),
                "teacher_top_logps": [logps.new_empty(0, top_k)] * len(ids),
                "teacher_entropy": torch.zeros_like(logps),
                "teacher_top1": torch.zeros_like(logps),
                "teacher_named_mass": torch.zeros_like(logps),
            }
        keeps = [True] * len(ids) if keeps_names is None else keeps_names.tolist()
        with time_limit(self.timeout, f"call {self.calls} of TeacherScorer.score"):
            for scorer, mine in parts:
                places = list(mine)
                for equal, scores in scorer.score(list(mine.values()), top_k):
                    for i in (places[number] for number in equal):
                        self._put(result, i, ids[i], scores, scorer.contract, mine[i].alignment, keeps[i])
        logps.masked_fill_(~mask, 0.0)
        if not logps.isfinite().all():
            raise FloatingPointError(
                f"The teacher returned {(~logps.isfinite()).sum()} log-probabilities that are not finite, of "
                f"{mask.sum()}. Its weights may be damaged, or it overflows in float16: train with `bf16=True`, or "
                'load it with `teacher_model_init_kwargs={"dtype": "bfloat16"}`.'
            )
        return result if teacher_ids is None else result | {"teacher_index": numbers.to(ids.device)}

    @staticmethod
    def _put(result, i, ids, scores, contract, alignment, keeps_names):
        """Put the scores of row `i`, whose completion is `ids`, into `result`."""
        mask = result["teacher_mask"][i]
        if scores is None:  # behind a URL that doesn't answer
            mask[:] = False
            return
        k = result["teacher_top_ids"][i].size(1) if "teacher_top_ids" in result else 0
        named = (part[:, :k].to(ids.device) for part in (scores.top_ids, scores.top_logps))
        logps, named, named_logps = contract.to_student(TokenScores(scores.logps.to(ids.device), *named), alignment)
        length = len(logps)
        result["teacher_per_token_logps"][i, :length] = logps
        if not k:
            return
        result["teacher_entropy"][i, :length] = named_entropy(named_logps)
        result["teacher_top1"][i, :length] = ((named[:, 0] == ids[:length]) & named_logps[:, 0].isfinite()).float()
        result["teacher_named_mass"][i, :length] = named_logps.exp().sum(1)
        if keeps_names:
            result["teacher_top_ids"][i] = named[mask[:length]].int()
            result["teacher_top_logps"][i] = named_logps[mask[:length]]

    def _make_rows(self, batch, mask, prompts, numbers) -> list[Row | None]:
        """The row of each completion with wanted tokens: that of `begin`, if there is one."""
        begun, self._rows = self._rows, None
        images, wanted = split_images(batch), mask.cpu()
        if begun is not None and not any(images):
            return [row if is_wanted else None for row, is_wanted in zip(begun, wanted.any(1).tolist(), strict=True)]
        prompts = prompts or [None] * len(images)
        contracts = [self._contracts[number] for number in numbers.tolist()]
        if any(
            own is not None and image and not contract.by_text
            for own, image, contract in zip(prompts, images, contracts, strict=True)
        ):
            raise ValueError("A row with images can't have a `teacher_prompt`: its images belong to the prompt.")
        read = unpad(batch["prompt_ids"], batch["prompt_mask"])
        prompts = [ids if own is None else own for ids, own in zip(read, prompts, strict=True)]
        completions = unpad(batch["completion_ids"], batch["completion_mask"])
        return [
            make_row(contract, prompt, completion, of_row[: len(completion)], row_images)
            for contract, prompt, completion, of_row, row_images in zip(
                contracts, prompts, completions, wanted, images, strict=True
            )
        ]

    def by_text(self, teacher_ids: Sequence[str | None] | None, size: int) -> list[bool]:
        """Of each row, whether its teacher has another tokenizer and is given the text of its prompt."""
        return [self._contracts[number].by_text for number in self._number(teacher_ids, size).tolist()]

    def _number(self, teacher_ids, size) -> torch.Tensor:
        """The number of each row's teacher among `scorers`, `int64` of shape `(B,)`."""
        if teacher_ids is None:
            return torch.zeros(size, dtype=torch.long)
        return number_teachers(teacher_ids, self.scorers, IN_BATCH)

    def _by_scorer(self, rows, numbers) -> list[tuple[RowScorer, dict[int, Row]]]:
        """The rows of each scorer, by their places in the batch."""
        parts: list[dict[int, Row]] = [{} for _ in self.scorers]
        for place, (row, number) in enumerate(zip(rows, numbers.tolist(), strict=True)):
            if row is not None:
                parts[number][place] = row
        return list(zip(self.scorers.values(), parts, strict=True))


def _read_alignments(rows, mask):
    """Which tokens their teachers can score, bool, and the place of the first token of each one's chunk, `(B, T)`."""
    known, first = torch.zeros(mask.shape, dtype=torch.bool), torch.arange(mask.size(1)).repeat(len(mask), 1)
    for i, row in enumerate(rows):
        if row is not None and row.alignment is None:
            known[i] = True
        elif row is not None:
            length = len(row.alignment.student)
            known[i, :length], first[i, :length] = row.alignment.known, row.alignment.first
    return known.to(mask.device), first.to(mask.device)
