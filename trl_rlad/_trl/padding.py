"""Batches of rollouts: their rows put together anew, and cut to the widest of them."""

from collections.abc import Sequence
from typing import Any

import torch


# Tensors whose second dimension is none of the tokens
IMAGES = {
    "pixel_values",
    "pixel_attention_mask",
    "image_grid_thw",
    "image_position_ids",
    "image_sizes",
    "spatial_shapes",
}
# Tensors over the tokens of the prompt, and of both; all others of the right width are over those of the completion
PROMPTS = {"prompt_ids", "prompt_mask"}
SEQUENCES = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


def merge(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch with the rows of all `batches`, of tensors, lists with an item for each row, scalars and `None`."""
    merged: dict[str, Any] = {}
    for key, value in batches[0].items():
        values = [batch[key] for batch in batches]
        if isinstance(value, list):
            merged[key] = sum(values, [])
        else:
            merged[key] = torch.cat(values) if is_batched(value) else value
    return merged


def select(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The given rows of a batch, in their order."""

    def pick(value):
        if isinstance(value, list):
            return [value[row] for row in rows]
        return value[rows] if is_batched(value) else value

    return {key: pick(value) for key, value in batch.items()}


def is_batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def trim(batch: dict[str, Any], multiple: int = 1) -> dict[str, Any]:
    """
    Cut off the columns in which a batch has nothing but padding.

    Args:
        batch (`dict[str, Any]`):
            `prompt_mask` of shape `(B, P)`, padded on the left, `completion_mask` of shape `(B, T)`, padded on the
            right, and more tensors over the tokens of prompts, completions or both, with any dimensions behind. What
            else it holds is left as it is.
        multiple (`int`, *optional*, defaults to `1`):
            What the widths must be multiples of, as `P` and `T` are.
    """
    prompt_width, completion_width = batch["prompt_mask"].size(1), batch["completion_mask"].size(1)
    completion_lengths = batch["completion_mask"].sum(1)
    if batch.get("pixel_values") is not None:
        # A truncated completion that is masked out as a whole may hold the places of images
        completion_lengths[completion_lengths == 0] = completion_width
    prompt, completion = (
        -(-max(1, lengths.max().item()) // multiple) * multiple
        for lengths in (batch["prompt_mask"].sum(1), completion_lengths)
    )
    first, last = max(prompt_width - prompt, 0), prompt_width + completion

    def cut(key, value):
        if key in IMAGES or not isinstance(value, torch.Tensor) or value.ndim < 2:
            return value
        if key in PROMPTS:
            return value[:, first:]
        if key in SEQUENCES:
            return value[:, first:last]
        return value[:, :completion] if value.size(1) == completion_width else value

    return {key: cut(key, value) for key, value in batch.items()}
