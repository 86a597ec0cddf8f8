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
from trl_rlad.scripts import train as script
from trl_rlad.teachers import OwnTeacher


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


class Follow(TrainerCallback):
    """Moves a copy of the student towards it every other step, by a quarter of the way."""

    def __init__(self, copy):
        self.copy = copy

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % 2 == 0:
            mine = self.copy.state_dict()
            mixed = {name: 0.75 * mine[name] + 0.25 * weight for name, weight in model.state_dict().items()}
            self.copy.load_state_dict(mixed)


def train(folder, student_path, teacher="self", reward=tiny.reward, dataset=None, lora=False, **kwargs):
    # Of plain gradients, as Adam magnifies their rounding; the student has dropout, and its teacher none
    settings = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 4} | kwargs
    student = AutoModelForCausalLM.from_pretrained(student_path, attention_dropout=0.5)
    callbacks, resume = [], settings.pop("resume", None)
    if teacher == "copy":
        teacher = AutoModelForCausalLM.from_pretrained(student_path)
        callbacks = [(Follow if settings.get("sync_ref_model") else Refresh)(teacher)]
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


LAG = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2, "beta": 1e-3}


def test_a_teacher_that_lags_behind_is_trls_reference_model(tmp_path, student_path):
    ours, copys = (train(tmp_path / each, student_path, each, max_steps=5, **LAG) for each in ("self", "copy"))
    assert ours.teacher_scorer.teachers[""].model is ours.ref_model
    assert_same(ours, copys)
    with pytest.raises(AssertionError):
        assert_same(ours, train(tmp_path / "now", student_path, max_steps=5, beta=1e-3))


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, student_path, caplog):
    whole = train(tmp_path, student_path, save_strategy="steps", save_steps=2)
    resumed = train(tmp_path, student_path, resume=str(tmp_path / "checkpoint-2"))
    for name, weight in whole.model.named_parameters():
        torch.testing.assert_close(dict(resumed.model.named_parameters())[name], weight, rtol=0, atol=1e-6)
    assert "begins anew" not in caplog.text


def test_a_teacher_that_lags_behind_begins_anew_on_resumption_and_says_so(tmp_path, student_path, caplog):
    train(tmp_path, student_path, save_strategy="steps", save_steps=2, **LAG)
    train(tmp_path, student_path, resume=str(tmp_path / "checkpoint-2"), **LAG)
    assert "begins anew as the model that the run began with" in caplog.text


@pytest.mark.parametrize("training", [True, False])
def test_the_student_stays_in_its_mode_with_its_adapter_and_teaches_without_dropout(training, tmp_path, student_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.5, init_lora_weights=False)
    student = AutoModelForCausalLM.from_pretrained(student_path, attention_dropout=0.5)
    student.generation_config.eos_token_id = [1, 2]
    options = {"peft_config": lora, "processing_class": tiny.make_tokenizer(), "teacher_model": "self"}
    trainer = RLADTrainer(student, tiny.reward, tiny.make_config(tmp_path, temperature=0.7), make_dataset(), **options)
    assert len(trainer.teacher_scorer.scorers[""].contract.unknown_ids) == 0  # both ends are its own
    teacher, ids = trainer.teacher_scorer.teachers[""], torch.arange(4, 15)
    trainer.model.train(training)
    with teacher.placed():
        first, second = (teacher.score([ids[:5]], [ids[5:]], 4)[0] for _ in range(2))
    assert trainer.model.training == training and trainer.model.active_adapters == ["default"]
    assert all(module.training == training for module in trainer.model.modules())
    assert torch.equal(first.logps, second.logps)
    merged = AutoModelForCausalLM.from_pretrained(student_path)
    merged.load_state_dict(deepcopy(trainer.model).merge_and_unload().state_dict())
    with torch.no_grad():
        logits = (merged(ids[None]).logits[0, 4:-1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(first.logps, logits.gather(1, ids[5:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(first.top_logps, logits.topk(4).values, rtol=0, atol=1e-5)
    assert not first.logps.requires_grad and not first.top_logps.requires_grad
    assert {id(p) for p in teacher.model.parameters()} == {id(p) for p in trainer.model.parameters()}


def test_a_row_without_a_teacher_prompt_is_grpos(tmp_path, student_path):
    # It is told nothing that the student doesn't know, so the two agree
    rows = [
        {**row, "teacher_prompt": None if i % 2 else row["teacher_prompt"]} for i, row in enumerate(make_dataset())
    ]
    trainer = make(tmp_path, student_path, Dataset.from_list(rows), per_device_train_batch_size=16)
    batches = tiny.watch_batches(trainer)
    trainer.train()
    for batch, rows in batches:
        assert any(row["teacher_prompt"] is None for row in rows)
        for i, row in enumerate(rows):
            ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
            expected = log_probs_of(student_path, row["teacher_prompt"] or row["prompt"], ids)
            mask = batch["teacher_mask"][i][: len(ids)]
            found = batch["teacher_per_token_logps"][i][: len(ids)]
            torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)


def make(folder, student_path, dataset, teacher="self", **kwargs):
    return RLADTrainer(
        student_path, tiny.reward, tiny.make_config(folder, max_steps=1, **kwargs), dataset, teacher_model=teacher
    )


def log_probs_of(path, prompt, ids):
    logps = twin.log_probs(twin.load(path), prompt, ids).float()
    return logps.gather(1, torch.tensor(ids)[:, None])[:, 0]


def test_without_a_teacher_prompt_it_is_refused(tmp_path, student_path, teacher_path):
    plain = tiny.make_dataset()
    empty = plain.add_column("teacher_prompt", [None] * len(plain))
    for dataset in (plain, empty, plain.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"column `teacher_prompt` tells it, .*row\['solution'\]"):
            make(tmp_path, student_path, dataset)
    several = plain.add_column("teacher_id", ["a"] * len(plain))
    with pytest.raises(ValueError, match="column `teacher_prompt` tells it"):
        make(tmp_path, student_path, several, {"a": "self", "b": teacher_path})
    make(tmp_path, student_path, plain, teacher_path)


def test_a_teacher_prompt_that_is_too_long_for_the_student_is_refused(tmp_path, student_path):
    short = tiny.save_model(tmp_path / "short", 0, positions=12)
    with pytest.raises(ValueError, match="knows 12 positions.* or shorten its `teacher_prompt`"):
        make(tmp_path, short, make_dataset())


def test_a_stream_without_a_teacher_prompt_is_refused_at_its_first_batch(tmp_path, student_path):
    stream = tiny.make_dataset().to_iterable_dataset().map(lambda row: row)  # its columns aren't known any more
    assert stream.column_names is None
    with pytest.raises(ValueError, match="column `teacher_prompt` tells it"):
        make(tmp_path, student_path, stream).train()


def test_the_command_trains_a_student_that_teaches_itself(tmp_path, student_path):
    make_dataset().to_json(tmp_path / "data" / "train.jsonl")
    arguments = f"--dataset_name {tmp_path}/data --reward_funcs think_format_reward --output_dir {tmp_path}/out"
    arguments += f" --model_name_or_path {student_path} --teacher_model_name_or_path self --use_cpu --bf16 false"
    trainer, *_ = script.prepare([*arguments.split(), "--report_to", "none"])
    assert isinstance(trainer.teacher_scorer.teachers[""], OwnTeacher)
    with pytest.raises(ValueError, match="`--teacher_samples` samples another model than the student, and not 'self'"):
        script.prepare([*arguments.split(), "--teacher_samples", "2"])
