"""Whole training runs of tiny models."""

import copy
import time
from pathlib import Path

import pytest
import tiny
import torch
import twin
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_rlad import RLADConfig, RLADTrainer


def make_grpo(student, output_dir, peft_config=None, **kwargs):
    config = tiny.make_config(output_dir, GRPOConfig, **kwargs)
    return GRPOTrainer(student, tiny.reward, config, tiny.make_dataset(), peft_config=peft_config)


def make_rlad(student, output_dir, teacher=None, peft_config=None, eval_dataset=None, **kwargs):
    config = tiny.make_config(output_dir, **kwargs)
    dataset = tiny.make_dataset()
    return RLADTrainer(
        student, tiny.reward, config, dataset, eval_dataset, peft_config=peft_config, teacher_model=teacher
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
FEATURES = {
    "on_policy": {"num_iterations": 1},
    "steps_per_generation": {"steps_per_generation": 4},
    "gradient_accumulation": {"gradient_accumulation_steps": 2},
    "beta": {"beta": 0.04},
    "delta": {"delta": 1.5},
    "entropy_coef": {"entropy_coef": 0.01},
    "off_policy_mask": {"off_policy_mask_threshold": 0.01},
    "lora": {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=2)},
    "mask_truncated": {"mask_truncated_completions": True},
}
RUNS = [
    *[
        pytest.param({"loss_type": loss_type, "importance_sampling_level": level}, id=f"{loss_type}-{level}")
        for loss_type in LOSS_TYPES
        for level in ("token", "sequence")
    ],
    *[pytest.param(kwargs, id=name) for name, kwargs in FEATURES.items()],
]


@pytest.mark.parametrize("kwargs", RUNS)
def test_alpha_one_is_grpo_bit_for_bit(kwargs, tmp_path, student_path):
    kwargs = {"num_iterations": 2, "max_steps": 6, **kwargs}  # twice over each batch, so that ratios leave 1
    grpo = make_grpo(student_path, tmp_path, **kwargs)
    grpo.train()
    rlad = make_rlad(student_path, tmp_path, alpha=1.0, trim_padding=False, **kwargs)
    before = weights(rlad)
    rlad.train()
    assert losses(grpo) == losses(rlad) and len(losses(grpo)) == 6
    for name, expected in weights(grpo).items():
        assert torch.equal(expected, weights(rlad)[name]), name
    assert any(not torch.equal(before[name], value) for name, value in weights(rlad).items())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
def test_a_teacher_equal_to_the_old_policy_gives_the_update_of_grpo(alpha, tmp_path, student_path):
    kwargs = {"num_iterations": 3, "max_steps": 3, "learning_rate": 1e-3}
    grpo = make_grpo(student_path, tmp_path, **kwargs)
    grpo.train()
    rlad = make_rlad(student_path, tmp_path, student_path, alpha=alpha, **kwargs)
    rlad.train()
    # The teacher's padding differs from the student's, and Adam magnifies rounding where gradients are near zero
    for name, expected in weights(grpo).items():
        torch.testing.assert_close(weights(rlad)[name], expected, rtol=0, atol=1e-5)


def naive_gradients(trainer, batch, teacher, alpha, clip, low=0.2, high=0.28):
    """Eq. 4 on single unpadded sequences: plain float64 forward passes of student and teacher, token by token."""
    student, teacher = copy.deepcopy(trainer.model).double(), copy.deepcopy(teacher).double()
    student.zero_grad()
    del student.forward  # TRL's fused head
    sequences = []
    for i in range(len(batch["advantages"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        ids = torch.cat([prompt, completion]).unsqueeze(0)
        tokens = []
        logps = [
            (model(input_ids=ids).logits[0] / trainer.temperature).log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])
            for model in (student, teacher)
        ]
        for t in range(len(prompt) - 1, ids.size(1) - 1):
            current, log_teacher = logps[0][t], logps[1][t].detach()
            log_ratio = alpha * (current - current.detach())
            log_ratio = log_ratio + (1 - alpha) * torch.clamp(current - log_teacher, -clip, clip)
            ratio, advantage = log_ratio.exp(), batch["advantages"][i].double()
            tokens.append(-torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage))
        sequences.append(sum(tokens) / len(tokens))
    loss = sum(sequences) / len(sequences)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_step_equals_a_naive_twin(temperature, tmp_path, student_path, teacher_path):
    trainer = make_rlad(student_path, tmp_path, teacher_path, temperature=temperature, per_device_train_batch_size=16)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs([{"prompt": p} for p in ("w1", "w2 w3", "w4", "w5 w6 w7") for _ in range(4)])
    assert len(set(batch["completion_mask"].sum(1).tolist())) > 1, "the completions should be of several lengths"
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path)
    expected_loss, expected = naive_gradients(trainer, batch, teacher, alpha=0.5, clip=1.0)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-4)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p.grad.double(), expected[name], rtol=1e-3, atol=1e-6)


def test_no_more_forward_passes_of_the_student_than_grpo(tmp_path, student_path, teacher_path):
    calls = []
    for make in (make_grpo, lambda *args: make_rlad(*args, teacher_path)):
        trainer = make(student_path, tmp_path)
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        trainer.model.register_forward_pre_hook(count)
        trainer.model.generate = lambda input_ids, **kwargs: torch.cat([input_ids, input_ids[:, :1]], dim=1)
        trainer.train()
    assert calls == [5, 5 + 2]  # two made-up rows, once, by which it is tried whether padding may go


def test_how_the_teacher_is_run_changes_nothing(tmp_path, student_path, teacher_path):
    # One row at a time against all at once on shared prompts, which are long here
    prompts = [" ".join(tiny.WORDS[i : i + 20]) for i in range(8)]
    runs = []
    for shares_prompts, budget in ((False, 1), (True, 4096)):
        config = tiny.make_config(tmp_path, teacher_tokens_per_batch=budget, num_iterations=2)
        trainer = RLADTrainer(
            student_path,
            tiny.reward,
            config,
            Dataset.from_dict({"prompt": prompts}),
            teacher_model=teacher_path,
        )
        trainer.teacher_scorer.teachers[""].shares_prompts = shares_prompts
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4, abs=1e-5)
    for name, expected in weights(runs[0]).items():
        torch.testing.assert_close(weights(runs[1])[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("as_path", [True, False])
def test_the_teacher_is_frozen(as_path, tmp_path, student_path, teacher_path):
    teacher = teacher_path if as_path else AutoModelForCausalLM.from_pretrained(teacher_path)
    before = AutoModelForCausalLM.from_pretrained(teacher_path).state_dict()
    trainer = make_rlad(student_path, tmp_path, teacher, save_strategy="steps", save_steps=5)
    trainer.train()
    with trainer.teacher_scorer.teachers[""].placed():
        model = trainer.teacher_scorer.teachers[""].model
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.model.parameters()}
    saved = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {
        name: value.shape for name, value in trainer.model.state_dict().items()
    }


def test_the_teacher_moves_the_student(tmp_path, student_path, teacher_path):
    with_teacher, grpo = make_rlad(student_path, tmp_path, teacher_path), make_grpo(student_path, tmp_path)
    with_teacher.train()
    grpo.train()
    assert any(not torch.allclose(weights(grpo)[n], v, atol=1e-4) for n, v in weights(with_teacher).items())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.04},
        {"loss_type": "dapo", "gradient_accumulation_steps": 2, "mask_truncated_completions": True},
        {
            "top_entropy_quantile": 0.5,
            "entropy_coef": 0.01,
            "sync_ref_model": True,
            "beta": 0.1,
            "ref_model_sync_steps": 2,
        },
        {"scale_rewards": "batch", "use_adaptive_entropy": True},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_features_of_grpo_with_a_teacher(kwargs, tmp_path, student_path, teacher_path):
    trainer = make_rlad(student_path, tmp_path, teacher_path, **kwargs)
    trainer.train()
    assert len(losses(trainer)) == 5 and all(torch.tensor(losses(trainer)).isfinite())
    assert trainer.state.log_history[0]["teacher/scoring_time"] > 0


def test_the_time_of_generation_is_logged(tmp_path, student_path, teacher_path, monkeypatch):
    generate, seconds = GRPOTrainer._generate, []

    def timed(self, prompts):
        start = time.perf_counter()
        outputs = generate(self, prompts)
        seconds.append(time.perf_counter() - start)
        return outputs

    monkeypatch.setattr(GRPOTrainer, "_generate", timed)
    trainer = make_rlad(student_path, tmp_path, teacher_path, num_iterations=2, max_steps=4)
    trainer.train()
    logged = [log.get("generation_time") for log in trainer.state.log_history if "loss" in log]
    assert logged[::2] == pytest.approx(seconds, abs=0.05) and logged[1::2] == [None, None]  # once in a batch


def test_lora_student(tmp_path, student_path, teacher_path):
    trainer = make_rlad(student_path, tmp_path, teacher_path, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(before[name], value)}
    assert moved and all("lora" in name for name in moved)


def test_evaluation_before_training(tmp_path, student_path, teacher_path):
    # In groups of two, where training's are of four
    reward, args = twin.Watcher(), tiny.make_config(tmp_path, num_generations_eval=2, per_device_eval_batch_size=4)
    dataset = tiny.make_dataset(8)
    trainer = RLADTrainer(student_path, reward, args, dataset, dataset, teacher_model=teacher_path)
    metrics = trainer.evaluate()
    assert len(reward.calls) == 4
    models = twin.load(student_path), twin.load(teacher_path)
    batches = [twin.log_of_step(rows, *models, group=2) for rows in reward.calls]
    for name in ("loss", "teacher/clamped", "clip_ratio/high_by_teacher", "clip_ratio/low_by_teacher"):
        expected = [batch[name] for batch in batches if name in batch]  # a batch may be without signal
        assert metrics[f"eval_{name}"] == pytest.approx(sum(expected) / len(expected), abs=1e-4) and any(expected), (
            name
        )
    trainer.train()
    assert trainer.evaluate()["eval_teacher/scoring_time"] > 0  # after training too


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_a_resumed_run_continues_exactly(beta, tmp_path, student_path, teacher_path):
    kwargs = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2, "beta": beta}
    whole = make_rlad(student_path, tmp_path / "whole", teacher_path, **kwargs)
    whole.train()
    resumed = make_rlad(student_path, tmp_path / "resumed", teacher_path, **kwargs)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert losses(resumed) == losses(whole)
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected), name


def test_different_padded_vocabularies_are_fine(tmp_path, student_path):
    smaller = tiny.make_model(3, vocab_size=32).config.vocab_size
    teacher = tiny.save_model(tmp_path / "teacher", seed=3, vocab_size=smaller + 64)
    trainer = make_rlad(student_path, tmp_path, teacher)
    trainer.train()
    assert trainer.teacher_scorer.teachers[""].vocab_size == 96


def test_default_arguments(student_path, teacher_path, tmp_path, monkeypatch):
    class OnCPU(RLADConfig):  # TRL's defaults want a GPU
        def __post_init__(self):
            self.use_cpu, self.bf16 = True, False
            super().__post_init__()

    monkeypatch.setattr("trl_rlad.trainer.RLADConfig", OnCPU)
    monkeypatch.chdir(tmp_path)
    trainer = RLADTrainer(student_path, tiny.reward, train_dataset=tiny.make_dataset(), teacher_model=teacher_path)
    assert isinstance(trainer.args, RLADConfig) and trainer.args.output_dir == f"{Path(student_path).name}-RLAD"
    assert trainer.args.alpha == 0.5 and trainer.args.teacher_tokens_per_batch == 1024  # on a CPU


def test_a_teacher_object_without_a_tokenizer(tmp_path, student_path):
    with pytest.raises(ValueError, match="Save the teacher's tokenizer beside its weights"):
        make_rlad(student_path, tmp_path, tiny.make_model(0))


def test_the_student_itself_is_no_teacher(tmp_path, student_path):
    model = AutoModelForCausalLM.from_pretrained(student_path)
    for student in (model, get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))):
        with pytest.raises(ValueError, match='shares its weights .* pass "base"'):
            RLADTrainer(student, tiny.reward, tiny.make_config(tmp_path), tiny.make_dataset(), teacher_model=model)


def test_a_teacher_that_alpha_one_ignores_is_said_so(tmp_path, student_path, caplog):
    trainer = make_rlad(student_path, tmp_path, teacher="never/loaded", alpha=1.0)
    assert "`teacher_model` is not loaded" in caplog.text
    assert trainer.teacher_scorer is None
    caplog.clear()
    make_rlad(student_path, tmp_path, alpha=1.0)
    assert "is not loaded" not in caplog.text


def test_evaluation_reports_pass_at_k(tmp_path, student_path, teacher_path):
    # Groups of two, where training's are of four; 0.5 is no success
    def every_second_group(completions, **kwargs):
        return [1.0 if i % 4 < 2 else 0.5 for i in range(len(completions))]

    config = tiny.make_config(tmp_path, num_generations_eval=2, per_device_eval_batch_size=8, success_reward=0.5)
    dataset, reward = tiny.make_dataset(4), twin.Watcher()
    trainer = RLADTrainer(
        student_path, [reward, every_second_group], config, dataset, dataset, teacher_model=teacher_path
    )
    metrics = trainer.evaluate()
    marks = [row["reward"] > 0.5 for rows in reward.calls for row in rows]
    assert len(marks) == 8 and 0 < sum(marks) < 8
    expected = {
        "every_second_group/pass@1": 1 / 2,
        "every_second_group/pass@2": 1 / 2,
        "reward/pass@1": sum(marks) / 8,
        "reward/pass@2": sum(map(any, zip(marks[::2], marks[1::2], strict=True))) / 4,
    }
    reported = {name: value for name, value in metrics.items() if "pass@" in name}
    assert reported == {f"eval_rewards/{name}": pytest.approx(value) for name, value in expected.items()}


def test_a_name_beside_urls_is_kept(tmp_path):
    from trl_rlad.trainer import check_arguments

    args = tiny.make_config(tmp_path, teacher_server_urls={"a": "http://a", "b": "http://b"})
    assert check_arguments("student", args, {"b": "its name"}, {}) == {"a": None, "b": "its name"}
