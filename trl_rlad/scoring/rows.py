"""The rows that a teacher scores: a prompt and a completion, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch

from ..alignment import Alignment
from ..teachers import TokenContract


@dataclass
class Row:
    """One sequence for a teacher, on the CPU."""

    prompt: torch.Tensor  # (P,), int64, as the teacher is to read it
    completion: torch.Tensor  # (T,), int64
    images: dict[str, torch.Tensor] = field(default_factory=dict)  # see `split_images`
    alignment: Alignment | None = None  # with the student's tokens, if these are others

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def key(self) -> tuple:
        """What rows with the same scores have in common. A row with images is a row of its own."""
        return hash_ids(self.prompt), hash_ids(self.completion), id(self) if self.images else None

    @property
    def shapes(self) -> tuple:
        """What rows must agree on to run in one micro-batch; empty without images."""
        return tuple((name, value.shape[1:]) for name, value in self.images.items())


def hash_ids(ids: torch.Tensor) -> bytes:
    """Sixteen bytes that are the same in all processes, and others for other token ids."""
    return blake2b(ids.numpy().data, digest_size=16).digest()


def make_row(
    contract: TokenContract,
    prompt: Any,
    completion: torch.Tensor,
    wanted: torch.Tensor,
    images: dict[str, torch.Tensor] | None = None,
) -> Row | None:
    """
    The row in which a teacher scores the tokens `wanted`, bool of shape `(T,)`, of a completion; `None` if there are
    none that it can score.

    Args:
        contract ([`~trl_rlad.teachers.TokenContract`]), prompt, completion, wanted:
            What says how the teacher reads the row, and what its `read` takes.
        images (`dict[str, torch.Tensor]`, *optional*):
            See [`~trl_rlad._trl.names.split_images`].

    The completion ends with the last of these tokens, as a causal model needn't run what comes behind. With images it
    is whole, since their tensors cover all of it.
    """
    if not wanted.any():
        return None
    prompt, completion, wanted, alignment = contract.read(prompt, completion, wanted)
    if not wanted.any():
        return None
    return Row(prompt, completion if images else completion[: wanted.nonzero().max() + 1], images or {}, alignment)


def unpad(ids: torch.Tensor, mask: torch.Tensor) -> Sequence[torch.Tensor]:
    """The token ids of each row, on the CPU, of a padded batch `(B, L)`."""
    return [row[is_token] for row, is_token in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
