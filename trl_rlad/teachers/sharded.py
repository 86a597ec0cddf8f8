"""Teachers of which each process holds a part: DeepSpeed ZeRO-3 and FSDP."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import patch_environment

from .._trl.names import prepare_fsdp
from .loading import active_deepspeed_config
from .local import WrappedTeacher


def zero3_inference_config(hidden_size: int, dtype: torch.dtype, offload: str) -> dict[str, Any]:
    """DeepSpeed configuration of a model that is only read; by `offload="cpu"` its shards are on the host."""
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 10 * hidden_size,  # norms stay whole, matrices are always sharded
        "stage3_prefetch_bucket_size": hidden_size * hidden_size,
        "stage3_max_live_parameters": 32 * hidden_size * hidden_size,  # two to three layers are fetched ahead
        "stage3_max_reuse_distance": 0,  # and let go as soon as they have run
    }
    if offload != "none":
        zero["offload_param"] = {"device": offload, "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it, nothing reads it
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": zero,
    }


class ShardedTeacher(WrappedTeacher):
    """A [`WrappedTeacher`] of which each process holds a part. Its wrapper moves the weights while it runs."""

    is_sharded = True

    @contextmanager
    def placed(self):
        if self.model is None:
            self.set_up(self.load())
        self.model.eval()
        yield


class ZeRO3Teacher(ShardedTeacher):
    """A [`LocalTeacher`] whose parameters are spread over the processes by DeepSpeed ZeRO-3 from the moment they are
    loaded, so that no process ever holds them all. Its DeepSpeed configuration is its own, whatever the student's."""

    @cached_property
    def deepspeed_config(self):
        """DeepSpeed configuration of the teacher."""
        dtype = self.init_kwargs["dtype"]
        dtype = self.config.dtype if dtype == "auto" else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        return zero3_inference_config(self.config.get_text_config().hidden_size, dtype, self.args.teacher_offload)

    def deepspeed(self):
        return active_deepspeed_config(self.deepspeed_config)

    def prepare(self, model):
        import deepspeed  # here, as TRL does: at the top it would initialize DeepSpeed for everybody

        engine, *_ = deepspeed.initialize(model=model, config=self.deepspeed_config)
        engine.eval()
        return engine

    def release(self):
        if isinstance(self.source, str) and self.model is not None:
            self.model.destroy()
            super().release()


class FSDPTeacher(ShardedTeacher):
    """A [`LocalTeacher`] whose parameters are spread over the processes by FSDP, as TRL spreads its reference model,
    and under FSDP2 layer by layer."""

    def load(self):
        # Otherwise transformers would leave the weights of all processes but the first to be sent by the Trainer
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
            return super().load()

    def prepare(self, model):
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            return prepare_fsdp(model, self.accelerator)
        for module in list(model.modules()):
            if type(module).__name__ in (model._no_split_modules or ()):
                prepare_fsdp(module, self.accelerator)
        policy = plugin.mixed_precision_policy
        if policy is not None:  # it would round the log-probabilities to bfloat16 on their way out
            plugin.mixed_precision_policy = replace(policy, output_dtype=torch.float32)
        try:
            return prepare_fsdp(model, self.accelerator)
        finally:
            plugin.mixed_precision_policy = policy
