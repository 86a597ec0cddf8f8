"""What a teacher is."""

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin


class TokenScores(NamedTuple):
    """
    What a teacher makes of the tokens of one completion.

    Attributes:
        logps (`torch.Tensor` of shape `(T,)`, `float32`):
            Log-probability of each token, in nats.
        top_ids (`torch.Tensor` of shape `(T, k)`, `int64`):
            The k likeliest tokens in the place of each.
        top_logps (`torch.Tensor` of shape `(T, k)`, `float32`):
            Their log-probabilities, in nats.
    """

    logps: torch.Tensor
    top_ids: torch.Tensor
    top_logps: torch.Tensor


class Teacher(Protocol):
    """
    A frozen model that scores given tokens. It has one duty, and never hears of rewards, advantages or ratios.

    Attributes:
        name (`str`):
            Name of the model; of a local path, the last part.
        config ([`~transformers.PretrainedConfig`]):
            Its configuration.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its own tokenizer.
        vocab_size (`int`):
            Number of rows of its embedding.
        max_length (`float`):
            Number of tokens that it can read at once.
        is_sharded (`bool`):
            Whether a forward pass needs all processes at once, because each holds a part of the model.
        shares_prompts (`bool`):
            Whether completions of one prompt can run on one copy of its key-value cache.
        length_remedy (`str`):
            What else than another teacher helps where the rows are too long for it.
    """

    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_length: float
    is_sharded: bool
    shares_prompts: bool
    length_remedy: str

    def placed(self) -> AbstractContextManager:
        """A context in which it is where it scores."""

    def score(
        self,
        prompts: list[torch.Tensor],
        completions: list[torch.Tensor],
        top_k: int = 0,
        images: list[dict[str, torch.Tensor]] | None = None,
    ) -> list[TokenScores]:
        """Log-probabilities of the completions' tokens, and of the `top_k` likeliest in their place, in one
        micro-batch."""

    def find_image_problem(self, student: ProcessorMixin) -> str | None:
        """Why it can't read the images that the student's processor prepares, or `None` if it can."""

    def release(self):
        """Let the weights go."""
