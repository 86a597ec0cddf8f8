import gc

import pytest
import tiny
import torch
from trl import GRPOTrainer
from trl.trainer import utils

from trl_rlad import RLADTrainer
from trl_rlad.teachers.client import Servers


torch.set_num_threads(1)  # tiny models run no faster on more


class PlainLogProbs:
    """TRL's kernel in plain PyTorch."""

    @staticmethod
    def apply(states, weight, bias, labels, temperature, chunk_size, cap, scale, outputs):
        logits = torch.nn.functional.linear(states, weight, bias) * scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        logps = (logits / temperature).log_softmax(-1)
        per_token = {"log_probs": logps.gather(-1, labels[:, None])[:, 0]}
        per_token["entropy"] = -(logps.exp() * logps).sum(-1)
        per_token["is_top1"] = logps.argmax(-1) == labels
        names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return tuple(per_token.get(name) if name in outputs else None for name in names)


if utils._ChunkedLogProbFunction is None:  # TRL 1.15 has it for GPUs only
    utils._ChunkedLogProbFunction = PlainLogProbs


def pytest_collection_finish():
    """What was imported is no garbage. Each training has Python look for some: half a second long, among all that."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def let_servers_go(monkeypatch):
    """A teacher behind a URL that a test leaves behind would go on asking for its server."""
    opened, open_servers = [], Servers._open
    monkeypatch.setattr(Servers, "_open", lambda servers: opened.append(servers) or open_servers(servers))
    yield
    for servers in opened:
        servers.close()


@pytest.fixture(scope="session")
def student_path(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("student"), seed=0)


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory):
    """A teacher of another width, depth of thought and padded vocabulary than the student's."""
    return tiny.save_model(tmp_path_factory.mktemp("teacher"), seed=1, hidden_size=24, vocab_size=40)


@pytest.fixture
def make_trainer(tmp_path, student_path, teacher_path, monkeypatch):
    """Make a trainer whose forward pass, if `logps` are given, returns them."""

    def make(logps=None, **kwargs):
        config = tiny.make_config(tmp_path, **kwargs)
        teacher = {"teacher_model": teacher_path} if config.needs_teacher else {}
        trainer = RLADTrainer(student_path, tiny.reward, config, tiny.make_dataset(), **teacher)
        trainer.current_gradient_accumulation_steps = 1
        if logps is not None:
            outputs = (logps, torch.ones_like(logps).detach(), None)
            monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", lambda *a, **k: outputs)
        return trainer

    return make
