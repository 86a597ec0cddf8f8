"""`teacher_model="self"`: the student, which reads a `teacher_prompt`, teaches itself."""

from copy import deepcopy

import pytest
import tiny
import torch
import twin
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_rlad import RLADTrainer


NAMED = {"teacher_kl": "forward", "teacher_kl_coef": 0.5, "teacher_top_k": 4}
LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)


def hint(prompt):
    return f"w1 w2 {prompt}"


def make_dataset(size=32):
    dataset = tiny.make_dataset(size)
    return dataset.add_column("teacher_prompt", [hint(row["prompt"]) for row in dataset])


class Refresh(TrainerCallback):
    """Makes a copy of the student what the student is, before each step."""

    def __init__(self, copy):
        self.copy = copy

    def on_step_begin(self, args, state, control, model, **kwargs):
        now = deepcopy(model)
        now = now.merge_and_unload() if hasattr(now, "merge_and_unload") else now
        self.copy.load_state_dict(now.state_dict())


def train(folder, student_path, teacher="self", reward=tiny.reward, dataset=None, lora=False, **kwargs):
    # Of plain gradients, as Adam magnifies their rounding; the student has dropout, and its teacher none
    settings = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 4} | kwargs
    student = AutoModelForCausalLM.from_pretrained(student_path, attention_dropout=0.5)
    callbacks, resume = [], settings.pop("resume", None)
    if teacher == "copy":
        teacher = AutoModelForCausalLM.from_pretrained(student_path)
        callbacks = [Refresh(teacher)]
    trainer = RLADTrainer(
        student,
        reward,
        tiny.make_config(folder, **settings),
        dataset or make_dataset(),
        teacher_model=teacher,
        processing_class=tiny.make_tokenizer(),
        peft_config=LORA if lora else None,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(trainer, other):
    weights = dict(other.model.named_parameters())
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    for log, expected in zip(trainer.state.log_history[:-1], other.state.log_history[:-1], strict=True):
        assert log["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert log["teacher/log_ratio"] == pytest.approx(expected["teacher/log_ratio"], abs=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        NAMED,
        {"lora": True},
        {"num_iterations": 2, "steps_per_generation": 2},
        {"reward": tiny.async_reward},
        {"teacher_credit": True, "gradient_accumulation_steps": 2},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_each_step_is_that_of_a_frozen_copy_of_the_student_of_that_step(kwargs, tmp_path, student_path):
    ours, copys = (train(tmp_path / each, student_path, each, **kwargs) for each in ("self", "copy"))
    assert abs(ours.state.log_history[-2]["teacher/log_ratio"]) > 1e-3
    assert_same(ours, copys)
