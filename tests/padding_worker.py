"""
Run by each process of `test_padding.py`: train with micro-batches of uneven lengths, and save the weights or
gradients.

    accelerate launch --config_file CONFIG padding_worker.py OPTIONS_AS_JSON
"""

import json
import sys
from pathlib import Path

import tiny
import torch
from test_padding import make_trainer
from torch.distributed.fsdp import fully_shard

from trl_rlad import RLADTrainer


def gradients(trainer):
    """Gradients of one optimizer step of a student that is sharded by FSDP2, which accelerate doesn't do on CPU."""
    model = trainer.model
    for layer in (*model.model.layers, model):
        fully_shard(layer)
    trainer.current_gradient_accumulation_steps = 4
    inputs = [dict(trainer.train_dataset[0]) for _ in range(16)]
    for _ in range(4):
        trainer.training_step(model, inputs, None)
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def weights(trainer):
    trainer.train()
    trainer.save_model()
    return {}


def main(student, output_dir, fsdp=False, **kwargs):
    torch.set_num_threads(1)
    trainer = make_trainer(RLADTrainer, student, output_dir, **kwargs)
    tensors = gradients(trainer) if fsdp else weights(trainer)
    result = {name: tensor.tolist() for name, tensor in tensors.items()}
    Path(output_dir, f"result_{trainer.accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    tiny.leave()
