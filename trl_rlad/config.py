"""The configuration of RLAD."""

import json
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from inspect import signature
from math import gcd, inf, isfinite
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from trl import GRPOConfig

from .objective.schedule import Objective


# Schedules that keep the learning rate to the end
CONSTANT_RATES = ("constant", "constant_with_warmup")


class Rule(NamedTuple):
    """What a setting must be, in the words that end the sentence "`name` must", and what helps where it isn't."""

    name: str
    holds: Callable[[Any], bool]
    must: str
    hint: str = ""


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value):
    return isinstance(value, int) and value >= 1


def _is_address(url):
    try:
        parts = urlsplit(url)
        host, port = parts.hostname.encode("idna").decode(), parts.port  # which raise what isn't any
    except (AttributeError, TypeError, ValueError):
        return False
    is_host = re.fullmatch(r"[\w.-]+|[0-9a-f:.]+", host) and not re.search(r"[\s#]", url)
    return parts.scheme in ("http", "https") and port != 0 and bool(is_host)


def _optional(holds):
    return lambda value: value is None or holds(value)


def _choice(name, *values, hint=""):
    return Rule(name, lambda value: value in values, f"be {' or '.join(map(repr, values))}", hint)


NUMBERS = "alpha teacher_kl_coef teacher_top_k success_reward distillation_fraction teacher_timeout".split()
BOUND = "Set `alpha=1.0` to train without the teacher, or `teacher_log_ratio_clip=None` for no bound."
K1_AND_K3 = "(The gradient of k1 doesn't contain the teacher; k3 is a noisy forward divergence.)"
STAGES = "Stages 1 and 2 shard gradients and optimizer, which a teacher doesn't have."
JSON = 'be a dictionary (on the command line, JSON such as \'{"dtype": "bfloat16"}\')'
# Types come first: the rules below compare numbers
RULES = (
    *(Rule(name, _is_number, "be a number") for name in [*NUMBERS, "teacher_tokens_per_batch"]),
    Rule("teacher_log_ratio_clip", _optional(_is_number), "be a number"),
    Rule("teacher_kl_coef_final", _optional(_is_number), "be a number"),
    # Any text would count as true
    Rule("teacher_credit", lambda value: isinstance(value, bool), "be True or False"),
    Rule("trim_padding", lambda value: isinstance(value, bool), "be True or False"),
    Rule("log_rollouts", lambda value: isinstance(value, bool), "be True or False"),
    Rule("teacher_model_init_kwargs", _optional(lambda value: isinstance(value, dict)), JSON),
    Rule("alpha", lambda value: 0.0 <= value <= 1.0, "be in [0, 1] (1: GRPO, 0: the teacher alone)"),
    Rule("teacher_log_ratio_clip", _optional(lambda value: value > 0.0), "be positive", BOUND),
    Rule("distillation_fraction", lambda value: 0.0 <= value <= 1.0, "be in [0, 1], a share of training"),
    Rule("teacher_kl_coef", lambda value: 0.0 <= value < inf, "be finite and not negative (0: no such term)"),
    Rule("teacher_kl_coef_final", _optional(lambda value: 0.0 <= value < inf), "be finite and not negative"),
    _choice("teacher_kl", "reverse", "forward", hint=K1_AND_K3),
    Rule("teacher_top_k", _is_count, "be a whole number of at least 1", "For none take `teacher_kl='reverse'`."),
    _choice("teacher_kl_on", "all", "failed"),
    Rule("success_reward", isfinite, "be finite"),
    Rule(
        "teacher_zero_stage",
        lambda value: value in (None, 0, 3) and not isinstance(value, bool),
        "be the number 0 (whole on each process) or 3 (sharded)",
        STAGES,
    ),
    _choice("teacher_offload", "none", "cpu"),
    Rule("teacher_tokens_per_batch", _is_count, "be a whole number of at least 1"),
    # Eleven days: the clocks behind it overflow
    Rule("teacher_timeout", lambda value: 0.0 < value <= 1e6, "be a positive number of seconds, at most 1000000"),
    _choice("on_teacher_failure", "raise", "grpo"),
)


def with_help(config_class: type) -> type:
    """Give the fields of a dataclass that have no help text their entries in its docstring, without the markup."""
    for each in fields(config_class):
        entry = re.search(rf"(?ms)^        {each.name} \(.*?\):\n(.*?)(?=^ {{0,8}}\S|\Z)", config_class.__doc__ or "")
        if entry and "help" not in each.metadata:
            text = re.sub(r"\[([^]]+)\]\([^)]*\)|\[(`)~?(\w.*?`)\]", r"\1\2\3", " ".join(entry[1].split()))
            each.metadata = MappingProxyType({**each.metadata, "help": text})
    return config_class


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that says there is no such name: the one that may be meant."""
    near = get_close_matches(name, list(known), 1)
    return f" Did you mean `{near[0]}`?" if near else ""


@with_help
@dataclass
class RLADConfig(GRPOConfig):
    r"""
    Configuration class for the [`RLADTrainer`].

    This class includes only the parameters that are specific to RLAD. For a full list of training arguments, please
    refer to the [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`] documentation. Where the
    [RLAD paper](https://huggingface.co/papers/2602.22495) names a value, it is the default here.

    Parameters:
        > The objective

        alpha (`float`, *optional*, defaults to `0.5`):
            Weight of the old policy in the anchor of the likelihood ratio, in `[0, 1]`; the teacher has the rest
            (Eq. 3). `1.0` is GRPO and needs no teacher; `0.0` compares with the teacher alone. The paper finds little
            difference between 0.3 and 0.7, and losses at 0.1 and 0.9 (Table 5).
        teacher_log_ratio_clip (`float`, *optional*, defaults to `1.0`):
            Bound on the absolute log-ratio between student and teacher, in nats, wherever the two are compared on a
            sampled token: before it enters the likelihood ratio (Appendix B), and in the gradient of `"reverse"`.
            `None`, or `inf` on the command line, applies no bound.
        teacher_credit (`bool`, *optional*, defaults to `False`):
            Whether the teacher, instead of entering the ratio, shares out the credit: a rewarded token's advantage is
            multiplied by (anchor / old policy), a punished one's by its inverse, see `docs/trrd.md`. Not RLAD's form:
            it is that of [RLSD](https://huggingface.co/papers/2604.03128) and [Distilled
            RL](https://huggingface.co/papers/2607.17247).
        teacher_kl_coef (`float`, *optional*, defaults to `0.0`):
            Coefficient of a divergence from the teacher, added to the loss of each token as [`~trl.GRPOConfig`] adds
            `beta` times that from the reference model. With `alpha=1.0` and `teacher_log_ratio_clip=None` this is
            [KDRL](https://huggingface.co/papers/2506.02208), which takes 2e-3.
        teacher_kl_coef_final (`float`, *optional*):
            Value that `teacher_kl_coef` moves to in a straight line. `None` keeps it.
        teacher_kl (`str`, *optional*, defaults to `"reverse"`):
            Which divergence: `"reverse"` grades the token that was sampled, by k2
            ([`~trl_rlad.objective.teacher_kl.reverse_kl`]); `"forward"` has the teacher name its likeliest tokens
            ([`~trl_rlad.objective.teacher_kl.forward_kl`]).
        teacher_top_k (`int`, *optional*, defaults to `8`):
            Number of tokens that the teacher names at each position, with `teacher_kl="forward"`.
        teacher_kl_on (`str`, *optional*, defaults to `"all"`):
            Where the divergence applies: `"all"`, or `"failed"`, the completions that failed (KDRL's mask by
            response).
        success_reward (`float`, *optional*, defaults to `0.0`):
            A completion has succeeded if its reward, the weighted sum of all reward functions, is higher than this.
        distillation_fraction (`float`, *optional*, defaults to `0.0`):
            Share of training, at its beginning, in which the student only imitates: the advantage is zero, and the
            divergence from the teacher has the coefficient 1 on all completions. After that the teacher has the part
            that `alpha` and `teacher_kl_coef` give it; if that is none, it is let go. `1.0` is on-policy distillation,
            which needs no reward, and of which an evaluation's loss is the divergence too.

        > Where the teacher is

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
        teacher_timeout (`float`, *optional*, defaults to `1800.0`):
            Seconds within which all processes must have come to the scoring of a rollout batch, and again to its end.
            A process that is stuck is then named, and training ends. Servers are given half of it, to be ready at the
            start, to be started again and to answer.
        teacher_server_urls (`str`, `list[str]` or `dict[str, str | list[str]]`, *optional*):
            Address of a vLLM or SGLang server that has the teacher, or of several that have the same; of several
            teachers, by the names that rows have in the dataset's column `teacher_id`. No `teacher_model` is needed
            then, unless the tokenizer is elsewhere. The environment variable `VLLM_API_KEY` is sent as the key.
        on_teacher_failure (`str`, *optional*, defaults to `"raise"`):
            What to do when no server answers, after half of `teacher_timeout`: `"raise"` ends training, `"grpo"`
            trains such rows without the teacher (in distillation, not at all), until they are more than a tenth of all
            so far, and more than a thousand.

        > The student's passes

        trim_padding (`bool`, *optional*, defaults to `True`):
            Whether the student runs without the padding of the generation batch: within an optimizer step, rows of
            similar lengths share a micro-batch, which is cut to the widest of them. It changes a step by rounding
            only. `False` is TRL's way, bit for bit.

        > What is written down

        log_rollouts (`bool`, *optional*, defaults to `True`):
            Whether a run with a teacher, or with `log_completions`, writes to `rollouts/` in `output_dir` what student
            and teacher make of each token of a few groups, for `trl-rlad view`: with each log, in at most 100 files of
            less than 1 MB.

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

    # The help texts of all others are their entries above. The objective
    alpha: float = 0.5
    teacher_log_ratio_clip: float | None = 1.0
    teacher_credit: bool = False
    teacher_kl_coef: float = 0.0
    teacher_kl_coef_final: float | None = None
    teacher_kl: str = field(default="reverse", metadata={"choices": ["reverse", "forward"]})
    teacher_top_k: int = 8
    teacher_kl_on: str = field(default="all", metadata={"choices": ["all", "failed"]})
    success_reward: float = 0.0
    distillation_fraction: float = 0.0

    # Where the teacher is
    teacher_model_init_kwargs: dict[str, Any] | str | None = None
    teacher_model_revision: str | None = None
    teacher_zero_stage: int | None = None
    teacher_offload: str = field(default="none", metadata={"choices": ["none", "cpu"]})
    teacher_tokens_per_batch: int | None = None
    teacher_timeout: float = 1800.0
    teacher_server_urls: dict[str, Any] | str | None = None
    on_teacher_failure: str = field(default="raise", metadata={"choices": ["raise", "grpo"]})

    # The student's passes
    trim_padding: bool = True

    # What is written down
    log_rollouts: bool = True

    def __new__(cls, *args, **kwargs):
        parameters = signature(cls.__init__).parameters  # a subclass may have others
        for name in kwargs.keys() - parameters.keys() if "kwargs" not in parameters else ():
            hint = did_you_mean(name, parameters)
            if name in ("teacher", "teacher_model", "teacher_model_name_or_path"):
                hint = " The teacher is passed to `RLADTrainer`, as `teacher_model`."
            raise TypeError(f"`{cls.__name__}` has no setting `{name}`.{hint}")
        return super().__new__(cls)

    def __post_init__(self):
        super().__post_init__()
        if self.teacher_tokens_per_batch is None:
            self.teacher_tokens_per_batch = 1024 if self.device.type == "cpu" else 16384
        if isinstance(self.teacher_server_urls, str) and self.teacher_server_urls.startswith("["):
            with suppress(json.JSONDecodeError):  # then it is no list of addresses, and refused below
                self.teacher_server_urls = json.loads(self.teacher_server_urls)
        for name, holds, must, hint in RULES:
            if not holds(value := getattr(self, name)):
                raise ValueError(f"`{name}` must {must}, but is {value!r}.{hint and ' '}{hint}")
        self._check_init_kwargs()
        self._check_servers()
        self._check_together()

    def _check_init_kwargs(self):
        kwargs = self.teacher_model_init_kwargs or {}
        if kwargs.get("device_map") is not None:
            raise ValueError(
                "`device_map` in `teacher_model_init_kwargs` can't be honoured: each process places its own teacher. "
                "To spread it over several GPUs, launch with DeepSpeed and set `teacher_zero_stage=3`."
            )
        if kwargs.keys() & {"token", "use_auth_token"}:
            raise ValueError(
                "A token in `teacher_model_init_kwargs` would be saved with the settings of the run. Log in with `hf "
                "auth login`, or set the environment variable `HF_TOKEN`."
            )
        if "torch_dtype" in kwargs:
            raise ValueError("`torch_dtype` in `teacher_model_init_kwargs` is now called `dtype`.")
        if "revision" in kwargs and self.teacher_model_revision is not None:
            raise ValueError(
                "The teacher has two revisions: name it in `teacher_model_revision` alone, which holds for its "
                "tokenizer too."
            )

    def _check_servers(self):
        if self.teacher_server_urls is None:
            return
        for url in (url for urls in self.teacher_servers.values() or [[]] for url in urls or [urls]):
            if not _is_address(url):
                raise ValueError(
                    "`teacher_server_urls` must be an address such as 'http://localhost:8000', a list of them, or a "
                    f"dictionary of either by name, but has {url!r}."
                )
            if "@" in urlsplit(url).netloc or "?" in url:
                raise ValueError(
                    "A key in `teacher_server_urls` would be saved with the settings of the run. Set the environment "
                    "variable `VLLM_API_KEY` instead."
                )
        if self.temperature != 1.0:
            raise ValueError(
                f"With `temperature={self.temperature}` a teacher behind one of `teacher_server_urls` would be wrong, "
                "as vLLM and SGLang return the log-probabilities of a prompt at temperature 1. Set `temperature=1.0`, "
                "or load the teacher here, as `teacher_model`."
            )

    def _check_together(self):
        """Settings that are right one by one, and not beside each other."""
        if self.teacher_credit and self.alpha == 1.0:
            raise ValueError(
                "`teacher_credit` shares out the credit by `1 - alpha`, of which `alpha=1.0` leaves nothing. Choose a "
                "smaller `alpha`, such as 0.5."
            )
        if 0.0 < self.distillation_fraction < 1.0 and self.lr_scheduler_type not in CONSTANT_RATES:
            self._warn(
                f"`lr_scheduler_type={str(self.lr_scheduler_type)!r}` lets the learning rate decay over all of "
                "training, which leaves little of it for the reward after distillation. Set "
                '`lr_scheduler_type="constant_with_warmup"`.'
            )
        self._warn_of_idle_settings()
        by_loss = str(self.metric_for_best_model).removeprefix("eval_") == "loss"
        if by_loss and self.objective.at(0.0) != self.objective.at(1.0):  # so it is with `load_best_model_at_end` too
            self._warn(
                "`metric_for_best_model` is the loss, which is made of other terms at the beginning of training than "
                "at its end. Choose another one, such as `metric_for_best_model='reward'`."
            )
        steps_of_rollouts = self.steps_per_generation * self.num_iterations
        if (
            self.save_strategy == "steps"
            and self.save_steps >= 1
            and self.save_steps * self.gradient_accumulation_steps % steps_of_rollouts
        ):
            self._warn(
                f"Checkpoints after every {self.save_steps:g} steps (`save_steps`) fall into the use of a generation "
                "batch, which they don't hold: a resumed run draws new rollouts, and isn't the same. Choose a "
                f"multiple of {steps_of_rollouts / gcd(steps_of_rollouts, self.gradient_accumulation_steps):g}."
            )

    def _warn_of_idle_settings(self):
        has_kl, only_distils = self.objective.has_kl, self.distillation_fraction == 1.0
        has_kl_after = bool(self.teacher_kl_coef or self.teacher_kl_coef_final) and not only_distils
        grades = (self.alpha < 1.0 and not only_distils) or (has_kl and self.teacher_kl == "reverse")
        reasons = (
            ("teacher_kl teacher_kl_on teacher_top_k", has_kl, "a divergence from the teacher: set `teacher_kl_coef`"),
            ("teacher_kl_on", has_kl_after or not has_kl, "a divergence after distillation, which has it everywhere"),
            ("alpha teacher_credit teacher_kl_coef teacher_kl_coef_final", not only_distils, "any training after "
             "distillation: `distillation_fraction=1.0`"),
            ("teacher_top_k", not has_kl or self.teacher_kl == "forward", '`teacher_kl="forward"`'),
            ("teacher_log_ratio_clip", grades, "a term in which the teacher grades a sampled token"),
            ("on_teacher_failure", self.teacher_server_urls is not None, "`teacher_server_urls`"),
        )  # fmt: skip
        defaults = {each.name: each.default for each in fields(self)} | ({"alpha": 1.0} if self.alpha == 1.0 else {})
        for names, is_there, what in reasons:
            idle = [name for name in names.split() if getattr(self, name) != defaults[name]]
            if idle and not is_there:
                self._warn(f"`{'`, `'.join(idle)}` has no effect without {what}.", stacklevel=6)

    @staticmethod
    def _warn(message, stacklevel=5):
        warnings.warn(message, stacklevel=stacklevel)  # at the line that makes the configuration

    @property
    def teacher_servers(self) -> dict[str, list[str]]:
        """Addresses of the servers of each teacher that is behind some, by name, which is empty for a single
        teacher."""
        by_name: Any = self.teacher_server_urls or {}
        by_name = by_name if isinstance(by_name, dict) else {"": by_name}
        lists = {name: each if isinstance(each, list) else [each] for name, each in by_name.items()}
        return {
            name: [url.rstrip("/").removesuffix("/v1") if isinstance(url, str) else url for url in urls]
            for name, urls in lists.items()
        }

    @property
    def objective(self) -> Objective:
        """What part the teacher has in the loss, by the settings as they are now."""
        return Objective.from_config(self)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has a part in the loss at any time."""
        return self.objective.needs_teacher

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
