"""Several adapters of one base as teachers, with one copy of the base."""

from collections.abc import Callable, MutableMapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from ..config import RLADConfig
from .local import LocalTeacher


class AdapterTeacher(LocalTeacher):
    """
    A [`LocalTeacher`] whose adapter, of this path or name, stays apart from its base, which other adapters share.

    An adapter that changes the embeddings or the LM head is merged into a base of its own, as that of a single teacher
    is. `bases` holds the models with adapters that there are, by the names and revisions of their bases: weakly, so
    that a base is let go when all its teachers are.
    """

    source: str
    adapted: Any = None

    def __init__(self, model: str, args: RLADConfig, accelerator: Accelerator, bases: MutableMapping):
        self.bases, self.adapter = bases, model.encode().hex()  # PEFT takes no dots
        super().__init__(model, args, accelerator)

    def add_adapter(self, load_base: Callable[[], PreTrainedModel], base: tuple[str, str | None], files):
        from peft import PeftModel
        from peft.utils import load_peft_weights

        self.adapted = None
        if any("embed" in name or "lm_head" in name for name in load_peft_weights(self.source, "cpu", **files)):
            return super().add_adapter(load_base, base, files)
        adapted = self.bases.get(base)
        if adapted is None:
            adapted = PeftModel.from_pretrained(load_base(), self.source, self.adapter, **files)
        elif self.adapter not in adapted.peft_config:
            adapted.load_adapter(self.source, self.adapter, **files)
        self.bases[base] = self.adapted = adapted
        return adapted.get_base_model()

    @contextmanager
    def placed(self):
        with super().placed():
            if self.adapted is not None:
                self.adapted.set_adapter(self.adapter, inference_mode=True)
            yield

    def release(self):
        super().release()
        self.adapted = None
