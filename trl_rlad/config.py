"""The configuration of RLAD."""

import json
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from math import gcd, isfinite
from typing import Any
from urllib.parse import urlsplit

from trl import GRPOConfig


# Schedules that keep the learning rate to the end
_CONSTANT_RATES = ("constant", "constant_with_warmup")

# Longest time limit in seconds, eleven days: the clocks behind it overflow
_LONGEST_TIMEOUT = 1e6

# Settings that must be numbers, and whether they may be left out
_NUMBERS = {
    "alpha": False,
    "distillation_fraction": False,
    "teacher_kl_coef": False,
    "teacher_kl_coef_final": True,
    "teacher_top_k": False,
    "success_reward": False,
    "teacher_log_ratio_clip": True,
    "teacher_timeout": False,
    "teacher_tokens_per_batch": True,
}


@dataclass
class RLADConfig(GRPOConfig):
    r"""
    Configuration class for the [`RLADTrainer`].

    This class includes only the parameters that are specific to RLAD. For a full list of training arguments, please
    refer to the [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`] documentation. Where the
    [RLAD paper](https://huggingface.co/papers/2602.22495) names a value, it is the default here.

    Parameters:
        > Parameters that control the teacher

        alpha (`float`, *optional*, defaults to `0.5`):
            Weight of the old policy in the anchor of the likelihood ratio, in `[0, 1]`; the teacher has the rest
            (Eq. 3). `1.0` is GRPO and needs no teacher; `0.0` compares with the teacher alone. The paper finds little
            difference between 0.3 and 0.7, and losses at 0.1 and 0.9 (Table 5).
        teacher_log_ratio_clip (`float`, *optional*, defaults to `1.0`):
            Bound on the absolute log-ratio between student and teacher, in nats, wherever the two are compared on a
            sampled token: before it enters the likelihood ratio (Appendix B), and in the gradient of `"reverse"`. `None`, or
            `inf` on the command line, applies no bound.
        teacher_credit (`bool`, *optional*, defaults to `False`):
            Whether the teacher, instead of entering the ratio, shares out the credit: a rewarded token's advantage is
            multiplied by (anchor / old policy), a punished one's by its inverse, see `docs/trrd.md`. Not RLAD's form:
            it is that of [RLSD](https://huggingface.co/papers/2604.03128) and [Distilled
            RL](https://huggingface.co/papers/2607.17247).
        distillation_fraction (`float`, *optional*, defaults to `0.0`):
            Share of training, at its beginning, in which the student only imitates: the advantage is zero, and the
            divergence from the teacher has the coefficient 1 on all completions. After that the teacher has the say that
            `alpha` and `teacher_kl_coef` give it; if that is none, it is let go. `1.0` is on-policy distillation.
        teacher_kl_coef (`float`, *optional*, defaults to `0.0`):
            Coefficient of a divergence from the teacher, added to the loss of each token as [`~trl.GRPOConfig`] adds
            `beta` times that from the reference model. With `alpha=1.0` and `teacher_log_ratio_clip=None` this is
            [KDRL](https://huggingface.co/papers/2506.02208), which takes 2e-3.
        teacher_kl_coef_final (`float`, *optional*):
            Value that `teacher_kl_coef` moves to in a straight line. `None` keeps it.
        teacher_kl (`str`, *optional*, defaults to `"reverse"`):
            What the divergence looks at: `"reverse"` grades the token that was sampled
            ([`~trl_rlad.teacher_kl.reverse_kl`]), `"forward"` has the teacher name its likeliest tokens
            ([`~trl_rlad.teacher_kl.forward_kl`]).
        teacher_top_k (`int`, *optional*, defaults to `8`):
            Number of tokens that the teacher names at each position, with `teacher_kl="forward"`.
        teacher_kl_on (`str`, *optional*, defaults to `"all"`):
            Where the divergence applies: `"all"`, or `"failed"`, the completions that failed (KDRL's mask by response).
        success_reward (`float`, *optional*, defaults to `0.0`):
            A completion has succeeded if its reward, the weighted sum of all reward functions, is higher than this.
        teacher_model_init_kwargs (`str` or `dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when the `teacher_model`
            argument of the [`RLADTrainer`] is provided as a string. `dtype` defaults to `"auto"`, the dtype of the
            checkpoint; with `bf16=True` or `fp16=True` the teacher computes under the same autocast as the student.
            `trust_remote_code` here is the teacher's alone; that of [`~trl.GRPOConfig`] is the student's.
        teacher_model_revision (`str`, *optional*):
            Revision of the teacher model and its tokenizer (a branch, tag or commit).
        teacher_zero_stage (`int`, *optional*):
            DeepSpeed ZeRO stage of the teacher: `3` spreads its parameters over all processes, `0` gives each process
            the whole teacher. `None` takes 3 if the student runs under stage 3, else 0.
        teacher_offload (`str`, *optional*, defaults to `"none"`):
            `"cpu"` keeps the teacher's weights in the memory of the host: they visit the device while they score.
        teacher_tokens_per_batch (`int`, *optional*):
            Number of tokens that the teacher scores at once on each process, padding counted. A bound on its memory.
            `None` takes 16,384 on a GPU and 1,024 on a CPU. It is halved when a GPU runs out of memory.
        teacher_server_urls (`str`, `list[str]` or `dict[str, str | list[str]]`, *optional*):
            Address of a vLLM server behind which the teacher is, or of several that serve the same teacher; of several
            teachers, by the names that rows have in the dataset's column `teacher_id`. No `teacher_model` is needed then,
            unless the tokenizer is elsewhere. The environment variable `VLLM_API_KEY` is sent as the key.
        on_teacher_failure (`str`, *optional*, defaults to `"raise"`):
            What to do when no server answers, after half of `teacher_timeout`: `"raise"` ends training, `"grpo"` trains
            such rows without the teacher, until they are more than a tenth of all so far, and more than a thousand.
        teacher_timeout (`float`, *optional*, defaults to `1800.0`):
            Seconds within which all processes must have come to the scoring of a rollout batch, and again to its end.
            A process that is stuck is then named, and training ends. Servers are given half of it, to be ready at the
            start and to answer.

        > Parameters that control the student's passes

        trim_padding (`bool`, *optional*, defaults to `True`):
            Whether the student runs without the padding of the generation batch: within an optimizer step, rows of
            similar lengths share a micro-batch, which is cut to the widest of them. It changes a step by rounding only.
            `False` is TRL's way, bit for bit.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`], as in the paper:
    > - `epsilon_high`: Defaults to `0.28` instead of `None`.
    > - `loss_type`: Defaults to `"grpo"` instead of `"dapo"`.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs", "teacher_server_urls"]

    # Parameters whose default values are overridden from GRPOConfig
    epsilon_high: float | None = field(
        default=0.28,
        metadata={"help": "Upper-bound epsilon value for clipping. If `None`, it is that of `epsilon`."},
    )
    loss_type: str = field(
        default="grpo",
        metadata={"help": "Loss formulation, see `GRPOConfig`. The paper averages over each completion: 'grpo'."},
    )

    # Parameters that control the teacher
    alpha: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the old policy in the anchor of the likelihood ratio, in [0, 1]; the teacher has the "
            "rest. 1.0 is GRPO and needs no teacher, 0.0 compares with the teacher alone."
        },
    )
    teacher_log_ratio_clip: float | None = field(
        default=1.0,
        metadata={
            "help": "Bound on the absolute log-ratio between student and teacher, in nats, wherever they are compared on "
            "a sampled token. `None` (YAML: null), or inf on the command line, applies no bound."
        },
    )
    teacher_credit: bool = field(
        default=False,
        metadata={
            "help": "Whether the teacher, instead of entering the ratio, shares out the credit: the advantage grows where "
            "it agrees with the reward and shrinks where it doesn't. Not the paper's form."
        },
    )
    distillation_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of training, at its beginning, in which the student only imitates the teacher, without the "
            "reward. 1.0 is on-policy distillation."
        },
    )
    teacher_kl_coef: float = field(
        default=0.0,
        metadata={
            "help": "Coefficient of a divergence from the teacher, added to the loss of each token. With `alpha=1.0` "
            "and no `teacher_log_ratio_clip` this is KDRL."
        },
    )
    teacher_kl_coef_final: float | None = field(
        default=None, metadata={"help": "Value that `teacher_kl_coef` moves to in a straight line. Unset: it stays."}
    )
    teacher_kl: str = field(
        default="reverse",
        metadata={
            "help": "Whether the divergence grades the token that was sampled ('reverse') or has the teacher name its "
            "likeliest tokens ('forward').",
            "choices": ["reverse", "forward"],
        },
    )
    teacher_top_k: int = field(
        default=8,
        metadata={"help": "Number of tokens that the teacher names, with `teacher_kl='forward'`."},
    )
    teacher_kl_on: str = field(
        default="all",
        metadata={
            "help": "Where the divergence from the teacher applies: everywhere, or on completions that failed.",
            "choices": ["all", "failed"],
        },
    )
    success_reward: float = field(
        default=0.0, metadata={"help": "A completion has succeeded if its reward is higher than this."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `transformers.AutoModelForCausalLM.from_pretrained`, used when the "
            "`teacher_model` argument of the `RLADTrainer` is provided as a string."
        },
    )
    teacher_model_revision: str | None = field(
        default=None,
        metadata={"help": "Revision of the teacher model and its tokenizer (a branch, tag or commit)."},
    )
    teacher_zero_stage: int | None = field(
        default=None,
        metadata={
            "help": "DeepSpeed ZeRO stage of the teacher: 3 spreads its parameters over all processes, 0 gives each "
            "process the whole teacher. Unset: 3 if the student runs under stage 3, else 0."
        },
    )
    teacher_offload: str = field(
        default="none",
        metadata={
            "help": "'cpu' keeps the teacher's weights in the memory of the host: they visit the device while they "
            "score.",
            "choices": ["none", "cpu"],
        },
    )
    teacher_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens that the teacher scores at once on each process, padding counted. Unset: 16,384 "
            "on a GPU and 1,024 on a CPU."
        },
    )
    teacher_server_urls: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Address of a vLLM server behind which the teacher is; as JSON, a list of several that serve the same "
            "teacher, or a dictionary of teachers by name."
        },
    )
    on_teacher_failure: str = field(
        default="raise",
        metadata={
            "help": "When no server answers: 'raise' ends training, 'grpo' trains such rows without the teacher.",
            "choices": ["raise", "grpo"],
        },
    )
    teacher_timeout: float = field(
        default=1800.0,
        metadata={"help": "Seconds within which all processes must have scored a rollout batch."},
    )

    # Parameters that control the student's passes
    trim_padding: bool = field(
        default=True,
        metadata={
            "help": "Whether the student runs without the padding of the generation batch: rows of similar lengths share "
            "a micro-batch, which is cut to the widest of them. False is TRL's way, bit for bit."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name, is_optional in _NUMBERS.items():
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number and not (is_optional and value is None):
                raise TypeError(f"`{name}` must be a number, but is {value!r}.")
        for name in ("teacher_credit", "trim_padding"):
            if not isinstance(getattr(self, name), bool):  # any text would count as true
                raise TypeError(f"`{name}` must be True or False, but is {getattr(self, name)!r}.")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"`alpha` must be in [0, 1] (1: GRPO, 0: the teacher alone), but is {self.alpha}.")
        if self.teacher_credit and self.alpha == 1.0:
            raise ValueError(
                "`teacher_credit` shares out the credit by `1 - alpha`, of which `alpha=1.0` leaves nothing. Choose a "
                "smaller `alpha`, such as 0.5."
            )
        if not 0.0 <= self.distillation_fraction <= 1.0:
            raise ValueError(
                f"`distillation_fraction` must be in [0, 1], a share of training, but is {self.distillation_fraction}."
            )
        if 0.0 < self.distillation_fraction < 1.0 and self.lr_scheduler_type not in _CONSTANT_RATES:
            warnings.warn(
                f"`lr_scheduler_type={str(self.lr_scheduler_type)!r}` lets the learning rate decay over all of training, "
                "which leaves little of it for the reward after distillation. Set "
                '`lr_scheduler_type="constant_with_warmup"`.',
                stacklevel=2,
            )
        for name in ("teacher_kl_coef", "teacher_kl_coef_final"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be finite and not negative (0: no such term), but is {value}.")
        if self.teacher_kl not in ("reverse", "forward"):
            raise ValueError(
                f"`teacher_kl` must be 'reverse' or 'forward', but is {self.teacher_kl!r}. (The gradient of "
                "k1 doesn't contain the teacher; k3 is a noisy forward divergence.)"
            )
        if not isinstance(self.teacher_top_k, int) or self.teacher_top_k < 1:
            raise ValueError(
                f"`teacher_top_k` must be a whole number of at least 1, but is {self.teacher_top_k!r}. For no named tokens "
                "take `teacher_kl='reverse'`."
            )
        if self.teacher_kl_on not in ("all", "failed"):
            raise ValueError(f"`teacher_kl_on` must be 'all' or 'failed', but is {self.teacher_kl_on!r}.")
        if not isfinite(self.success_reward):
            raise ValueError(f"`success_reward` must be finite, but is {self.success_reward}.")
        self._warn_of_no_effect()
        if self.teacher_log_ratio_clip is not None and not self.teacher_log_ratio_clip > 0.0:
            raise ValueError(
                f"`teacher_log_ratio_clip` must be positive, but is {self.teacher_log_ratio_clip}. Set `alpha=1.0` to "
                "train without the teacher, or `teacher_log_ratio_clip=None` for no bound."
            )
        self._check_init_kwargs()
        if self.teacher_zero_stage not in (None, 0, 3) or isinstance(self.teacher_zero_stage, bool):
            raise ValueError(
                "`teacher_zero_stage` must be the number 0 (whole on each process) or 3 (sharded), but is "
                f"{self.teacher_zero_stage!r}. Stages 1 and 2 shard gradients and optimizer, which a teacher doesn't have."
            )
        if self.teacher_offload not in ("none", "cpu"):
            raise ValueError(f"`teacher_offload` must be 'none' or 'cpu', but is {self.teacher_offload!r}.")
        if not 0.0 < self.teacher_timeout <= _LONGEST_TIMEOUT:
            raise ValueError(
                f"`teacher_timeout` must be a positive number of seconds, at most {_LONGEST_TIMEOUT:.0f}, but is "
                f"{self.teacher_timeout}."
            )
        self._check_servers()
        if self.teacher_tokens_per_batch is None:
            self.teacher_tokens_per_batch = 1024 if self.device.type == "cpu" else 16384
        if not isinstance(self.teacher_tokens_per_batch, int) or self.teacher_tokens_per_batch < 1:
            raise ValueError(
                f"`teacher_tokens_per_batch` must be a whole number of at least 1, but is {self.teacher_tokens_per_batch!r}."
            )
        steps_of_rollouts = self.steps_per_generation * self.num_iterations
        if (
            self.save_strategy == "steps"
            and self.save_steps >= 1
            and self.save_steps * self.gradient_accumulation_steps % steps_of_rollouts
        ):
            warnings.warn(
                f"Checkpoints after every {self.save_steps:g} steps (`save_steps`) fall into the use of a generation batch, "
                "which they don't hold: a resumed run draws new rollouts, and isn't the same. Choose a multiple of "
                f"{steps_of_rollouts / gcd(steps_of_rollouts, self.gradient_accumulation_steps):g}.",
                stacklevel=2,
            )

    def _warn_of_no_effect(self):
        if not self.has_teacher_kl:
            defaults = type(self).__dataclass_fields__
            names = ("teacher_kl", "teacher_kl_on", "teacher_top_k")
            if idle := [name for name in names if getattr(self, name) != defaults[name].default]:
                warnings.warn(
                    f"`{'`, `'.join(idle)}` has no effect without a divergence from the teacher: set `teacher_kl_coef`.",
                    stacklevel=3,
                )

    def _check_init_kwargs(self):
        kwargs = self.teacher_model_init_kwargs
        if kwargs is None:
            return
        if not isinstance(kwargs, dict):
            raise TypeError(
                "`teacher_model_init_kwargs` must be a dictionary (on the command line, JSON such as "
                f'\'{{"dtype": "bfloat16"}}\'), but is {kwargs!r}.'
            )
        if kwargs.get("device_map") is not None:
            raise ValueError(
                "`device_map` in `teacher_model_init_kwargs` can't be honoured: each process places its own teacher. To "
                "spread it over several GPUs, launch with DeepSpeed and set `teacher_zero_stage=3`."
            )
        if kwargs.keys() & {"token", "use_auth_token"}:
            raise ValueError(
                "A token in `teacher_model_init_kwargs` would be saved with the settings of the run. Log in with `hf auth "
                "login`, or set the environment variable `HF_TOKEN`."
            )
        if "torch_dtype" in kwargs:
            raise ValueError("`torch_dtype` in `teacher_model_init_kwargs` is now called `dtype`.")
        if "revision" in kwargs and self.teacher_model_revision is not None:
            raise ValueError(
                "The teacher has two revisions: name it in `teacher_model_revision` alone, which holds for its tokenizer too."
            )

    def _check_servers(self):
        if self.on_teacher_failure not in ("raise", "grpo"):
            raise ValueError(f"`on_teacher_failure` must be 'raise' or 'grpo', but is {self.on_teacher_failure!r}.")
        if isinstance(self.teacher_server_urls, str) and self.teacher_server_urls.startswith("["):
            with suppress(json.JSONDecodeError):  # then it is no address either
                self.teacher_server_urls = json.loads(self.teacher_server_urls)
        if self.teacher_server_urls is None:
            if self.on_teacher_failure != "raise":
                warnings.warn("`on_teacher_failure` has no effect without `teacher_server_urls`.", stacklevel=3)
            return
        by_name = self.teacher_server_urls
        by_name = by_name if isinstance(by_name, dict) else {"": by_name}
        lists = [each if isinstance(each, list) else [each] for each in by_name.values()] or [[]]
        for url in (url for urls in lists for url in urls or [urls]):
            parts = urlsplit(url) if isinstance(url, str) else None
            if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(
                    "`teacher_server_urls` must be an address such as 'http://localhost:8000', a list of them, or a dictionary of "
                    f"either by name, but has {url!r}."
                )
            if parts.username is not None or parts.query:
                raise ValueError(
                    "A key in `teacher_server_urls` would be saved with the settings of the run. Set the environment variable "
                    "`VLLM_API_KEY` instead."
                )
        if self.temperature != 1.0:
            raise ValueError(
                f"With `temperature={self.temperature}` a teacher behind one of `teacher_server_urls` would be wrong, as vLLM "
                "returns the log-probabilities of a prompt at temperature 1. Set `temperature=1.0`, or load the teacher here, as "
                "`teacher_model`."
            )

    @property
    def teacher_servers(self) -> dict[str, list[str]]:
        """Addresses of the servers of each teacher that is behind some, by name, which is empty for a single teacher."""
        by_name: Any = self.teacher_server_urls or {}
        by_name = by_name if isinstance(by_name, dict) else {"": by_name}
        lists = {name: [each] if isinstance(each, str) else each for name, each in by_name.items()}
        return {name: [url.rstrip("/").removesuffix("/v1") for url in urls] for name, urls in lists.items()}

    def teacher_kl_coef_at(self, progress: float) -> float:
        """Value of `teacher_kl_coef` when the share `progress` of training is done."""
        if self.teacher_kl_coef_final is None:
            return self.teacher_kl_coef
        return (1.0 - progress) * self.teacher_kl_coef + progress * self.teacher_kl_coef_final  # exact at both ends

    @property
    def has_teacher_kl(self) -> bool:
        """Whether there is a divergence from the teacher in the loss at any time."""
        return (
            self.distillation_fraction > 0.0 or self.teacher_kl_coef > 0.0 or (self.teacher_kl_coef_final or 0.0) > 0.0
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has a say at any time."""
        return self.alpha < 1.0 or self.has_teacher_kl

    def __getstate__(self):
        # transformers pickles the arguments into each checkpoint, and uploads them
        return {**self.__dict__, "hub_token": None}

    def to_dict(self):
        # It is written as JSON, where a `BitsAndBytesConfig` has no place; transformers minds `model_init_kwargs` only
        values = super().to_dict()
        init_kwargs = values["teacher_model_init_kwargs"] or {}
        if hasattr(init_kwargs.get("quantization_config"), "to_dict"):
            quantization_config = init_kwargs["quantization_config"].to_dict()
            values["teacher_model_init_kwargs"] = {**init_kwargs, "quantization_config": quantization_config}
        return values
