"""From the settings to the class of a teacher."""

from collections.abc import Callable, MutableMapping
from os import PathLike, fspath

from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import RLADConfig
from .loading import HUB_KWARGS
from .local import LocalTeacher
from .own import OwnBaseTeacher, OwnTeacher
from .server import ServedTeacher
from .sharded import FSDPTeacher, ZeRO3Teacher
from .teacher import Teacher


# Initializations of LoRA that leave the base with another part of its weights
CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def create_teacher(
    teacher_model: str | PreTrainedModel | None,
    args: RLADConfig,
    accelerator: Accelerator,
    get_student: Callable,
    tokenizer: PreTrainedTokenizerBase,
    urls: list[str] | None = None,
    bases: MutableMapping | None = None,
) -> Teacher:
    """
    The teacher that fits the model and the way in which training is distributed.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`]):
            Name, path or model; `"base"` for the base model of a student that trains an adapter, or `"self"` for the
            student itself.
        args ([`RLADConfig`]), accelerator ([`~accelerate.Accelerator`]):
            Settings of the training, and what knows how it is distributed.
        get_student (`Callable`), tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Returns the model that is trained, as it is at that time; and its tokenizer.
        urls (`list[str]`, *optional*):
            Addresses of the servers that the teacher is behind. `teacher_model` is then what it is called there.
        bases (`MutableMapping`, *optional*):
            Where teachers that are adapters of the same base find it.

    Raises:
        `TypeError`: if `teacher_model` is neither a name nor a model.
        `ValueError`: if the settings don't fit together.
    """
    if isinstance(teacher_model, PathLike):
        teacher_model = fspath(teacher_model)
    if urls:
        if isinstance(teacher_model, PreTrainedModel):
            raise TypeError("A teacher is behind one of `teacher_server_urls` or a model object, not both.")
        return ServedTeacher(urls, teacher_model, args)
    if str(teacher_model).startswith(("http://", "https://")):
        raise ValueError(f"`teacher_model={teacher_model!r}` is an address: pass it as `teacher_server_urls`.")
    if teacher_model in ("base", "self"):
        settings = {"teacher_zero_stage", "teacher_offload", "teacher_model_init_kwargs", "teacher_model_revision"}
        for name in sorted(settings):
            if getattr(args, name) not in (None, "none"):
                raise ValueError(
                    f'`{name}` has no meaning for `teacher_model="{teacher_model}"`, which is where the student is.'
                )
    if teacher_model == "self":
        return OwnTeacher(get_student, tokenizer, accelerator, args.temperature)
    if teacher_model == "base":
        if not is_peft_model(get_student()):
            raise ValueError(
                '`teacher_model="base"` is the base model of a student that trains an adapter, but this one trains '
                "all its weights. Pass `peft_config`, or the name or path of a teacher."
            )
        check_own_base(get_student())
        return OwnBaseTeacher(get_student, tokenizer, accelerator, args.temperature)
    if not isinstance(teacher_model, (str, PreTrainedModel)):
        raise TypeError(
            "`teacher_model` must be a name, a path or a `PreTrainedModel`, but is a "
            f"`{type(teacher_model).__name__}`."
        )
    teacher_class = choose_class(args, accelerator)
    return teacher_class(teacher_model, args, accelerator, bases if teacher_class is LocalTeacher else None)


def check_own_base(student):
    """Raises a `ValueError` if the base of a student with an adapter isn't what it was, or won't stay so."""
    inits = [str(getattr(config, "init_lora_weights", "")).lower() for config in student.peft_config.values()]
    if changing := [init for init in inits if init.startswith(CHANGING_INITS)]:
        raise ValueError(
            f'`init_lora_weights="{changing[0]}"` moves a part of the weights from the base into the adapter, so '
            '`teacher_model="base"` would be what is left. Pass the name or path of the base.'
        )
    of_adapter = getattr(student.base_model, "prefix", "prompt_encoder"), "modules_to_save", "trainable_tokens"
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and not any(part in name for part in of_adapter):
            raise ValueError(
                f'`{name}` of the base is trained beside the adapter, so `teacher_model="base"` would move with the '
                'student. Set `bias="none"` in `peft_config`, freeze it, or pass the name or path of a teacher.'
            )


def check_settings_of_servers(args: RLADConfig):
    """Raises a `ValueError` for a setting that has no effect if all teachers are behind URLs."""
    idle = [name for name in ("teacher_offload", "teacher_zero_stage") if getattr(args, name) not in (None, "none")]
    init_kwargs: dict = args.teacher_model_init_kwargs or {}  # type: ignore[assignment]  # parsed
    idle += [f"{name}` in `teacher_model_init_kwargs" for name in init_kwargs if name not in HUB_KWARGS]
    if idle:
        raise ValueError(
            f"`{idle[0]}` has no effect on a teacher behind one of `teacher_server_urls`: leave it unset, and start "
            "the server as you want it."
        )


def choose_class(args: RLADConfig, accelerator: Accelerator) -> type[LocalTeacher]:
    """The class of a model in these processes. Raises a `ValueError` for settings that this launch can't honour."""
    stage, distributed_type = args.teacher_zero_stage, accelerator.distributed_type
    if distributed_type != DistributedType.DEEPSPEED and stage is not None:
        raise ValueError(
            f"`teacher_zero_stage={stage}` needs DeepSpeed: launch with `accelerate launch --config_file` and one of "
            "`trl_rlad/scripts/accelerate_configs/zero*.yaml`, or leave it unset."
        )
    if distributed_type == DistributedType.FSDP:
        if args.teacher_offload != "none":
            raise ValueError(
                "Under FSDP the teacher is offloaded as the student is: leave `teacher_offload` at 'none', and set "
                "`fsdp_offload_params: true` in the accelerate config."
            )
        return FSDPTeacher
    if distributed_type == DistributedType.DEEPSPEED and stage is None:
        stage = 3 if accelerator.state.deepspeed_plugin.zero_stage == 3 else 0
    return ZeRO3Teacher if stage == 3 else LocalTeacher
