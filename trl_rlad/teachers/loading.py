"""Models, tokenizers and processors from the Hub or from disk, whole and undamaged, or an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AutoProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from .._trl.names import create_model_from_path


# Of `teacher_model_init_kwargs`, what says where the files are: it holds for the tokenizer and the adapter too
HUB_KWARGS = ("cache_dir", "local_files_only", "subfolder", "trust_remote_code")


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


def load_processing_class(
    auto_class: type[AutoTokenizer | AutoProcessor], places: list[tuple[str, str | None]], hub_kwargs: dict[str, Any]
) -> Any:
    """The teacher's tokenizer or processor, from the first of these names or paths, with their revisions, that has
    one."""
    for name, revision in places:
        try:
            loaded = auto_class.from_pretrained(name, revision=revision, **hub_kwargs)
            tokenizer = getattr(loaded, "tokenizer", loaded)
            if len(tokenizer) > len(tokenizer.all_special_ids):
                return loaded
            cause = ValueError("It has no tokens.")  # what transformers makes where there are no files
        except Exception as error:  # the tokenizers' own too
            cause = error
    raise ValueError(
        f"No tokenizer found for `teacher_model` at {places[0][0]!r}, so it can't be checked that it gives the "
        f"student's token ids the student's meaning. Save the teacher's tokenizer beside its weights. {cause}"
    ) from cause


def load_whole(path: str, config: PretrainedConfig, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    """A model with all its weights: transformers would initialize those that are missing."""
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    # Typed as one model, they are two with `output_loading_info`
    loaded: Any = create_model_from_path(path, architecture, output_loading_info=True, **init_kwargs)
    model, info = loaded
    if missing := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
        raise ValueError(f"{len(missing)} of its weights are missing, such as {', '.join(missing[:5])}.")
    return model


def find_non_finite(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that have NaN or inf in them, of what this process holds."""
    damaged = []
    for name, parameter in model.named_parameters():
        values = getattr(parameter, "ds_tensor", parameter).detach()
        if values.is_floating_point() and values.itemsize > 1 and values.numel() and not values.is_meta:
            lowest, highest = values.aminmax()  # NaN if there is one; 40 times as fast as `isfinite`
            if not (lowest.isfinite() and highest.isfinite()):
                damaged.append(name)
    return damaged
