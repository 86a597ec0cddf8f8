"""The student's own base model as the teacher."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import cached_property

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedTokenizerBase

from .._trl.names import get_config_model_id, use_adapter
from ..lm_head import LMHead
from ..trials import longest_input
from .contract import find_ends
from .local import WrappedTeacher


class OwnBaseTeacher(WrappedTeacher):
    """The student without its adapter. There is no second copy of the weights. `get_student` returns the
    [`~peft.PeftModel`] that is trained, as it is at that time."""

    def __init__(
        self,
        get_student: Callable,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        temperature: float = 1.0,
    ):
        self.get_student, self.tokenizer = get_student, tokenizer
        self.accelerator, self.temperature = accelerator, temperature
        self.config = config = get_student().config
        self.name = f"{get_config_model_id(config)} without the adapter"
        self.vocab_size = config.get_text_config().vocab_size
        self.max_length = longest_input(config)
        self.eos_token_ids = find_ends(get_student().generation_config, tokenizer)
        self.is_sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)

    @cached_property
    def mixes_rows(self):
        """As any teacher's. The student's base is tried when it first scores: sharded, it can't run before."""
        self.try_roads()
        return self.__dict__["mixes_rows"]

    @property
    def model(self):
        return self.get_student()

    @property
    def lm_head(self):
        return LMHead(self.accelerator.unwrap_model(self.get_student()).get_base_model(), self.temperature)

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
            with use_adapter(self.accelerator.unwrap_model(student), adapter_name=None):
                yield
        finally:
            student.train(was_training)

    def release(self):
        pass
