"""A transformers model in these processes as the teacher."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import find_adapter_config_file

from .._trl import add_fused_lm_head, create_model_from_path, get_config_model_id
from ..config import RLADConfig
from ..lm_head import LMHead
from ..packing import sharing_pays


logger = get_logger(__name__)


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


def split_scores(lengths: list[int], *scores: torch.Tensor) -> list[TokenScores]:
    """The scores of each completion, from those of all their tokens in a row."""
    return [TokenScores(*parts) for parts in zip(*(part.split(lengths) for part in scores), strict=True)]


@contextmanager
def active_deepspeed_config(config: dict[str, Any] | None) -> Iterator[None]:
    """Have transformers load models under this DeepSpeed configuration, or under none, not under the student's."""
    previous = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    active = None if config is None else hf_deepspeed.HfDeepSpeedConfig(config)  # noqa: F841 is kept by weak reference
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = previous


class FusedHead:
    """
    TRL's fused LM head on hidden states that are known already, so that it runs on the scored tokens alone.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model whose LM head, scales and soft-capping are used.
        temperature (`float`):
            Temperature the logits are divided by.
    """

    def __init__(self, model: PreTrainedModel, temperature: float):
        self.config, self.get_output_embeddings = model.config, model.get_output_embeddings
        add_fused_lm_head(self, temperature=temperature)

    def forward(self):
        raise NotImplementedError  # replaced by the fused one

    def base_model(self, hidden_states, **kwargs):
        return BaseModelOutput(last_hidden_state=hidden_states)

    def __call__(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(N,)` of `labels` `(N,)` after `hidden_states` `(N, H)`."""
        return self.forward(hidden_states[None], shift_labels=labels[None], fused_lm_head=True).log_probs[0]


class LocalTeacher:
    """
    A frozen transformers model that scores given tokens at the temperature at which the student samples.

    Here every process has the whole model on its device; with `teacher_offload="cpu"` only while it scores.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Name, path or causal language model. It is put in eval mode, its parameters no longer require gradients,
            and its forward is given TRL's fused LM head, so that the `(B, T, V)` logits are never held at once.
        args ([`RLADConfig`]):
            Says how to load and where to keep the model, and the temperature.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the device and the other processes.

    Attributes:
        name (`str`):
            Name of the model; of a local path, the last part.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's own tokenizer.
        vocab_size (`int`):
            Number of rows of its embedding.

    Raises:
        `ValueError`: if it can't be loaded, is no causal language model, or comes without a tokenizer.
    """

    # Whether a forward pass needs all processes at once, because each holds a part of the model
    is_sharded = False
    # Whether completions of one prompt can run on one copy of its key-value cache
    shares_prompts = True

    def __init__(self, model: str | PreTrainedModel, args: RLADConfig, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self.init_kwargs = {
            "dtype": "auto",
            "device_map": None,
            "revision": args.teacher_model_revision,
            "trust_remote_code": args.trust_remote_code,
            **(args.teacher_model_init_kwargs or {}),
        }
        self.source = model  # what to load again after `release`
        path = model if isinstance(model, str) else get_config_model_id(model.config)
        self.name = Path(path).name if Path(path).is_dir() else path
        if not isinstance(model, str) and args.teacher_model_init_kwargs is not None:
            logger.warning("`teacher_model` is already instantiated: `teacher_model_init_kwargs` will be ignored.")

        self.check_quantized(self.init_kwargs.get("quantization_config") is not None)
        model = self.load()
        if not model.can_generate() or model.config.is_encoder_decoder:
            raise ValueError(
                f"`teacher_model` must be a causal language model, but {self.name!r} is a `{type(model).__name__}`."
            )
        self.check_quantized(getattr(model, "is_quantized", False))
        self.tokenizer = self.load_tokenizer(path, get_config_model_id(model.config))
        self.vocab_size = model.config.get_text_config().vocab_size
        self.set_up(model)

    def check_quantized(self, is_quantized: bool):
        if is_quantized and (self.is_sharded or self.args.teacher_offload != "none"):
            raise ValueError(
                "A quantized teacher is whole and stays on its device: set `teacher_zero_stage=0` (under FSDP choose "
                "another launcher) and `teacher_offload='none'`."
            )

    def set_up(self, model: PreTrainedModel):
        """Freeze the model, give it its fused LM head and its place."""
        add_fused_lm_head(model.requires_grad_(False).eval(), temperature=self.args.temperature)
        self.head, self.lm_head = FusedHead(model, self.args.temperature), LMHead(model, self.args.temperature)
        self.model = self.prepare(model)

    def load(self) -> PreTrainedModel:
        """The model, or an adapter merged into its base, from the Hub or from disk."""
        if not isinstance(self.source, str):
            return self.source
        try:
            with self.deepspeed():
                if find_adapter_config_file(self.source, revision=self.init_kwargs["revision"]) is None:
                    return create_model_from_path(self.source, **self.init_kwargs)
                from peft import AutoPeftModelForCausalLM

                return AutoPeftModelForCausalLM.from_pretrained(self.source, **self.init_kwargs).merge_and_unload()
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"`teacher_model={self.source!r}` can't be loaded with `teacher_model_init_kwargs="
                f"{self.args.teacher_model_init_kwargs}`. {error}"
            ) from error

    def load_tokenizer(self, path: str, base: str) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, or if it is an adapter without one, that of its base."""
        trust_remote_code = self.init_kwargs["trust_remote_code"]
        for name, revision in ((path, self.init_kwargs["revision"]), (base, None)):
            try:
                return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
            except (OSError, ValueError) as error:
                cause = error
        raise ValueError(
            f"No tokenizer found for `teacher_model` at {path!r}, so it can't be checked that it gives the student's "
            "token ids the student's meaning. Save the teacher's tokenizer beside its weights."
        ) from cause

    def prepare(self, model: PreTrainedModel) -> torch.nn.Module:
        """Give the model its place."""
        # A quantized model is on its device since it was loaded, and stays there
        self.is_movable = not getattr(model, "is_quantized", False)
        if self.is_movable and self.args.teacher_offload == "none":
            model.to(self.accelerator.device)
        return model

    def deepspeed(self) -> AbstractContextManager:
        """The context in which transformers and TRL know how DeepSpeed keeps this model."""
        return active_deepspeed_config(None)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Have the model on the device, with `teacher_offload="cpu"` for the length of the context only."""
        if self.model is None:
            self.set_up(self.load())
        host = [(parameter, parameter.data) for parameter in self.model.parameters()]
        if self.is_movable:
            self.model.to(self.accelerator.device)
        try:
            yield
        finally:
            if self.args.teacher_offload == "cpu":
                for parameter, data in host:  # the weights haven't changed: nothing to copy back
                    parameter.data = data

    def release(self):
        """Let the weights go. They are loaded again when the teacher is to score again; a model object stays."""
        if isinstance(self.source, str) and self.model is not None:
            self.model = self.head = self.lm_head = None
            torch.cuda.empty_cache()

    @torch.no_grad()
    def score(self, prompts: list[torch.Tensor], completions: list[torch.Tensor], top_k: int = 0) -> list[TokenScores]:
        """
        Log-probabilities of the completions' tokens, and of the likeliest tokens in their place, in one micro-batch.

        Args:
            prompts (`list[torch.Tensor]`):
                Token ids of each prompt, unpadded, `int64`, on the CPU.
            completions (`list[torch.Tensor]`):
                Token ids of each completion, unpadded, `int64`, on the CPU.
            top_k (`int`, *optional*, defaults to `0`):
                Number of the likeliest tokens to name.

        Returns:
            `list[TokenScores]`: one for each completion.
        """
        if not completions:
            return []
        lengths = [len(completion) for completion in completions]
        with self.deepspeed(), self.accelerator.autocast():
            if self.shares_prompts and all_equal(prompts) and sharing_pays(len(prompts[0]), lengths):
                try:
                    hidden_states, starts = self._run_on_cache(prompts[0], completions), [0] * len(prompts)
                except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
                    logger.warning(
                        f"The cache of {self.name} can't be shared, so each completion runs its prompt: {error}"
                    )
                    self.shares_prompts = False
                    return self.score(prompts, completions, top_k)
            else:
                hidden_states = self._run(pad_rows(prompts, completions), use_cache=False)
                starts = [len(prompt) - 1 for prompt in prompts]
            # The state at position t tells of token t + 1
            spans = [row[start : start + n] for row, start, n in zip(hidden_states, starts, lengths, strict=True)]
            states, labels = torch.cat(spans), torch.cat(completions).to(self.accelerator.device)
            if top_k:
                return split_scores(lengths, *self.lm_head.top_k(states, labels, top_k))
            logps = self.head(states, labels).float()  # TRL's, which is fast but for one token only
            return split_scores(lengths, logps, labels.new_empty(len(labels), 0), logps.new_empty(len(labels), 0))

    def _run(self, input_ids, **kwargs):
        input_ids = input_ids.to(self.accelerator.device)
        return self.model.base_model(input_ids=input_ids, **kwargs).last_hidden_state

    def _run_on_cache(self, prompt, completions):
        # The prompt runs once, and its last state tells of the first token of every completion
        cache = DynamicCache(config=self.model.config)
        last = self._run(prompt[None], past_key_values=cache, use_cache=True)[:, -1:].expand(len(completions), -1, -1)
        input_ids = pad_sequence([completion[:-1] for completion in completions], batch_first=True)
        if input_ids.size(1) == 0:
            return last
        cache.batch_repeat_interleave(len(completions))
        return torch.cat([last, self._run(input_ids, past_key_values=cache, use_cache=True)], dim=1)


class WrappedTeacher(LocalTeacher):
    """A [`LocalTeacher`] whose model only runs as a whole, through the wrapper that has distributed or adapted it."""

    shares_prompts = False

    @torch.no_grad()
    def score(self, prompts, completions, top_k=0):
        if not completions and not self.is_sharded:
            return []
        # The other processes can't run a sharded model without this one: with no rows, it runs two tokens of no use
        input_ids = pad_rows(prompts, completions) if completions else torch.zeros(1, 2, dtype=torch.long)
        input_ids = input_ids.to(self.accelerator.device)
        labels = torch.full_like(input_ids, -100)
        # The state at position t tells of token t + 1
        before = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            before[row, len(prompt) - 1 : len(prompt) + len(completion) - 1] = True
        after, lengths = before.roll(1, dims=1), [len(completion) for completion in completions]
        scores = []
        listening = nullcontext()
        if top_k:  # in the place of TRL's LM head, which is left without labels
            listening = self.lm_head.listen(
                lambda states: scores.extend(self.lm_head.top_k(states[before], input_ids[after], top_k))
            )
        else:
            labels[after] = input_ids[after]
        with self.deepspeed(), self.accelerator.autocast(), listening:
            log_probs = self.model(input_ids=input_ids, labels=labels, fused_lm_head=True).log_probs
        if not top_k:
            logps = log_probs[before[:, :-1]].float()
            scores = [logps, input_ids.new_empty(len(logps), 0), logps.new_empty(len(logps), 0)]
        return split_scores(lengths, *scores)


def all_equal(sequences: list[torch.Tensor]) -> bool:
    return all(torch.equal(sequences[0], sequence) for sequence in sequences[1:])


def pad_rows(prompts: list[torch.Tensor], completions: list[torch.Tensor]) -> torch.Tensor:
    """
    Token ids `(B, L)` of prompts and completions without a gap, padded on the right only. A causal model never looks
    there, so it needs neither an attention mask nor positions.
    """
    return pad_sequence([torch.cat(row) for row in zip(prompts, completions, strict=True)], batch_first=True)
