"""The student as its own teacher: as it is now, or its base model."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import cached_property

from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from transformers import PreTrainedTokenizerBase

from .._trl.names import get_config_model_id, use_adapter
from ..lm_head import LMHead
from ..trials import longest_input
from .contract import find_ends
from .local import WrappedTeacher


class OwnTeacher(WrappedTeacher):
    """The student as it is when it scores, without dropout. There is no second copy of the weights. `get_student`
    returns the model that is trained, or one that TRL has follow it, as it is at that time."""

    is_frozen = False
    note = "itself"
    length_remedy = "shorten its `teacher_prompt`"

    def __init__(
        self,
        get_student: Callable,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        temperature: float = 1.0,
    ):
        self.get_student, self.tokenizer = get_student, tokenizer
        self.accelerator, self.temperature = accelerator, temperature
        self.config = config = self.unwrapped.config
        self.name = f"{get_config_model_id(config)} {self.note}"
        self.vocab_size = config.get_text_config().vocab_size
        self.max_length = longest_input(config)
        self.eos_token_ids = find_ends(self.unwrapped.generation_config, tokenizer)
        self.is_sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)

    @cached_property
    def mixes_rows(self):
        """As any teacher's. The student is tried when it first scores: sharded, it can't run before."""
        self.try_roads()
        return self.__dict__["mixes_rows"]

    @property
    def model(self):
        return self.get_student()

    @property
    def unwrapped(self):
        return self.accelerator.unwrap_model(self.get_student())

    @property
    def lm_head(self):
        model = self.unwrapped
        return LMHead(model.get_base_model() if is_peft_model(model) else model, self.temperature)

    def find_image_problem(self, student):
        return None  # it has read them

    def deepspeed(self):
        return nullcontext()  # the student's

    @contextmanager
    def placed(self):
        student = self.get_student()
        was_training = student.training
        student.eval()
        try:
            yield
        finally:
            student.train(was_training)

    def release(self):
        pass


class OwnBaseTeacher(OwnTeacher):
    """The student without its adapter."""

    is_frozen = True
    note = "without the adapter"

    @contextmanager
    def placed(self):
        with super().placed(), use_adapter(self.unwrapped, adapter_name=None):
            yield
