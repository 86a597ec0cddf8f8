"""
Any settings, rewards and prompts: they are refused with a message that names a setting, or two steps are finite.

    FUZZ_CASES=400 pytest tests/test_fuzz.py    # in about ten minutes
"""

import math
import os
import warnings

import pytest
import tiny
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trl import GRPOConfig, GRPOTrainer

from trl_rlad import RLADTrainer


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
CONFIGS = st.fixed_dictionaries(
    {"alpha": st.sampled_from([0.0, 0.3, 0.5, 1.0])},
    optional={
        "teacher_log_ratio_clip": st.sampled_from([None, 0.1, 5.0]),
        "teacher_credit": st.just(True),
        "teacher_kl_coef": st.sampled_from([0.0, 0.5]),
        "teacher_kl_coef_final": st.sampled_from([0.0, 0.5]),
        "teacher_kl": st.sampled_from(["reverse", "forward"]),
        "teacher_kl_on": st.sampled_from(["all", "failed"]),
        "teacher_top_k": st.sampled_from([1, 4, 100]),
        "distillation_fraction": st.sampled_from([0.5, 1.0]),
        "success_reward": st.sampled_from([-1.0, 0.5]),
        "teacher_tokens_per_batch": st.sampled_from([1, 20]),
        "teacher_offload": st.just("cpu"),
        "trim_padding": st.just(False),
        "loss_type": st.sampled_from(LOSSES),
        "importance_sampling_level": st.just("sequence"),
        "num_iterations": st.just(2),
        "gradient_accumulation_steps": st.sampled_from([2, 3]),
        "steps_per_generation": st.sampled_from([2, 4]),
        "beta": st.sampled_from([0.1]),
        "use_bias_correction_kl": st.just(True),
        "scale_rewards": st.sampled_from(["batch", "none"]),
        "mask_truncated_completions": st.just(True),
        "delta": st.just(2.0),
        "epsilon_high": st.just(None),
        "temperature": st.sampled_from([0.3, 2.0]),
        "top_entropy_quantile": st.just(0.5),
        "off_policy_mask_threshold": st.just(0.1),
        "max_completion_length": st.sampled_from([1, 5]),
        "num_generations": st.just(2),
        "max_grad_norm": st.sampled_from([0.0, 1.0]),
        "gradient_checkpointing": st.just(True),
    },
)
REWARDS = st.lists(st.sampled_from([0.0, 1.0, -1.0, 1e9, 1e-9, None, math.nan, math.inf]), min_size=1, max_size=7)
WEIGHTS = st.none() | st.lists(st.sampled_from([None, 0.0, 0.5, 1.0]), min_size=1, max_size=5)


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


# What once broke
@example({"alpha": 0.5, "teacher_kl_coef": 0.5, "num_iterations": 2}, [1.0, None, 0.0], None)
@example(
    {"alpha": 0.5, "teacher_kl": "forward", "distillation_fraction": 0.5, "teacher_top_k": 100},
    [1.0, 0.0],
    [0.0],
)
@example({"alpha": 1.0, "trim_padding": False}, [1.0, 0.0, None], None)
@settings(
    max_examples=int(os.environ.get("FUZZ_CASES", 12)),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(CONFIGS, REWARDS, WEIGHTS)
def test_anything(student_path, teacher_path, tmp_path_factory, config, rewards, teacher_weight):
    folder = tmp_path_factory.mktemp("fuzz")
    dataset = tiny.make_dataset()
    if teacher_weight is not None:
        column = [teacher_weight[i % len(teacher_weight)] for i in range(len(dataset))]
        dataset = dataset.add_column("teacher_weight", column)

    def reward(completions, **kwargs):
        return [rewards[i % len(rewards)] for i in range(len(completions))]

    config = {"max_steps": 2, "num_generations": 4, "per_device_train_batch_size": 4} | config

    def train(cls, config_class, **options):
        trainer = cls(student_path, reward, tiny.make_config(folder, config_class, **options), dataset, **teacher)
        trainer.train()
        return trainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        teacher = {}
        try:
            args = tiny.make_config(folder, **config)
            teacher = {"teacher_model": teacher_path} if args.needs_teacher else {}
            trainer = train(RLADTrainer, type(args), **config)
        except (ValueError, FloatingPointError) as error:
            message = str(error)
            assert message.count("`") >= 2 or "must be divisible" in message, message  # it names something
            assert not isinstance(error, FloatingPointError) or math.inf in rewards or "clip" in message
            return
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert len(logs) == 2 and all(math.isfinite(log["loss"]) for log in logs)
        assert all(p.isfinite().all() for p in trainer.model.parameters())
        if not args.needs_teacher and not args.trim_padding:
            ours = {name: value for name, value in config.items() if hasattr(GRPOConfig, name)}
            plain = train(
                GRPOTrainer, GRPOConfig, **ours | {"loss_type": args.loss_type, "epsilon_high": args.epsilon_high}
            )
            assert all(torch.equal(*pair) for pair in zip(weights(plain), weights(trainer), strict=True))


@pytest.mark.parametrize("gap", [-100.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hundred_nats(gap, dtype):
    from trl_rlad import TRRDLoss
    from trl_rlad.objective.teacher_kl import forward_kl, reverse_kl

    logps = torch.full((2, 3), -1.0, dtype=dtype, requires_grad=True)
    teacher = (logps.detach() + gap).to(dtype)
    anchor, diagnostics = TRRDLoss(0.5)(logps, logps.detach(), teacher, torch.ones(2, 3))
    kl = reverse_kl(logps, teacher)
    named = forward_kl(logps.unsqueeze(-1), teacher.clamp(max=0.0).unsqueeze(-1))
    (anchor.sum() + kl.sum() + named.sum()).backward()
    assert all(x.isfinite().all() for x in (anchor, kl, named, logps.grad))
    # The true gap is reported; only what enters the ratio is bounded
    torch.testing.assert_close(diagnostics["log_ratio"].float(), torch.full((2, 3), -gap), rtol=1e-2, atol=0)
    torch.testing.assert_close(
        (logps.detach() - anchor.detach()).float(), torch.full((2, 3), -gap / 200), rtol=1e-2, atol=0
    )
