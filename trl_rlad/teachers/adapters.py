"""Adapters as teachers."""

import warnings
from collections.abc import Callable, MutableMapping
from typing import Any

from transformers import PreTrainedModel


def add_adapter(
    source: str,
    load_base: Callable[[], PreTrainedModel],
    bases: MutableMapping,
    base: tuple[str, str | None],
    config: Any,
    files: dict[str, Any],
) -> tuple[Any, str]:
    """
    Put an adapter on its base, where it stays apart: merged, it would be rounded to what the base is stored in, and in
    a base whose embeddings are tied to the LM head it would change both.

    One that changes the embeddings or the LM head shares its base with no other.

    Args:
        source (`str`):
            Path or name of the adapter.
        load_base (`Callable`):
            Loads the base.
        bases (`MutableMapping`), base (`tuple[str, str | None]`):
            The bases that there are, with the adapters that they have, by name and revision; and this one's. They may
            be held weakly, so that a base is let go when all its teachers are.
        config ([`~peft.PeftConfig`]), files (`dict[str, Any]`):
            The adapter's configuration, and how its files are found.

    Returns:
        `tuple[PeftModel, str]`: the base with the adapter, and the adapter's name in it.

    Raises:
        `ValueError`: if it is no adapter of the base's weights, or isn't whole.
    """
    from peft import PeftModel
    from peft.utils import load_peft_weights

    if config.is_prompt_learning:
        raise ValueError(
            f"{config.peft_type.value} trains tokens before the prompt, and only adapters of weights teach, such as "
            "LoRA."
        )
    name = source.encode().hex()  # PEFT takes no dots
    shares = not any("embed" in each or "lm_head" in each for each in load_peft_weights(source, "cpu", **files))
    adapted = bases.get(base) if shares else None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            if adapted is None:
                adapted = PeftModel.from_pretrained(load_base(), source, name, autocast_adapter_dtype=False, **files)
            elif name not in adapted.peft_config:
                loaded = adapted.load_adapter(source, name, autocast_adapter_dtype=False, **files)
                if loaded.missing_keys:
                    raise ValueError(f"Some of its weights are missing, such as {', '.join(loaded.missing_keys[:5])}.")
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise ValueError(
                "Its weights don't fit its base. If tokens were added to the base before it was trained, merge the "
                "two and save the whole model with its tokenizer. Under ZeRO-3, where an adapter can't bring weights "
                f"of the base along, set `teacher_zero_stage=0`. {error}"
            ) from error
    if shares:
        bases[base] = adapted
    return adapted, name
