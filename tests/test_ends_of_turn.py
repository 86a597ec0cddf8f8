"""Student and teacher that share a tokenizer and end their turns otherwise, as their generation configs say."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from teacher_server import TeacherServer
from transformers import GenerationConfig

from trl_rlad import RLADTrainer
from trl_rlad.reports.probe_run import Probe


EOS, END, W9 = 1, 2, 13
# A base model ends its turns with the one; an instruct model uses the other, and lists both
BASE, INSTRUCT = [EOS], [EOS, END]
PROMPTS = Dataset.from_list([{"prompt": f"w{i}"} for i in range(8)])


def save(folder, scores, ends):
    path = tiny.save_table(folder, scores)
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<end>"]})  # as a base model's tokenizer has it
    tokenizer.save_pretrained(path)
    GenerationConfig(eos_token_id=ends, pad_token_id=0).save_pretrained(path)
    return path


def any_words(end):
    """The logits of a model that at each token ends its turn in one case of four, or goes on with any word."""
    scores = torch.zeros(32, 32)
    scores[:, :4] = -12.0
    scores[:, end] = torch.tensor(28 / 3).log()
    return scores


def answers(word, end):
    """Those of one that says a word, and nothing else."""
    scores = torch.zeros(32, 32)
    scores[:, word] = 100.0
    scores[word] = 0.0
    scores[word, end] = 100.0
    return scores


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    make = tmp_path_factory.mktemp
    return {
        "base": save(make("base"), any_words(EOS), BASE),
        "instruct": save(make("instruct"), any_words(END), INSTRUCT),
        "wrong": save(make("wrong"), answers(W9 - 1, EOS), BASE),
        "right": save(make("right"), answers(W9, END), INSTRUCT),
    }


def make_trainer(student, teacher, folder, reward=tiny.reward, peft_config=None, **kwargs):
    args = tiny.make_config(folder, **{"per_device_train_batch_size": 32, "max_completion_length": 16} | kwargs)
    return RLADTrainer(student, reward, args, PROMPTS, teacher_model=teacher, peft_config=peft_config)


@pytest.mark.parametrize(
    ("student", "teacher", "unfit"), [("base", "instruct", EOS), ("instruct", "base", END), ("base", "base", None)]
)
def test_a_teacher_is_not_asked_about_ends_that_are_not_its_own(student, teacher, unfit, models, tmp_path):
    kwargs = {"distillation_fraction": 1.0, "teacher_kl": "forward", "teacher_top_k": 20, "max_steps": 1}
    trainer = make_trainer(models[student], models[teacher], tmp_path, **kwargs)
    seen = tiny.watch_batches(trainer)
    trainer.train()
    ((batch, _),) = seen
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    ends = torch.isin(ids, torch.tensor(INSTRUCT)) & mask
    assert ends.any() and torch.equal(batch["teacher_mask"], mask & (ids != unfit) if unfit else mask)
    named = torch.cat(batch["teacher_top_ids"])[torch.cat(batch["teacher_top_logps"]).isfinite()].tolist()
    assert (END in named) == (teacher == "instruct" and student == "instruct")
    assert (EOS in named) == (teacher == "base"), "on which either student stops"


@pytest.mark.parametrize(("student", "teacher"), [("base", "instruct"), ("instruct", "base")])
def test_a_student_does_not_forget_to_end_its_turns(student, teacher, models, tmp_path):
    # The teacher agrees with the student on all words; were it asked about the ends too, it would be against them
    kwargs = {"distillation_fraction": 1.0, "teacher_log_ratio_clip": None, "max_steps": 8, "optim": "sgd"}
    trainer = make_trainer(models[student], models[teacher], tmp_path, learning_rate=3.0, **kwargs)
    trainer.train()
    with torch.no_grad():
        probabilities = trainer.model(torch.arange(4, 32)[:, None]).logits[:, 0].softmax(-1)
    assert probabilities[:, [EOS, END]].sum(1).mean() == pytest.approx(0.25, abs=0.02)


def test_the_students_own_base_ends_its_turns_as_the_student_does(models, tmp_path, caplog):
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    trainer = make_trainer(models["instruct"], "base", tmp_path, peft_config=lora)
    contract = trainer.teacher_scorer.scorers[""].contract
    assert contract.teacher.eos_token_ids == {EOS, END} and not len(contract.unknown_ids)
    assert "doesn't score" not in caplog.text and "may end its turn" not in caplog.text


def test_the_ends_of_a_served_teacher_are_read_by_its_name(models, tmp_path, caplog):
    with TeacherServer(models["instruct"]) as server:
        trainer = make_trainer(models["base"], None, tmp_path, teacher_server_urls=server.url)
        contract = trainer.teacher_scorer.scorers[""].contract
        assert contract.teacher.eos_token_ids == {EOS, END} and contract.unknown_ids.tolist() == [EOS]
        assert "may end its turn with '<end>'" in caplog.text and "generation_config.json" not in caplog.text
        # A folder with the tokenizer alone
        folder = shutil.copytree(models["instruct"], tmp_path / "tokenizer")
        Path(folder, "generation_config.json").unlink()
        trainer = make_trainer(models["base"], str(folder), tmp_path, teacher_server_urls=server.url)
        assert trainer.teacher_scorer.teachers[""].eos_token_ids == {EOS}
        assert (
            "has no generation_config.json, so the served teacher is taken to end its turn with '<eos>'" in caplog.text
        )


def is_w9(completions, **kwargs):
    return [float(completion == "w9") for completion in completions]


def test_a_teacher_that_is_sampled_ends_its_answers_as_it_is_used_to(models, tmp_path):
    trainer = make_trainer(models["wrong"], models["right"], tmp_path, is_w9)
    before = trainer.model_wrapped, trainer.eos_token_ids, trainer.generation_config.to_dict()
    probe = Probe(trainer)
    probe.run(4)
    assert [each.value for each in probe.sample_teacher(4).values()] == [1.0, 1.0]
    assert (trainer.model_wrapped, trainer.eos_token_ids, trainer.generation_config.to_dict()) == before

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    trainer.predict = fail
    with pytest.raises(ZeroDivisionError):
        probe.sample_teacher(4)
    assert (trainer.model_wrapped, trainer.eos_token_ids, trainer.generation_config.to_dict()) == before


def test_an_end_that_the_reward_would_read_is_refused(models, tmp_path):
    student = tiny.save_model(tmp_path / "student", 0)  # to whose tokenizer <end> is a word
    probe = Probe(make_trainer(student, models["right"], tmp_path / "out", is_w9))
    with pytest.raises(ValueError, match="ends its answers with '<end>', an ordinary token"):
        probe.sample_teacher(4)


def test_what_none_can_judge_is_left_out_of_the_teachers_answers(models, tmp_path):
    def judge_some(prompts, completions, **kwargs):  # of two prompts of four, and of one of these half
        return [
            None if prompt in ("w0", "w1", "w2", "w3") or (prompt == "w4" and i % 2) else float(text == "w9")
            for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
        ]

    trainer = make_trainer(models["wrong"], models["right"], tmp_path, judge_some)
    probe = Probe(trainer)
    probe.run(8)
    rewards = [rollout["reward"] for rollout in probe.rollouts]
    assert len(rewards) == 32 and rewards.count(None) == 18 and rewards.count(0.0) == 14
    assert [each.value for each in probe.sample_teacher(8).values()] == [1.0, 1.0]
