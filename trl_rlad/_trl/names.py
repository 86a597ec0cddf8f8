"""TRL's functions and conventions that the library uses and that TRL may move."""

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.integrations import is_wandb_available
from trl.models import prepare_fsdp
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    get_comet_experiment_url,
    get_config_model_id,
    get_trackio_space_url,
    is_async_callable,
    split_pixel_values_by_grid,
    unsplit_pixel_values_by_grid,
    use_adapter,
)
from trl.trainer.utils import maybe_gather_lm_head_ctx as gather_lm_head

from .padding import IMAGES


# The loss types that clip the ratio, for which TRL logs `clip_ratio/*`
CLIPPED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def logit_scale(text_config: PretrainedConfig) -> float:
    """What a model of this configuration multiplies its logits by, as TRL's fused LM head reads it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text_config, name, None) is not None:
            return getattr(text_config, name)
    scaling = getattr(text_config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if text_config.model_type == "hyperclovax" else 1 / scaling


def run_links() -> dict[str, str]:
    """Where the run that is being logged can be looked at, by the name of the service."""
    links = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        links["Weights & Biases"] = wandb.run and wandb.run.url
    return {name: url for name, url in links.items() if url}


# What TRL hands to a vision-language model beside the tokens
IMAGE_INPUTS = IMAGES | {"token_type_ids", "mm_token_type_ids"}


def split_images(batch: dict) -> list[dict[str, torch.Tensor]]:
    """
    What each row of a batch hands to a vision-language model beside its tokens, on the CPU.

    Rows whose tensors have the same shapes but for the first dimension are put together by concatenation. The token
    types, of one dimension, are those of the row's own tokens, without padding. A row without images has nothing.
    """
    num_images = batch.get("num_images") or [0] * len(batch["prompt_ids"])
    is_token = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).bool()
    inputs = {name: value for name, value in split_pixel_values_by_grid(batch).items() if name in IMAGE_INPUTS}

    def take(name, row):
        if name.endswith("token_type_ids"):
            return inputs[name][row][is_token[row]].cpu()
        # A list has the images of each row; a tensor, all rows' images, padded to the same number
        return inputs[name][row if isinstance(inputs[name], list) else slice(row, row + 1)].cpu()

    return [{name: take(name, row) for name in inputs} if count else {} for row, count in enumerate(num_images)]


def loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """Tokens that enter the loss, `(B, T)`: neither padding nor written by a tool."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask
