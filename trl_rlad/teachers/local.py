"""A transformers model in these processes as the teacher."""

import inspect
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import find_adapter_config_file

from .._trl.names import add_fused_lm_head, get_config_model_id
from ..config import RLADConfig
from ..lm_head import LMHead
from ..packing import sharing_pays
from ..trials import longest_input, made_up_tokens, rotates_by_length, tolerance
from .adapters import add_adapter
from .contract import find_ends, find_image_problem
from .loading import (
    HUB_KWARGS,
    active_deepspeed_config,
    find_non_finite,
    load_processing_class,
    load_whole,
)
from .teacher import TokenScores


logger = get_logger(__name__)


def split_scores(lengths: list[int], *scores: torch.Tensor) -> list[TokenScores]:
    """The scores of each completion, from those of all their tokens in a row."""
    return [TokenScores(*parts) for parts in zip(*(part.split(lengths) for part in scores), strict=True)]


class FusedHead:
    """TRL's fused LM head on hidden states that are known already, so that it runs on the scored tokens alone."""

    def __init__(self, model: PreTrainedModel, temperature: float):
        self.config, self.get_output_embeddings = model.config, model.get_output_embeddings
        add_fused_lm_head(self, temperature=temperature)  # type: ignore[arg-type]  # as much of a model as TRL looks at

    def forward(self, *args, **kwargs):
        raise NotImplementedError  # replaced by the fused one

    def base_model(self, hidden_states, **kwargs):
        return BaseModelOutput(last_hidden_state=hidden_states)

    def __call__(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(N,)` of `labels` `(N,)` after `hidden_states` `(N, H)`."""
        return self.forward(hidden_states[None], shift_labels=labels[None], fused_lm_head=True).log_probs[0]


class LocalTeacher:
    """
    A [`Teacher`] in these processes: a transformers model that scores at the temperature at which the student samples.

    Here every process has the whole model on its device; with `teacher_offload="cpu"` only while it scores.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Name, path or causal language model. It is put in eval mode, its parameters no longer require gradients,
            and its forward is given TRL's fused LM head, so that the `(B, T, V)` logits are never held at once.
        args ([`RLADConfig`]):
            Says how to load and where to keep the model, and the temperature.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the device and the other processes.
        bases (`MutableMapping`, *optional*):
            Where teachers that are adapters of the same base find it, see [`add_adapter`].

    Raises:
        `ValueError`: if it can't be loaded, is no causal language model, or comes without a tokenizer.
    """

    is_sharded = False
    is_frozen = True
    # The roads to its scores, see `try_roads`
    shares_prompts = mixes_rows = True
    reads_logits = False
    length_remedy = (
        "if its family stretches its rotary embedding, have it do so: "
        '`teacher_model_init_kwargs={"rope_parameters": {"rope_type": "yarn", ...}}`'
    )
    adapted: Any = None  # the base with the adapters that it has

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RLADConfig,
        accelerator: Accelerator,
        bases: MutableMapping | None = None,
    ):
        self.args, self.accelerator, self.temperature = args, accelerator, args.temperature
        self.bases = WeakValueDictionary() if bases is None else bases
        self.init_kwargs = {
            "dtype": "auto",
            "device_map": None,
            "revision": args.teacher_model_revision,
            **(args.teacher_model_init_kwargs or {}),  # type: ignore[dict-item]  # `args` has read the text of it
        }
        self.hub_kwargs = {name: self.init_kwargs[name] for name in HUB_KWARGS if name in self.init_kwargs}
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
        if damaged := find_non_finite(model):
            raise ValueError(f"The weights of `teacher_model` {self.name!r} aren't finite: {', '.join(damaged[:5])}.")
        self.paths = [(path, self.init_kwargs["revision"]), (get_config_model_id(model.config), None)]
        self.tokenizer: PreTrainedTokenizerBase = load_processing_class(AutoTokenizer, self.paths, self.hub_kwargs)
        self.eos_token_ids = find_ends(model.generation_config, self.tokenizer)
        self.vocab_size = model.config.get_text_config().vocab_size
        self.max_length = longest_input(model.config)
        self.reads_images = "pixel_values" in inspect.signature(model.forward).parameters
        self.set_up(model)
        self.try_roads()

    def check_quantized(self, is_quantized: bool):
        if is_quantized and (self.is_sharded or self.args.teacher_offload != "none"):
            raise ValueError(
                "A quantized teacher is whole and stays on its device: set `teacher_zero_stage=0` (under FSDP choose "
                "another launcher) and `teacher_offload='none'`."
            )

    def set_up(self, model: PreTrainedModel):
        """Freeze the model, give it its fused LM head and its place."""
        add_fused_lm_head(model.requires_grad_(False).eval(), temperature=self.args.temperature)
        self.fused_head, self.lm_head = FusedHead(model, self.args.temperature), LMHead(model, self.args.temperature)
        self.model = self.prepare(model)

    def load(self) -> PreTrainedModel:
        """The model, or the base of an adapter with the adapter in it, from the Hub or from disk."""
        if not isinstance(self.source, str):
            self.config = self.source.config
            return self.source
        files = {"revision": self.init_kwargs["revision"], **self.hub_kwargs}
        trust_remote_code = files.pop("trust_remote_code", False)
        path, adapter, kwargs = self.source, None, self.init_kwargs
        try:
            if find_adapter_config_file(path, **files) is not None:
                from peft import PeftConfig

                adapter = PeftConfig.from_pretrained(path, **files)
                there = {"revision": adapter.revision, "subfolder": ""}
                path, kwargs = adapter.base_model_name_or_path, kwargs | there
            where = {name: kwargs[name] for name in files if name in kwargs}
            self.config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **where)
            with self.deepspeed():
                if adapter is None:
                    return load_whole(path, self.config, kwargs)
                load_base = partial(load_whole, path, self.config, kwargs)
                self.adapted, self.adapter = add_adapter(
                    self.source, load_base, self.bases, (path, adapter.revision), adapter, files
                )
                return self.adapted.get_base_model()
        except Exception as error:  # safetensors, PEFT and the tokenizers have their own
            what = "" if Path(self.source).exists() else " There is no such folder."
            if adapter is not None:
                what = f" It is an adapter of {path!r}, as its `base_model_name_or_path` says."
            raise ValueError(
                f"`teacher_model={self.source!r}` can't be loaded with `teacher_model_init_kwargs="
                f"{self.args.teacher_model_init_kwargs}`.{what} {error}"
            ) from error

    def find_image_problem(self, student: ProcessorMixin) -> str | None:
        """Why the teacher can't read the images that the student's processor prepares, or `None` if it can."""
        if not self.reads_images:
            return "it is a text-only model"
        try:
            return find_image_problem(student, load_processing_class(AutoProcessor, self.paths, self.hub_kwargs))
        except Exception as error:  # each processor has its own, and for text alone none is needed
            return f"its processor fails ({error})"

    @torch.no_grad()
    def try_roads(self):
        """
        Choose the fastest road on which made-up rows come out as by the model's own logits, each row alone.

        `reads_logits` if they aren't the LM head's on the last hidden states; `mixes_rows` if a row may run beside
        others, longer ones too; `shares_prompts` if completions may run on one copy of their prompt's cache. Nothing
        of that is read off a list of families, of adapters or of caches that can't be copied.
        """
        length = int(min(13, self.max_length))
        tokens = made_up_tokens(length, self.config)
        prompts, completions = [tokens[:-3]] * 2, [tokens[-3:], tokens[-3:-1]]
        bound = tolerance(self.accelerator.unwrap_model(self.model), self.accelerator)

        def score(rows, top_k=4):
            scores = self.score(prompts[rows], completions[rows], top_k)
            return torch.cat([torch.cat([row.logps[:, None], row.top_logps], dim=1) for row in scores])

        def agrees(number, top_k=4):
            try:
                scores = score(slice(number), top_k)
            except Exception as error:  # each family has its own
                logger.info(f"{self.name}: {error}")
                return False
            differences = scores - expected[: len(scores), : scores.size(1)]
            return (differences.abs().mean() <= bound).item()

        def warn(what):
            logger.warning(f"What the teacher {self.name} makes of a row {what}.")

        can_share, self.shares_prompts = self.shares_prompts, False
        with self.placed():
            self.reads_logits = True
            expected = torch.cat([score(slice(0, 1)), score(slice(1, 2))])
            self.reads_logits = False
            if not (agrees(1) and agrees(1, top_k=0)):
                self.reads_logits = True
                warn("isn't its LM head on its last hidden states, so all its logits are computed")
            with self.deepspeed(), self.accelerator.autocast():
                far = self.max_length, bound, self.accelerator.device
                rotates = rotates_by_length(self.model, self.config, *far)
            self.mixes_rows = not rotates and agrees(2)
            if not self.mixes_rows:
                warn("depends on what runs beside it, so each row runs alone")
            elif can_share and not self.reads_logits and sharing_pays(length - 3, [3, 2]):
                self.shares_prompts = True
                self.shares_prompts = agrees(2)
                if not self.shares_prompts:
                    warn("comes out otherwise on a shared prompt, so each completion runs its own")

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
        self.model.eval()  # whatever has become of a model object meanwhile
        if self.adapted is not None:
            self.adapted.set_adapter(self.adapter, inference_mode=True)
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
            self.model = self.fused_head = self.lm_head = self.adapted = None
            torch.cuda.empty_cache()

    @torch.no_grad()
    def score(
        self,
        prompts: list[torch.Tensor],
        completions: list[torch.Tensor],
        top_k: int = 0,
        images: list[dict[str, torch.Tensor]] | None = None,
    ) -> list[TokenScores]:
        if not completions and not self.is_sharded:
            return []
        road = self._score_by_logits if self.reads_logits else self._score_by_states
        with self.deepspeed(), self.accelerator.autocast():
            return road(prompts, completions, top_k, stack_images(images or []))

    def _score_by_logits(self, prompts, completions, top_k, image_inputs):
        """As the model itself says it: what the other roads are compared with, if each row is scored alone."""
        input_ids, inputs = self._to_device(pad_rows(prompts, completions), image_inputs)
        scores, logits = [], self.model(input_ids=input_ids, use_cache=False, **inputs).logits
        for row, prompt, completion in zip(logits, prompts, completions, strict=False):
            row = row[len(prompt) - 1 : len(prompt) + len(completion) - 1].float() / self.temperature
            logps, labels = row.log_softmax(-1), completion.to(row.device)
            top_logps, top_ids = logps.topk(min(top_k, logps.size(-1)))
            scores.append(TokenScores(logps.gather(1, labels[:, None])[:, 0], top_ids, top_logps))
        return scores

    def _score_by_states(self, prompts, completions, top_k, image_inputs):
        """By the LM head on the last hidden states of the completions' tokens alone."""
        lengths = [len(completion) for completion in completions]
        shares = self.shares_prompts and not image_inputs and all_equal(prompts)
        if shares and sharing_pays(len(prompts[0]), lengths):
            states = self._run_on_cache(prompts, completions)
        else:
            states = self._run_rows(prompts, completions, **image_inputs)
        labels = torch.cat(completions).to(self.accelerator.device)
        if top_k:
            return split_scores(lengths, *self.lm_head.top_k(states, labels, top_k))
        logps = self.fused_head(states, labels).float()  # TRL's, which is fast but for one token only
        return split_scores(lengths, logps, labels.new_empty(len(labels), 0), logps.new_empty(len(labels), 0))

    def _to_device(self, input_ids, image_inputs):
        device = self.accelerator.device
        return input_ids.to(device), {name: value.to(device) for name, value in image_inputs.items()}

    def _run(self, **inputs):
        inputs = {k: v.to(self.accelerator.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return self.model.base_model(**inputs).last_hidden_state

    def _run_rows(self, prompts, completions, **image_inputs):
        """The states `(N, H)` that tell of the completions' tokens: that of token t is at position t - 1."""
        states = self._run(input_ids=pad_rows(prompts, completions), use_cache=False, **image_inputs)
        spans = [slice(len(p) - 1, len(p) - 1 + len(c)) for p, c in zip(prompts, completions, strict=True)]
        return torch.cat([row[span] for row, span in zip(states, spans, strict=True)])

    def _run_on_cache(self, prompts, completions):
        """As [`_run_rows`] for a prompt that runs once: its last state tells of the first token of every
        completion."""
        cache, length = DynamicCache(config=self.model.config), len(prompts[0])
        states = self._run(input_ids=prompts[0][None], past_key_values=cache, use_cache=True)[:, -1:]
        states = states.expand(len(completions), -1, -1)
        input_ids = pad_sequence([completion[:-1] for completion in completions], batch_first=True)
        if input_ids.size(1) > 0:
            cache.batch_repeat_interleave(len(completions))
            # Told the positions, as some vision-language models would take them to go on from the last image they saw
            positions = torch.arange(length, length + input_ids.size(1))[None]
            inputs = {"input_ids": input_ids, "position_ids": positions, "past_key_values": cache, "use_cache": True}
            states = torch.cat([states, self._run(**inputs)], dim=1)
        return torch.cat([row[: len(completion)] for row, completion in zip(states, completions, strict=True)])


class WrappedTeacher(LocalTeacher):
    """A [`LocalTeacher`] whose model only runs as a whole, through the wrapper that has distributed or adapted it."""

    shares_prompts = False

    def _score_by_states(self, prompts, completions, top_k, image_inputs):
        input_ids, inputs = self._to_device(pad_rows(prompts, completions), image_inputs)
        labels = torch.full_like(input_ids, -100)
        # The state at position t tells of token t + 1
        before = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            before[row, len(prompt) - 1 : len(prompt) + len(completion) - 1] = True
        after, lengths = before.roll(1, dims=1), [len(completion) for completion in completions]
        scores = []
        listening = nullcontext()
        if top_k:  # in the place of TRL's LM head, which is left without labels
            listening = self.lm_head.on_hidden_states(
                lambda states: scores.extend(self.lm_head.top_k(states[before], input_ids[after], top_k))
            )
        else:
            labels[after] = input_ids[after]
        with listening:
            log_probs = self.model(input_ids=input_ids, labels=labels, **inputs, fused_lm_head=True).log_probs
        if not top_k:
            logps = log_probs[before[:, :-1]].float()
            scores = [logps, input_ids.new_empty(len(logps), 0), logps.new_empty(len(logps), 0)]
        return split_scores(lengths, *scores)


def stack_images(images: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The images of several rows; their token types, of one dimension, are padded as the tokens are."""
    stacked = {}
    for name, value in (images[0] if images else {}).items():
        values = [row[name] for row in images]
        stacked[name] = pad_sequence(values, batch_first=True) if value.dim() == 1 else torch.cat(values)
    return stacked


def all_equal(sequences: list[torch.Tensor]) -> bool:
    return all(torch.equal(sequences[0], sequence) for sequence in sequences[1:])


def pad_rows(prompts: list[torch.Tensor], completions: list[torch.Tensor]) -> torch.Tensor:
    """Token ids `(B, L)` of prompts and completions without a gap, padded on the right only. A causal model never
    looks there, so it needs neither an attention mask nor positions. With no rows, two tokens of no use: the other
    processes can't run a sharded model without this one."""
    if not completions:
        return torch.zeros(1, 2, dtype=torch.long)
    return pad_sequence([torch.cat(row) for row in zip(prompts, completions, strict=True)], batch_first=True)
