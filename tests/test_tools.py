"""Rollouts with tools and environments: a teacher has no say on what the model didn't write."""

import pytest
import tiny
import torch
from datasets import Dataset
from test_trainer import losses, weights
from transformers import AutoModelForImageTextToText, set_seed
from trl import GRPOConfig, GRPOTrainer

from trl_rlad import RLADConfig, RLADTrainer


PROMPTS = Dataset.from_list([{"prompt": [{"role": "user", "content": "Three?"}]}] * 8)
MODES = {"trrd": {"alpha": 0.5}, "kl": {"alpha": 1.0, "teacher_kl_coef": 0.1}}


def add(a: int, b: int) -> str:
    """
    Add two numbers.

    Args:
        a: The one.
        b: The other.
    """
    return f"<{a + b}>"


def draw(size: int) -> list:
    """
    Draw a picture.

    Args:
        size: Its height.
    """
    return [{"type": "image", "image": tiny.make_image(0, 16, size)}, {"type": "text", "text": "<done>"}]


class Counter:
    """An environment that is asked for sums."""

    def reset(self, **kwargs) -> str:
        self.calls = 0
        return " Count!"

    def add(self, a: int, b: int) -> str:
        """
        Add two numbers.

        Args:
            a: The one.
            b: The other.
        """
        self.calls += 1
        return f"<{a + b}>"


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call><|im_end|>'


SCENES = {
    "tool": (add, '{"a": 1, "b": 2}', {"tools": [add]}),
    "environment": (add, '{"a": 1, "b": 2}', {"environment_factory": Counter}),
    "image": (draw, '{"size": 8}', {"tools": [draw]}),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A student and a teacher with vision, and with text alone."""
    make = tmp_path_factory.mktemp
    tokenizer = tiny.make_chat_tokenizer()
    return {
        "vision": [tiny.save_vision_model(make(f"vision{seed}"), seed) for seed in range(2)],
        "text": [tiny.save_model(make(f"text{seed}"), seed, tokenizer, vocab_size=272) for seed in range(2)],
    }


def reward(completion_ids, **kwargs):
    return [float(i % 2) for i in range(len(completion_ids))]


def make_trainer(scene, paths, output_dir, cls=RLADTrainer, **kwargs):
    """A trainer whose student first calls the tool and then gives an answer, another one in each row."""
    tool, arguments, options = SCENES[scene]
    student, teacher = paths
    kwargs = {"max_completion_length": 300, "max_steps": 1, **kwargs}
    config = tiny.make_config(output_dir, RLADConfig if cls is RLADTrainer else GRPOConfig, **kwargs)
    options = options | ({"teacher_model": teacher} if cls is RLADTrainer else {})
    trainer = cls(student, reward, config, PROMPTS, **options)
    tokenizer = trainer._tokenizer

    def generate(input_ids, **kwargs):
        has_answer = tokenizer.decode(input_ids[0])[:-30].rfind("<tool_response>") > 0
        texts = [
            f"It is {i}!<|im_end|>" if has_answer else call(tool.__name__, arguments) for i in range(len(input_ids))
        ]
        return torch.cat([input_ids, torch.tensor(tokenizer(texts)["input_ids"])], dim=1)

    trainer.model.generate = generate
    return trainer


KINDS = [("tool", "text"), ("environment", "vision"), ("image", "vision")]


@pytest.mark.parametrize(("scene", "kind"), KINDS)
def test_the_teacher_has_no_say_on_the_tokens_of_tools(scene, kind, paths, tmp_path):
    trainer = make_trainer(scene, paths[kind], tmp_path)
    batch = trainer._prepare_inputs([{"prompt": PROMPTS[0]["prompt"]}] * 4)
    for row in range(4):
        says, mask = batch["teacher_mask"][row], batch["completion_mask"][row].bool()
        own, told = (trainer._tokenizer.decode(batch["completion_ids"][row][part]) for part in (says, mask & ~says))
        assert own.startswith("<tool_call>") and "It is" in own
        assert "<tool_response>" in told and "It is" not in told
        assert ("<|image_pad|>" in told) == (scene == "image")
        assert not batch["teacher_per_token_logps"][row][~says].any()


def test_an_image_that_a_tool_returned_is_read_by_the_teacher(paths, tmp_path):
    trainer = make_trainer("image", paths["vision"], tmp_path)
    batch = trainer._prepare_inputs([{"prompt": PROMPTS[0]["prompt"]}] * 4)
    model = AutoModelForImageTextToText.from_pretrained(paths["vision"][1])
    pixels = trainer.processing_class.image_processor(images=[tiny.make_image(0, 16, 8)], return_tensors="pt")
    for row in range(4):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion])[None]
        types = (ids == trainer.processing_class.image_token_id).long()
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=types, **pixels).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        mask = batch["teacher_mask"][row][: len(completion)]
        scores = batch["teacher_per_token_logps"][row][: len(completion)]
        torch.testing.assert_close(scores[mask], expected[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scene", "kind"), KINDS)
def test_alpha_one_is_grpo_bit_for_bit(scene, kind, paths, tmp_path):
    trainers = []
    for cls, kwargs in ((GRPOTrainer, {}), (RLADTrainer, {"alpha": 1.0})):
        trainers.append(make_trainer(scene, paths[kind], tmp_path, cls, **kwargs))
        set_seed(0)
        trainers[-1].train()
    grpo, rlad = trainers
    assert losses(grpo) == losses(rlad) and len(losses(grpo)) == 1
    assert all(torch.equal(weights(rlad)[name], p) for name, p in weights(grpo).items())
    assert grpo.state.log_history[0]["tools/call_frequency"] == 1.0


@pytest.mark.parametrize(
    ("scene", "kind", "mode"),
    [
        pytest.param(*kind, mode, marks=() if mode == "trrd" or kind[0] == "image" else pytest.mark.slow)
        for kind in KINDS
        for mode in MODES
    ],
)
def test_training_with_a_teacher(scene, kind, mode, paths, tmp_path):
    trainer = make_trainer(scene, paths[kind], tmp_path, num_iterations=2, max_steps=2, **MODES[mode])
    expected = tiny.expect_metrics(trainer)
    trainer.train()
    metric = "teacher/kl" if mode == "kl" else "teacher/log_ratio"
    logs = trainer.state.log_history[:2]
    assert all(torch.tensor(log["loss"]).isfinite() and log["grad_norm"] > 0 for log in logs)
    assert [log[metric] for log in logs] == pytest.approx([each[metric] for each in expected], rel=1e-3)
