"""Two tokenizers on one text: the chunks on whose ends both agree, and the log-probabilities of these. Pure."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of a byte that is none


class Pieces:
    """
    What the tokens of a tokenizer stand for, as bytes of text behind other text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A fast one.

    Raises:
        `ValueError`: if it doesn't say what its tokens stand for. The message goes on behind its name.

    Attributes:
        by_id (`list[bytes]`):
            The piece of each token. Not all of them are UTF-8, as a token may end within a character.
        special_ids (`set[int]`):
            Tokens that stand for no text.
        adds_space (`bool`):
            Whether it puts a space before a text, as SentencePiece may.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            raise ValueError("doesn't say where in a text its tokens end, as a fast one (with a tokenizer.json) does")
        self.tokenizer, backend, added = tokenizer, tokenizer.backend_tokenizer, tokenizer.added_tokens_decoder
        tokens = {id: token for token, id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])}
        self.special_ids = {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
        decoder = backend.decoder.__getstate__() if backend.decoder else b""
        is_byte_level, has_bytes = b"ByteLevel" in decoder, b"ByteFallback" in decoder
        to_byte = {char: bytes([byte]) for byte, char in bytes_to_unicode().items()}
        pieces, decoded = dict.fromkeys(range(max(tokens) + 1), b""), []
        for id, token in tokens.items():
            if id in self.special_ids or is_byte_level and id in added:
                pieces[id] = token.encode()
            elif is_byte_level:  # what isn't in these letters stands for itself
                pieces[id] = b"".join(to_byte.get(char, char.encode()) for char in token)
            elif has_bytes and (byte := BYTE_TOKEN.fullmatch(token)):
                pieces[id] = bytes.fromhex(byte[1])
            else:
                decoded.append(id)
        # Behind a token that is the same at the beginning of a text
        first, start = next((id, text) for id in tokens if (text := backend.decode([id])).isalnum())
        texts = backend.decode_batch([[first, id] for id in decoded], skip_special_tokens=False)
        texts = [text.removeprefix(start) for text in texts]
        if backend.decode([first, *decoded], skip_special_tokens=False) != "".join([start, *texts]):
            raise ValueError("has tokens whose text depends on what comes behind them")
        pieces |= {id: text.encode() for id, text in zip(decoded, texts, strict=True)}
        self.by_id = list(pieces.values())
        self.adds_space = b"".join(self.read(self.encode(start)[0])[0]).startswith(b" ")

    def read(self, ids: Sequence[int]) -> tuple[list[bytes], list[bool]]:
        """The pieces of tokens, nothing for ids beyond the vocabulary, and which of them are text."""
        pieces = [self.by_id[id] if id < len(self.by_id) else b"" for id in ids]
        return pieces, [piece != b"" and id not in self.special_ids for id, piece in zip(ids, pieces, strict=True)]

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text, and where in it, in characters, the tokenizer says that they end."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoding["input_ids"], [end for _, end in encoding["offset_mapping"]]


class Alignment(NamedTuple):
    """The tokens of a student and of a teacher on one text, each by the number of its chunk. Those that are in none of
    the `size` chunks have the number `size`."""

    student: torch.Tensor  # (T,), int64
    teacher: torch.Tensor  # (S,), int64
    size: int
    starts_alike: bool = True  # whether a piece means the same to both at the beginning, see `Pieces.adds_space`

    @property
    def known(self) -> torch.Tensor:
        """Which of the student's tokens are in a chunk, bool `(T,)`."""
        return self.student < self.size

    @property
    def first(self) -> torch.Tensor:
        """The place of the first token of each student's token's chunk, `int64` `(T,)`. Those in none have the first
        of these."""
        return first_of(self.student, self.size)[self.student]

    def without(self, bad: torch.Tensor) -> "Alignment":
        """Without the chunks of these numbers, `int64`."""
        kept = torch.ones(self.size + 1, dtype=torch.bool)
        kept[bad] = kept[self.size] = False
        numbers = (kept.cumsum(0) - 1).where(kept, kept.sum())
        return self._replace(student=numbers[self.student], teacher=numbers[self.teacher], size=int(kept.sum()))

    def to_student(self, logps: torch.Tensor) -> torch.Tensor:
        """The mean over the student's tokens of each chunk of its log-probability, `(T,)`, by those of the teacher's
        tokens `(S,)`, whose last ones may be missing. 0 for a token in no chunk."""
        numbers = self.teacher[: len(logps)].to(logps.device)
        sums = logps.new_zeros(self.size + 1, dtype=torch.float64).index_add_(0, numbers, logps.double())
        sums[self.size] = 0.0
        student = self.student.to(logps.device)
        counts = student.bincount(minlength=self.size + 1).clamp(min=1)
        return (sums / counts)[student].to(logps.dtype)

    def named(self, values: torch.Tensor, otherwise: float) -> torch.Tensor:
        """What the teacher names in the place of each student's token `(T, k)`, by its own `(S, k)`: at the first of
        a chunk that is one token of the teacher's, and `otherwise` elsewhere. In a chunk of several it goes on behind
        the first, where the student may have a longer token."""
        result = values.new_full((len(self.student), values.size(1)), otherwise)
        places, own = (first_of(numbers, self.size)[:-1] for numbers in (self.student, self.teacher))
        is_named = self.teacher.bincount(minlength=self.size + 1)[:-1] == 1
        is_named &= (places > 0) | self.starts_alike
        result[places[is_named]] = values[own[is_named]]
        return result


def first_of(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """The place of the first token of each chunk, and of those that are in none, `int64` `(size + 1,)`."""
    places = torch.arange(len(numbers), device=numbers.device)
    return places.new_full((size + 1,), len(places)).scatter_reduce_(0, numbers, places, "amin")


def align(
    student_ends: torch.Tensor, teacher_ends: torch.Tensor, student_fits: torch.Tensor, teacher_fits: torch.Tensor
) -> Alignment:
    """
    Cut a text into the smallest chunks on whose ends both tokenizers agree.

    Args:
        student_ends (`torch.Tensor` of shape `(T,)`), teacher_ends (`torch.Tensor` of shape `(S,)`):
            Where each token ends in the text, ascending, `int64`.
        student_fits, teacher_fits (`torch.Tensor` of the same shapes):
            Which tokens stand for their part of the text, bool. A chunk with one that doesn't is left out.
    """
    ends = student_ends[torch.isin(student_ends, teacher_ends)].unique()
    student, teacher = torch.searchsorted(ends, student_ends), torch.searchsorted(ends, teacher_ends)
    # What stands for no text at all spoils no chunk
    is_empty = student_ends.diff(prepend=student_ends.new_zeros(1)) == 0
    student[is_empty & ~student_fits] = len(ends)
    return Alignment(student, teacher, len(ends)).without(torch.cat([student[~student_fits], teacher[~teacher_fits]]))


def join_pieces(pieces: Sequence[bytes], fits: Sequence[bool]) -> tuple[str, np.ndarray, np.ndarray]:
    """The text of pieces without what is no UTF-8, where in it each ends, in bytes, and which of those that fit are
    whole, bool."""
    ends, known = np.cumsum([*map(len, pieces)], dtype=np.int64), np.array(fits, dtype=bool)
    text = b"".join(pieces).decode(errors="surrogateescape")
    lost = [len(text[: each.start()].encode(errors="surrogateescape")) for each in NOT_UTF8.finditer(text)]
    counts = np.searchsorted(lost, ends)
    return NOT_UTF8.sub("", text), ends - counts, known & (np.diff(counts, prepend=0) == 0)


def find_ends(
    text: str, pieces: Sequence[bytes], fits: Sequence[bool], ends: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where pieces end in a text, in bytes: by their own, and by `ends`, in characters, behind one that isn't what is
    there (a letter in another case, say). Also which of those that fit are what is there, bool."""
    data, position, found, are_there = text.encode(), 0, [], []
    for piece, end in zip(pieces, ends, strict=True):
        are_there.append(data.startswith(piece, position))
        position = position + len(piece) if are_there[-1] else max(position, len(text[:end].encode()))
        found.append(position)
    return np.array(found, dtype=np.int64), np.array(are_there, dtype=bool) & np.array(fits, dtype=bool)


def spread(means: torch.Tensor, old: torch.Tensor, first: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The teacher's log-probabilities of the student's tokens, each as far from the old policy's as the others of its
    chunk: `old + (L - sum of old) / n`, where `L` is that of the chunk of `n` tokens (of chunks as in
    [ALM](https://huggingface.co/papers/2503.20083)).

    Args:
        means (`torch.Tensor` of shape `(B, T)`, floating point):
            `L / n` at each token, see [`Alignment.to_student`].
        old (`torch.Tensor` of shape `(B, T)`, same dtype):
            Log-probabilities, in nats, under the old policy.
        first (`torch.Tensor` of shape `(B, T)`, `int64`):
            The place of the first token of each token's chunk.
        mask (`torch.Tensor` of shape `(B, T)`, bool):
            Tokens that are in a chunk.

    Returns:
        `torch.Tensor` of shape `(B, T)`: `means` itself where `n` is 1.
    """
    sums, counts = (
        torch.zeros_like(old).scatter_add_(1, first, x.where(mask, 0.0)) for x in (old, old.new_ones(old.shape))
    )
    return means + (old - (sums / counts.clamp(min=1.0)).gather(1, first)).where(mask, 0.0)
