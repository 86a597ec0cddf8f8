"""A trainer that something else has changed raises, rather than train plain GRPO without a word."""

import pytest
import tiny
import torch
from trl import GRPOTrainer

from trl_rlad import RLADTrainer


LOSS, LOGPS = GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies
MODES = {
    "trrd": {"alpha": 0.5},
    "kl": {"alpha": 1.0, "teacher_kl_coef": 0.1},
    "credit": {"teacher_credit": True},
    "distillation": {"distillation_fraction": 1.0},
}


def ask_the_model_directly(self, model, inputs):
    """A loss with a forward pass of its own."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logps, _, _ = LOGPS(self, model, ids, mask, inputs["completion_ids"].size(1))
    return -(logps * inputs["advantages"].unsqueeze(1)).mean()


def ignore_what_was_put_in(self, model, inputs):
    """A loss that reads the batch before it asks for the log-probabilities."""
    advantages = inputs["advantages"]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))
    return -(logps * advantages.unsqueeze(1)).mean()


def without_gradient(self, *args, **kwargs):
    logps, *others = LOGPS(self, *args, **kwargs)
    return logps.detach(), *others


class Mixin:
    def _compute_loss(self, model, inputs):
        return ask_the_model_directly(self, model, inputs)


class MixedTrainer(Mixin, RLADTrainer):
    pass


# What looks at the rollouts, ours too, mustn't be taken for TRL's loss
@pytest.fixture(params=[False, True], ids=["", "logged"])
def log_completions(request):
    return {"log_completions": request.param, "num_completions_to_print": 0}


@pytest.fixture(params=MODES)
def mode(request, log_completions):
    return MODES[request.param] | log_completions


def test_a_loss_that_does_not_ask(mode, make_trainer, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", ask_the_model_directly)
    with pytest.raises(RuntimeError, match="never asked for the student's log-probabilities .*Unsloth.*`alpha=1.0`"):
        make_trainer(**mode).train()


def test_a_mixin_with_a_loss_of_its_own(tmp_path, student_path, teacher_path):
    trainer = MixedTrainer(
        student_path, tiny.reward, tiny.make_config(tmp_path), tiny.make_dataset(), teacher_model=teacher_path
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(RuntimeError, match="never asked"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_a_loss_that_does_not_read_what_the_teacher_has_to_say(mode, make_trainer, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", ignore_what_was_put_in)
    with pytest.raises(RuntimeError, match="did not read what the teacher had put into it"):
        make_trainer(**mode).train()


def test_log_probabilities_without_a_gradient(mode, make_trainer, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", without_gradient)
    with pytest.raises(RuntimeError, match="log-probabilities carry no gradient"):
        make_trainer(**mode).train()


def test_rollouts_that_did_not_come_by_the_teacher(mode, make_trainer, monkeypatch):
    # as a mixin that makes them its own way
    theirs = GRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(RLADTrainer, "_generate_and_score_completions", theirs)
    with pytest.raises(RuntimeError, match="rollouts were not scored by the teacher"):
        make_trainer(**mode).train()


def test_a_loss_that_is_patched_in_mid_run(make_trainer, monkeypatch):
    trainer = make_trainer()
    training_step = trainer.training_step

    def patch_before_the_third(*args):
        if trainer.state.global_step == 2:
            monkeypatch.setattr(GRPOTrainer, "_compute_loss", ask_the_model_directly)
        return training_step(*args)

    trainer.training_step = patch_before_the_third
    with pytest.raises(RuntimeError, match="never asked"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("loss", [ask_the_model_directly, ignore_what_was_put_in])
def test_without_a_teacher_any_loss_will_do(loss, make_trainer, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", loss)
    trainer = make_trainer(alpha=1.0)
    trainer.train()
    assert trainer.state.global_step == 5
