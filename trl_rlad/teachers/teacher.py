"""What a teacher is."""

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin


class TokenScores(NamedTuple):
    """What a teacher makes of the `T` tokens of one completion."""

    logps: torch.Tensor  # (T,), float32: log-probability of each, in nats
    top_ids: torch.Tensor  # (T, k), int64: the k likeliest tokens in the place of each
    top_logps: torch.Tensor  # (T, k), float32: their log-probabilities, in nats


class Teacher(Protocol):
    """A model that scores given tokens. It has one duty, and never hears of rewards, advantages or ratios."""

    name: str  # of the model; of a local path, the last part
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: set[int]  # on which it ends its turn
    vocab_size: int  # number of rows of its embedding
    max_length: float  # number of tokens that it can read at once
    is_frozen: bool  # whether its weights stay as they are while the student trains
    is_sharded: bool  # whether each process holds a part of it, so that a forward pass needs all at once
    shares_prompts: bool  # whether completions of one prompt can run on one copy of its key-value cache
    length_remedy: str  # what else than another teacher helps where rows are too long

    @property
    def mixes_rows(self) -> bool:
        """Whether rows of other prompts and lengths can run beside each other."""

    def placed(self) -> AbstractContextManager:
        """A context in which it is where it scores."""

    def score(
        self,
        prompts: list[torch.Tensor],
        completions: list[torch.Tensor],
        top_k: int = 0,
        images: list[dict[str, torch.Tensor]] | None = None,
    ) -> list[TokenScores]:
        """
        Score completions in one micro-batch.

        Args:
            prompts, completions (`list[torch.Tensor]`):
                Token ids of each row, unpadded, `int64`, on the CPU.
            top_k (`int`, *optional*, defaults to `0`):
                Number of the likeliest tokens to name.
            images (`list[dict[str, torch.Tensor]]`, *optional*):
                What the model is given beside the tokens of each row, see [`~trl_rlad._trl.names.split_images`].
                Either all rows have images or none.

        Returns:
            `list[TokenScores]`: one for each completion.
        """

    def find_image_problem(self, student: ProcessorMixin) -> str | None:
        """Why it can't read the images that the student's processor prepares, or `None` if it can."""

    def release(self):
        """Let the weights go."""
