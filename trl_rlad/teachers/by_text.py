"""A teacher with another tokenizer than the student's: it reads the text, in its own tokens and chat format."""

from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..alignment import Alignment, Pieces, align, find_ends, join_pieces
from .contract import TokenContract, text_of
from .teacher import Teacher, TokenScores


logger = get_logger(__name__)

# Share of the wanted tokens of a generation batch, and of a dataset's prompts, for which a teacher may have no score
MAX_UNALIGNED = 0.5
PROMPTS_TO_ALIGN = 100


class TextContract(TokenContract):
    """
    What a teacher with a tokenizer of its own reads of a student's prompts and completions, and names to it.

    Prompts are given as text or messages. A completion's text is cut into the smallest chunks on whose ends both
    tokenizers agree. A chunk with a special token in it, with bytes that are no UTF-8 or with text that the teacher's
    tokenizer changes has no scores. Ends of turn are each other's, whatever they are called.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]), eos_token_ids (`Collection[int]`):
            The student's, and the ids that end its completions.
        teacher ([`Teacher`]):
            The teacher.
        tools (`list[Callable]`, *optional*), chat_template_kwargs (`dict[str, Any]`, *optional*):
            What chat templates are given beside the messages.

    Raises:
        `ValueError`: if one of the tokenizers doesn't say what its tokens stand for.
    """

    by_text = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher: Teacher,
        eos_token_ids: Collection[int],
        tools: list[Callable] | None = None,
        chat_template_kwargs: Any = None,
    ):
        self.student = read_pieces("The student's", tokenizer)
        self.pieces = read_pieces("The teacher's", teacher.tokenizer)
        logger.warning(
            f"The tokenizer of the teacher {teacher.name} isn't the student's, so it is given the text of prompts and "
            "completions. What it makes of a piece of text is shared by the student's tokens in it."
        )
        super().__init__(teacher, image_problem="its tokenizer isn't the student's")
        self.template_kwargs = {"tools": tools or None, **(chat_template_kwargs or {})}
        self.student_ends, self.end = set(eos_token_ids), self.find_end(teacher.tokenizer, teacher.eos_token_ids)
        by_piece = {piece: id for id, piece in enumerate(self.student.by_id) if id not in self.student.special_ids}
        own = {piece: id for id, piece in enumerate(self.pieces.by_id) if id not in self.pieces.special_ids}
        pairs = {own[piece]: by_piece[piece] for piece in own.keys() & by_piece.keys() - {b""}}
        student_end = self.find_end(tokenizer, self.student_ends)
        if self.end is not None and student_end is not None:
            pairs[self.end] = student_end
        size = max(teacher.vocab_size, len(self.pieces.by_id))
        self.student_ids = torch.full((size,), -1)  # of the tokens that are one token of the student's
        for id, student_id in pairs.items():
            self.student_ids[id] = student_id

    def find_end(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> int | None:
        """Of the ids on which a model ends its turn, the one that its chat template has behind an answer, or its
        tokenizer's own."""
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
            if found := [id for id in self.render(tokenizer, chat) if id in ends]:
                return found[-1]
        return tokenizer.eos_token_id if tokenizer.eos_token_id in ends else next(iter(sorted(ends)), None)

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[dict], **kwargs) -> list[int]:
        """Token ids of messages. Raises a `ValueError` if the chat template can't make anything of them."""
        messages = [{**message, "content": text_of(message.get("content"))} for message in messages]
        try:
            rendered: Any = tokenizer.apply_chat_template(messages, return_dict=True, **self.template_kwargs, **kwargs)
            return rendered["input_ids"]
        except Exception as error:  # Jinja's, and what each template raises
            whose = f"The teacher {self.teacher.name}'s" if tokenizer is self.teacher.tokenizer else "The student's"
            raise ValueError(
                f"{whose} chat template can't render the messages of a prompt: {error}. Choose "
                "a `teacher_model` with a chat template for such messages, or prompts of text."
            ) from error

    def read_prompt(self, prompt: str | list[dict]) -> list[int]:
        """The teacher's token ids of a prompt."""
        tokenizer: Any = self.teacher.tokenizer
        if isinstance(prompt, str):
            return tokenizer(prompt)["input_ids"]
        return self.render(tokenizer, prompt, add_generation_prompt=True)

    def read(self, prompt: str | list[dict], completion: torch.Tensor, wanted: torch.Tensor):
        """As that of any contract, but for the prompt, which is text or messages."""
        ids, alignment = self.align(completion.tolist(), not isinstance(prompt, str))
        alignment = alignment.without(alignment.student[~wanted])
        is_needed = alignment.teacher < alignment.size
        return torch.tensor(self.read_prompt(prompt), dtype=torch.long), ids, is_needed, alignment

    def align(self, completion: Sequence[int], is_chat: bool) -> tuple[torch.Tensor, Alignment]:
        """The teacher's token ids of a completion, and which of them belong to which of the student's."""
        student, teacher = self.student, self.pieces
        has_end = len(completion) > 0 and completion[-1] in self.student_ends
        pieces, fits = student.read(completion[:-1] if has_end else completion)
        if is_chat and student.adds_space and pieces:
            pieces[0] = pieces[0].removeprefix(b" ")  # which belongs to the student's chat format
        text, ends, known = join_pieces(pieces, fits)
        if teacher.adds_space and text and (is_chat or not text.startswith(" ")):
            text, ends = " " + text, ends + 1
            known[:1] &= is_chat  # where it is this tokenizer's way to begin
        own, own_ends = teacher.encode(text[1:] if teacher.adds_space else text)
        own_pieces, own_fits = teacher.read(own)
        own_ends, own_known = find_ends(text, own_pieces, own_fits, [end + teacher.adds_space for end in own_ends])
        known &= ends <= own_ends.max(initial=0)
        if has_end:  # behind all of the text
            length = len(text.encode()) + 1
            ends, known = np.append(ends, length), np.append(known, True)
            if self.end is not None:
                own, own_ends, own_known = [*own, self.end], np.append(own_ends, length), np.append(own_known, True)
        alignment = align(*map(torch.from_numpy, (ends, own_ends, known, own_known)))
        starts_alike = not is_chat or teacher.adds_space == student.adds_space
        return torch.tensor(own, dtype=torch.long), alignment._replace(starts_alike=starts_alike)

    def to_student(self, scores: TokenScores, alignment: Alignment | None) -> TokenScores:
        """The scores in the student's tokens: the mean of each chunk, and at its first token what is, as text, one
        token of the student's."""
        assert alignment is not None
        ids = self.student_ids.to(scores.top_ids.device)[scores.top_ids]
        top_logps = scores.top_logps.masked_fill(ids < 0, -float("inf"))
        return TokenScores(
            alignment.to_student(scores.logps),
            alignment.named(ids.clamp(min=0), 0),
            alignment.named(top_logps, -float("inf")),
        )

    def check_dataset(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, max_completion_length: int | None):
        """As that of any contract, by the teacher's tokens. Also raises a `ValueError` if the teacher's chat template
        can't render prompts, or its tokenizer changes their text."""
        super().check_dataset(dataset, self.teacher.tokenizer, max_completion_length)
        unaligned = total = 0
        columns = {"prompt", "teacher_prompt"} & set(getattr(dataset, "column_names", None) or ())
        rows = dataset.select_columns(sorted(columns)) if isinstance(dataset, Dataset) else ()
        for row in islice(rows, PROMPTS_TO_ALIGN):
            for prompt in filter(None, row.values()):
                self.read_prompt(prompt)
                text = prompt if isinstance(prompt, str) else " ".join(text_of(m.get("content")) for m in prompt)
                if ids := tokenizer(text, add_special_tokens=False)["input_ids"]:
                    known = self.align(ids, is_chat=True)[1].known
                    unaligned, total = unaligned + int((~known).sum()), total + len(known)
        if unaligned > MAX_UNALIGNED * total:
            raise ValueError(unaligned_message(unaligned / total, "the dataset's prompts"))


def read_pieces(whose: str, tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """What the tokens of a tokenizer stand for. Raises a `ValueError` if it doesn't say so."""
    try:
        return Pieces(tokenizer)
    except ValueError as error:
        raise ValueError(
            "`teacher_model` reads the student's token ids differently, so it has to be given the text. "
            f"{whose} tokenizer, a `{type(tokenizer).__name__}`, {error}. Convert it, or choose a `teacher_model` "
            "that shares the student's tokenizer."
        ) from error


def unaligned_message(share: float, where: str) -> str:
    """Why there is no training with a teacher that leaves out a share of the tokens."""
    return (
        f"A teacher with another tokenizer has no score for {share:.0%} of the student's tokens in {where}: they are "
        "special tokens or no UTF-8, or the text doesn't survive being encoded and decoded by its tokenizer. Choose a "
        "`teacher_model` whose tokenizer keeps the text as it is, or that shares the student's."
    )
