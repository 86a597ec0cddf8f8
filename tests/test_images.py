"""Students and teachers that read images, and those of them that are only given text."""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from teacher_server import TeacherServer
from test_trainer import losses, weights
from transformers import AutoModelForImageTextToText, set_seed
from trl import GRPOConfig, GRPOTrainer

from trl_rlad import RLADConfig, RLADTrainer


LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
TEXT = Dataset.from_list([{"prompt": [{"role": "user", "content": "ab" * (1 + i % 3)}]} for i in range(16)])
DATA = {
    "text": TEXT,
    "strings": Dataset.from_dict({"prompt": ["ab" * (1 + i % 3) for i in range(16)]}),
    "image": tiny.make_image_dataset(counts=(1,)),
    # TRL's processing of a generation batch fails where only some rows have images
    "images": tiny.make_image_dataset(counts=(1, 2, 1, 3)),
}
RUNS = {
    **{name: (name, {}) for name in DATA},
    "one-image-column": ("column", {}),
    "steps_per_generation": ("images", {"steps_per_generation": 2, "num_iterations": 2}),
    "beta": ("images", {"beta": 0.04}),
    "lora": ("images", {"peft_config": LORA}),
    "sequence_level": ("images", {"importance_sampling_level": "sequence", "num_iterations": 2}),
}
DATA["column"] = Dataset.from_list([{"prompt": row["prompt"], "image": row["images"][0]} for row in DATA["image"]])


@pytest.fixture(scope="module")
def student_path(tmp_path_factory):
    return tiny.save_vision_model(tmp_path_factory.mktemp("student"), 0)


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    return tiny.save_vision_model(tmp_path_factory.mktemp("teacher"), 1, hidden_size=24)


@pytest.fixture(scope="module")
def text_teacher_path(tmp_path_factory):
    tokenizer = tiny.make_processor().tokenizer
    return tiny.save_model(tmp_path_factory.mktemp("text"), 2, tokenizer=tokenizer, vocab_size=280)


def make_trainer(student, output_dir, dataset, cls=RLADTrainer, teacher=None, peft_config=None, **kwargs):
    config = RLADConfig if cls is RLADTrainer else GRPOConfig
    kwargs = {"per_device_train_batch_size": 8, "max_steps": 2, **kwargs}
    options = {"teacher_model": teacher} if cls is RLADTrainer else {}
    config = tiny.make_config(output_dir, config, **kwargs)
    return cls(student, tiny.reward, config, dataset, peft_config=peft_config, **options)


def train(*args, **kwargs):
    return go(make_trainer(*args, **kwargs))


def go(trainer):
    set_seed(0)  # loading a teacher may draw random numbers
    trainer.train()
    return trainer


@pytest.mark.parametrize(("data", "kwargs"), RUNS.values(), ids=RUNS.keys())
def test_alpha_one_is_grpo_bit_for_bit(data, kwargs, tmp_path, student_path):
    grpo = train(student_path, tmp_path, DATA[data], GRPOTrainer, **kwargs)
    rlad = train(student_path, tmp_path, DATA[data], alpha=1.0, trim_padding=False, **kwargs)
    assert losses(grpo) == losses(rlad) and len(losses(grpo)) == 2
    for name, expected in weights(grpo).items():
        assert torch.equal(expected, weights(rlad)[name]), name


FORWARD = {"alpha": 1.0, "teacher_kl_coef": 0.1, "teacher_kl": "forward", "teacher_top_k": 4}
MODES = {"trrd": {"alpha": 0.5}, "kl": FORWARD}


@pytest.mark.parametrize(
    ("data", "kwargs", "mode"),
    [
        pytest.param(
            *run, mode, id=f"{name}-{mode}", marks=() if mode == "trrd" or name == "images" else pytest.mark.slow
        )
        for name, run in RUNS.items()
        for mode in MODES
    ],
)
def test_training_with_a_teacher(data, kwargs, mode, tmp_path, student_path, teacher_path):
    trainer = make_trainer(student_path, tmp_path, DATA[data], teacher=teacher_path, **MODES[mode], **kwargs)
    expected = tiny.expect_metrics(trainer)
    go(trainer)
    metric = "teacher/kl" if mode == "kl" else "teacher/log_ratio"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and all(torch.tensor([log["loss"], log["grad_norm"]]).isfinite().all() for log in logs)
    assert all(log["grad_norm"] > 0 for log in logs)
    assert [log[metric] for log in logs] == pytest.approx([each[metric] for each in expected], rel=1e-3)


@pytest.mark.parametrize("data", ["text", "images"])
def test_a_teacher_equal_to_the_old_policy_gives_the_update_of_grpo(data, tmp_path, student_path):
    kwargs = {"learning_rate": 1e-3, "num_iterations": 2}
    grpo = train(student_path, tmp_path, DATA[data], GRPOTrainer, **kwargs)
    rlad = train(student_path, tmp_path, DATA[data], teacher=student_path, **kwargs)
    for name, expected in weights(grpo).items():
        torch.testing.assert_close(weights(rlad)[name], expected, rtol=0, atol=1e-5)


def score_plainly(path, row, prompt_ids, completion_ids):
    """The log-probabilities of a completion after one row of the dataset, processed by itself."""
    model, content = AutoModelForImageTextToText.from_pretrained(path), row["prompt"][0]["content"]
    content = [*({"type": "image", "image": image} for image in row["images"]), {"type": "text", "text": content}]
    inputs = tiny.make_processor().apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["input_ids"][0].tolist() == prompt_ids.tolist()
    inputs["input_ids"] = torch.cat([prompt_ids, completion_ids])[None]
    types = inputs["mm_token_type_ids"]
    inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, len(completion_ids))], dim=1)
    inputs.pop("attention_mask")
    with torch.no_grad():
        logps = model(**inputs).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return logps.gather(1, completion_ids[:, None])[:, 0]


@pytest.mark.parametrize("teacher", ["another", "base"])
def test_scores_of_rows_with_images_equal_plain_forward_passes(teacher, tmp_path, student_path, teacher_path):
    path = teacher_path if teacher == "another" else student_path
    trainer = make_trainer(
        student_path,
        tmp_path,
        DATA["images"],
        teacher=path if teacher == "another" else "base",
        peft_config=None if teacher == "another" else LORA,
        teacher_kl_coef=0.1,  # every row is scored, also those without advantage
        teacher_tokens_per_batch=100,
    )
    trainer.model.eval()  # when evaluating, TRL doesn't shuffle
    rows = [DATA["images"][i] for i in range(4) for _ in range(4)]
    batch = trainer._prepare_inputs(rows)
    assert batch["num_images"] == [1] * 4 + [2] * 4 + [1] * 4 + [3] * 4
    for i, row in enumerate(rows):
        prompt_ids = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion_ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        scores = batch["teacher_per_token_logps"][i, : len(completion_ids)]
        expected = score_plainly(path, row, prompt_ids, completion_ids)
        # Some CPUs round a padded batch otherwise by 3e-5; another image moves them by hundredths and more
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def test_rows_with_the_same_tokens_have_each_the_scores_of_its_own_image(tmp_path, student_path, teacher_path):
    data = DATA["image"]
    rows = [data[0]] * 4 + [data[6]] * 4  # of the same text and size
    trainer = make_trainer(student_path, tmp_path, data, teacher=teacher_path)
    trainer.model.eval()
    batch = trainer._prepare_inputs(rows)
    for name in ("completion_ids", "completion_mask"):
        batch[name] = batch[name][:1].expand(8, -1)
    mask = batch["completion_mask"].bool()
    scores = trainer.teacher_scorer.score(batch, mask)["teacher_per_token_logps"]
    assert torch.equal(batch["prompt_ids"][0], batch["prompt_ids"][4])
    for i in (0, 4):
        prompt_ids = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        expected = score_plainly(teacher_path, rows[i], prompt_ids, batch["completion_ids"][i][mask[i]])
        torch.testing.assert_close(scores[i][mask[i]], expected, rtol=0, atol=1e-4)
    assert (scores[0] - scores[4]).abs().max() > 1e-3


def test_an_adapter_of_a_vision_language_model_as_teacher(tmp_path, student_path, teacher_path):
    adapted = get_peft_model(AutoModelForImageTextToText.from_pretrained(teacher_path), LORA)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would make the adapter the identity
            torch.nn.init.normal_(p, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    trainer = make_trainer(student_path, tmp_path, TEXT, teacher=str(tmp_path / "adapter"))
    teacher, ids = trainer.teacher_scorer.teachers[""], torch.arange(40, 60)
    with torch.no_grad():
        expected = adapted(ids[None]).logits[0, 9:-1].log_softmax(-1).gather(1, ids[10:, None])[:, 0]
    torch.testing.assert_close(teacher.score([ids[:10]], [ids[10:]])[0].logps, expected, rtol=0, atol=1e-5)


def test_a_text_only_teacher_of_text_rows(tmp_path, student_path, text_teacher_path):
    trainer = make_trainer(student_path, tmp_path, TEXT, teacher=text_teacher_path)
    expected = tiny.expect_metrics(trainer)
    trainer.train()
    ratio = trainer.state.log_history[0]["teacher/log_ratio"]
    assert ratio == pytest.approx(expected[0]["teacher/log_ratio"], rel=1e-3)


def test_a_text_only_teacher_of_images_is_refused(tmp_path, student_path, text_teacher_path):
    with pytest.raises(ValueError, match="can't read the images of this data: it is a text-only model. Choose"):
        make_trainer(student_path, tmp_path, DATA["images"], teacher=text_teacher_path)
    # Images that are part of the messages are only seen when they are there
    content = [{"type": "image", "image": tiny.make_image(0)}, {"type": "text", "text": "ab"}]
    trainer = make_trainer(student_path, tmp_path, TEXT, teacher=text_teacher_path)
    with pytest.raises(ValueError, match="can't read the images of this data"):
        trainer._prepare_inputs([{"prompt": [{"role": "user", "content": content}]}] * 8)


def test_a_served_teacher_of_images_is_refused(tmp_path, student_path, text_teacher_path):
    with TeacherServer(text_teacher_path) as server:
        options = {"teacher_server_urls": server.url}
        with pytest.raises(ValueError, match="only token ids are sent, .* loaded here. Choose .* `teacher_weight` 0"):
            make_trainer(student_path, tmp_path, DATA["images"], **options)
        make_trainer(student_path, tmp_path, TEXT, **options)


def test_images_can_be_left_to_the_reward(tmp_path, student_path, text_teacher_path):
    dataset = DATA["image"].add_column("teacher_weight", [0.0] * len(DATA["image"]))
    grpo = train(student_path, tmp_path, DATA["image"], GRPOTrainer)
    rlad = train(student_path, tmp_path, dataset, teacher=text_teacher_path)
    for name, expected in weights(grpo).items():
        torch.testing.assert_close(weights(rlad)[name], expected, rtol=0, atol=1e-5)


def test_a_teacher_with_another_view_of_images_is_refused(tmp_path, student_path):
    teacher = tiny.save_vision_model(tmp_path / "teacher", 1, processor=tiny.make_processor(patch_size=2))
    message = "processor makes something else of an image than the student's .*pixel_values.* differ"
    with pytest.raises(ValueError, match=message):
        make_trainer(student_path, tmp_path, DATA["image"], teacher=teacher)
    make_trainer(student_path, tmp_path, TEXT, teacher=teacher).train()


def test_a_student_by_its_tokenizer_alone(tmp_path, student_path, teacher_path):
    tokenizer = tiny.make_processor().tokenizer
    config = tiny.make_config(tmp_path, max_steps=2)
    options = {"teacher_model": teacher_path, "processing_class": tokenizer}
    RLADTrainer(student_path, tiny.reward, config, TEXT, **options).train()
