"""
Save the mini teacher with attention heads of 32 numbers instead of 16, of which vLLM's CPU kernels know nothing.

    python examples/mini/widen_heads.py outputs/teacher

It computes the same. The new numbers are zeros, put where a head's frequencies of rotation stay what they are: number
i of a half goes to 2i, as theta^(-2i/16) = theta^(-2(2i)/32).
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config


def widen_heads(model, head_dim: int = 32):
    """A Qwen3 with heads of `head_dim` numbers that computes what `model` does."""
    old = model.config.head_dim
    factor = head_dim // old
    half = factor * torch.arange(old // 2)
    place = torch.cat([half, head_dim // 2 + half])
    config = Qwen3Config(**{**model.config.to_dict(), "head_dim": head_dim})
    wide = type(model)(config)
    state = model.state_dict()
    for name, weight in state.items():
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows = weight.T if part == "o_proj" else weight
            new = rows.new_zeros(rows.size(0) // old, head_dim, rows.size(1))
            new[:, place] = rows.view(-1, old, rows.size(1))
            new = new.flatten(0, 1)
            state[name] = new.T if part == "o_proj" else new
        if part in ("q_norm", "k_norm"):
            state[name] = weight.new_zeros(head_dim).index_copy(0, place, weight)
        # A norm is a mean over more numbers now, and the product of query and key is divided by a larger root
        if part in ("q_proj", "k_proj"):
            state[name] = state[name] * factor**0.5
        if part == "k_norm":
            state[name] = state[name] / factor**0.5
    wide.load_state_dict(state)
    return wide


if __name__ == "__main__":
    teacher = Path(__file__).parent / "teacher"
    widen_heads(AutoModelForCausalLM.from_pretrained(teacher)).save_pretrained(sys.argv[1])
    AutoTokenizer.from_pretrained(teacher).save_pretrained(sys.argv[1])
