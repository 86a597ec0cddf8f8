"""What is tried on a model before anything relies on it. The model's own plain forward pass is the reference."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedModel


def made_up_tokens(length: int, config: PretrainedConfig) -> torch.Tensor:
    """Token ids `(length,)`, `int64`, no two alike where the vocabulary is large enough."""
    return torch.arange(1, length + 1) * 7919 % config.get_text_config().vocab_size


def tolerance(model: PreTrainedModel, accelerator: Accelerator) -> float:
    """
    By how much, in nats and in the mean, log-probabilities may differ and be the same but for rounding.

    Rounding makes 1e-6 in float32, and some hundredths in 16 bits. A lost prompt, another rotary embedding or another
    head make about 1.
    """
    is_exact = model.dtype == torch.float32 and accelerator.mixed_precision == "no"
    return 1e-3 if is_exact and not getattr(model, "is_quantized", False) else 0.15


def rotary_embeddings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The parameters of a model's rotary embeddings: one, one for each kind of layer, or none."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict) and "rope_type" in each]


def longest_input(config: PretrainedConfig) -> float:
    """
    Number of tokens that a model can read at once, by its positions and what stretches them.

    Dynamic NTK stretches none: in transformers it remembers the longest pass so far, so that beyond the model's
    positions the log-probabilities of a row depend on the rows before it.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or -1
    longest = longest if longest > 0 else float("inf")
    for rope in rotary_embeddings(config):
        if rope["rope_type"] != "dynamic":
            longest = max(longest, (rope.get("original_max_position_embeddings") or 0) * rope.get("factor", 1.0))
    return longest


@torch.no_grad()
def rotates_by_length(
    forward: Callable, config: PretrainedConfig, longest: float, tolerance: float, device: torch.device
) -> bool:
    """
    Whether a model's rotary embedding depends on the length of the pass, as longrope and dynamic NTK do.

    What such a model makes of a row depends on the longer rows and the padding beside it. A token at a far position
    shows it without a long pass: in a causal model it should change nothing that comes before it.

    Args:
        forward (`Callable`), config ([`~transformers.PretrainedConfig`]):
            The forward pass and the configuration of a causal language model.
        longest (`float`):
            Number of tokens that it is to read at most.
        tolerance (`float`):
            In nats, see [`tolerance`].
        device (`torch.device`):
            Where the model runs.
    """
    ropes = [rope for rope in rotary_embeddings(config) if rope["rope_type"] != "default"]
    if not ropes:
        return False
    limit = config.get_text_config().max_position_embeddings
    near = min([limit, *(rope.get("original_max_position_embeddings") or limit for rope in ropes)])
    tokens = made_up_tokens(9, config)[None].to(device)
    positions = torch.arange(9, device=device)[None] * max(1, near // 18)
    seen, far = [], int(min(4 * limit, longest)) - 1
    for last in (far, positions[0, -1].item()):  # the near one behind: dynamic NTK remembers the far one until then
        positions[0, -1] = last
        # Without a mask, transformers takes gaps in the positions for the beginning of another text
        outputs = forward(input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=positions)
        seen.append(outputs.logits[:, :-1].float().log_softmax(-1))
    return not (seen[0] - seen[1]).abs().mean() <= tolerance
