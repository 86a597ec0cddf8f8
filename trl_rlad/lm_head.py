"""The LM head on hidden states that are known already: the likeliest tokens of a teacher, and chosen tokens of a
student."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ._trl.names import gather_lm_head, logit_scale


# Elements of the logits, or of the rows of the LM head, that are held at once
CHUNK_SIZE = 2**24


class LMHead:
    """
    Log-probabilities from hidden states, at a temperature, for more than one token at each position.

    It follows the model's LM head: its bias, scale and soft-capping, its place under ZeRO-3 and FSDP2. Both methods
    must be called by all processes at once if the model is sharded.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, without wrappers.
        temperature (`float`):
            Temperature the logits are divided by.
    """

    def __init__(self, model: PreTrainedModel, temperature: float):
        self.model, self.temperature = model, temperature
        self.scale = logit_scale(model.config.get_text_config())
        self.cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @contextmanager
    def on_hidden_states(self, function: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Within the context, call `function` with the last hidden states `(B, L, H)` of each forward pass. It is
        called inside of the model's forward, the only place where the LM head of a sharded model can be had."""
        handle = self.model.base_model.register_forward_hook(
            lambda module, args, output: function(output.last_hidden_state)
        )
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def top_k(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Log-probabilities of given tokens and of the likeliest ones. Only some logits are ever held at once.

        Args:
            hidden_states (`torch.Tensor` of shape `(N, H)`):
                Last hidden states.
            labels (`torch.Tensor` of shape `(N,)`):
                A token id at each.
            k (`int`):
                How many of the likeliest tokens, at most the size of the vocabulary.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`:
                `float32` log-probabilities `(N,)` of the labels, the ids `(N, k)` of the likeliest tokens, the
                likeliest first, and their `float32` log-probabilities `(N, k)`, in nats.
        """
        with self._parameters() as (weight, bias):
            k = min(k, len(weight))
            results = [(hidden_states.new_zeros(0), labels.new_zeros(0, k), hidden_states.new_zeros(0, k))]
            size = max(1, CHUNK_SIZE // len(weight))
            for states, label in zip(hidden_states.split(size), labels.split(size), strict=True):
                logits = self._temper(torch.nn.functional.linear(states.to(weight.dtype), weight, bias).float())
                normalizer = logits.logsumexp(-1, keepdim=True)
                top_logits, top_ids = logits.topk(k)
                label_logits = logits.gather(1, label[:, None])
                results.append(((label_logits - normalizer)[:, 0], top_ids, top_logits - normalizer))
        logps, ids, top_logps = (torch.cat(parts) for parts in zip(*results, strict=True))
        return logps.float(), ids, top_logps.float()

    def log_ratios(self, hidden_states: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """
        How much likelier some tokens are than a given one. It takes k + 1 rows of the LM head for each position, and
        no second pass over the vocabulary: the normalizer drops out.

        Args:
            hidden_states (`torch.Tensor` of shape `(N, H)`):
                Last hidden states.
            labels (`torch.Tensor` of shape `(N,)`):
                A token id at each.
            ids (`torch.Tensor` of shape `(N, k)`):
                The tokens.

        Returns:
            `torch.Tensor` of shape `(N, k)`, `float32`: log p(id) - log p(label) in nats, differentiable with respect
            to the hidden states and the LM head.
        """
        rows = torch.cat([labels[:, None], ids], dim=1)
        with self._parameters() as (weight, bias):
            logits = _SomeLogits.apply(hidden_states, weight, rows)
            if bias is not None:
                logits = logits + bias[rows].float()
        logits = self._temper(logits)
        return logits[:, 1:] - logits[:, :1]

    def _temper(self, logits):
        logits = logits * self.scale
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits / self.temperature

    @contextmanager
    def _parameters(self):
        head = self.model.get_output_embeddings()
        weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (head.weight, head.bias))
        with gather_lm_head(weight, bias):
            yield weight, bias


class _SomeLogits(torch.autograd.Function):
    """
    The logits `(N, k)` of the tokens `ids` `(N, k)`, in `float32`, from states `(N, H)` and the LM head's weight `(V,
    H)`.

    What autograd would keep, a row of the weight for each token, is `(N, k, H)`: here it is looked up again.
    """

    @staticmethod
    def forward(ctx, states, weight, ids):
        ctx.save_for_backward(states, weight, ids)
        logits = states.new_empty(ids.shape, dtype=torch.float32)
        for part in _parts(ids, states.size(1)):
            logits[part] = (weight[ids[part]].float() * states[part, None].float()).sum(-1)
        return logits

    @staticmethod
    def backward(ctx, grad):
        states, weight, ids = ctx.saved_tensors
        with gather_lm_head(weight):
            grad_states = torch.empty_like(states, dtype=torch.float32)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            for part in _parts(ids, states.size(1)):
                grads = grad[part, :, None]
                grad_states[part] = (grads * weight[ids[part]].float()).sum(1)
                if grad_weight is not None:
                    grad_weight.index_add_(0, ids[part].flatten(), (grads * states[part, None].float()).flatten(0, 1))
            if grad_weight is not None:
                grad_weight = grad_weight.to(weight.dtype)
        return grad_states.to(states.dtype), grad_weight, None


def _parts(ids: torch.Tensor, width: int) -> list[slice]:
    """Slices of positions, of which the looked-up rows may be held at once."""
    size = max(1, CHUNK_SIZE // (ids.size(1) * width))
    return [slice(start, start + size) for start in range(0, len(ids), size)]
