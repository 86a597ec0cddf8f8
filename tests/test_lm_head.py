"""The LM head for several tokens at a position, against the model's own logits in float64."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import trl_rlad.lm_head
from trl_rlad.lm_head import LMHead


SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
MODELS = {
    "plain": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": False}),
    "tied": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True}),
    "capped": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 1.5}),
    "scaled": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}),
    "divided": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 5.0}),
}


def make_model(name, **kwargs):
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(0)
    return model_class(config_class(**SIZE, **settings, **kwargs)).double().eval()


def reference(model, ids, temperature):
    """Log-probabilities of the whole vocabulary after every position but the last, by the model's own LM head."""
    return (model(input_ids=ids).logits[0, :-1] / temperature).log_softmax(-1)


def listen(model, head, ids):
    seen = []
    with head.on_hidden_states(seen.append):
        model(input_ids=ids)
    model(input_ids=ids)  # nobody listens any more
    assert len(seen) == 1
    return seen[0][0, :-1]


IDS = torch.randint(1, 40, (1, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("k", [1, 4, 40, 99])
@pytest.mark.parametrize("chunk", [1, 100, 2**24])
def test_the_likeliest_tokens(name, temperature, k, chunk, monkeypatch):
    monkeypatch.setattr(trl_rlad.lm_head, "CHUNK_SIZE", chunk)
    model = make_model(name)
    head = LMHead(model, temperature)
    logps, ids, top_logps = head.top_k(listen(model, head, IDS), IDS[0, 1:], k)
    expected = reference(model, IDS, temperature)
    top = expected.topk(min(k, 40))
    assert logps.dtype == top_logps.dtype == torch.float32 and torch.equal(ids, top.indices)
    torch.testing.assert_close(top_logps, top.values.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(logps, expected.gather(1, IDS[0, 1:, None])[:, 0].float(), rtol=0, atol=1e-5)


def test_no_position_at_all():
    head = LMHead(make_model("plain"), 1.0)
    logps, ids, top_logps = head.top_k(torch.zeros(0, 16).double(), IDS[0, :0], 3)
    assert logps.shape == (0,) and ids.shape == top_logps.shape == (0, 3)
    states = torch.zeros(0, 16, dtype=torch.double, requires_grad=True)
    log_ratios = head.log_ratios(states, IDS[0, :0], ids)
    log_ratios.sum().backward()  # every process of a sharded model takes part
    assert log_ratios.shape == (0, 3) and not head.model.lm_head.weight.grad.any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [1, 150, 2**24])
def test_log_ratios_and_their_gradients(name, chunk, monkeypatch):
    monkeypatch.setattr(trl_rlad.lm_head, "CHUNK_SIZE", chunk)
    model = make_model(name)
    head = LMHead(model, 0.7)
    labels, ids = IDS[0, 1:], torch.randint(40, (8, 4), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(8, 4, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    logps = reference(model, IDS, 0.7)
    expected = logps.gather(1, ids) - logps.gather(1, labels[:, None])
    (expected * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with head.on_hidden_states(lambda states: found.append(head.log_ratios(states[0, :-1], labels, ids))):
        found = []
        model(input_ids=IDS)
    (found[0] * weights).sum().backward()
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)
    assert model.get_output_embeddings().weight.grad.any()


def test_a_bias_of_the_lm_head():
    model = make_model("plain")
    model.lm_head = torch.nn.Linear(16, 40, dtype=torch.double)
    head = LMHead(model, 1.0)
    states, ids = listen(model, head, IDS), torch.arange(8).view(8, 1)
    logps = reference(model, IDS, 1.0)
    torch.testing.assert_close(
        head.top_k(states, IDS[0, 1:], 40)[2].double(), logps.sort(descending=True)[0], rtol=0, atol=1e-5
    )
    expected = logps.gather(1, ids) - logps.gather(1, IDS[0, 1:, None])
    torch.testing.assert_close(head.log_ratios(states, IDS[0, 1:], ids).double(), expected, rtol=0, atol=1e-5)


def test_states_of_another_dtype_than_the_head():
    # as autocast leaves them
    head = LMHead(make_model("plain").float(), 1.0)
    states = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    logps, _, _ = head.top_k(states, IDS[0, 1:], 3)
    logits = states.float() @ head.model.lm_head.weight.detach().T
    torch.testing.assert_close(logps, logits.log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"logit_scale": 0.3}, 0.3),
        ({"output_multiplier": 0.4}, 0.4),
        ({"lm_head_multiplier": 0.6}, 0.6),
        ({"logits_scaling": 5.0, "model_type": "granite"}, 0.2),
        ({"logits_scaling": 5.0, "model_type": "hyperclovax"}, 5.0),
    ],
)
def test_what_logits_are_multiplied_by_is_said_by_the_text_models_configuration(settings, scale):
    text_config = SimpleNamespace(**settings, final_logit_softcapping=7.0)
    config = SimpleNamespace(logit_scale=9.0, final_logit_softcapping=None, get_text_config=lambda: text_config)
    head = LMHead(SimpleNamespace(config=config), 1.0)
    assert (head.scale, head.cap) == (pytest.approx(scale), 7.0)


def test_a_gradient_in_bfloat16_is_added_up_in_float32():
    # 1,000 small ones on one row: in bfloat16 they would be lost beside their sum
    weight = torch.nn.Parameter(torch.ones(4, 2, dtype=torch.bfloat16))
    head = LMHead(make_model("plain"), 1.0)
    head.model = SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=weight, bias=None))
    labels = torch.zeros(1000, dtype=torch.long)
    head.log_ratios(torch.ones(1000, 2, dtype=torch.bfloat16), labels, labels[:, None] + 1).sum().backward()
    assert weight.grad[:2].tolist() == [[-1000.0, -1000.0], [1000.0, 1000.0]] and not weight.grad[2:].any()


def test_in_bfloat16_the_difference_stays_in_float32():
    model = make_model("plain").bfloat16()
    head = LMHead(model, 1.0)
    states = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    log_ratios = head.log_ratios(states, IDS[0, 1:], IDS[0, :-1, None])
    logits = states.double() @ model.lm_head.weight.double().T
    expected = logits.gather(1, IDS[0, :-1, None]) - logits.gather(1, IDS[0, 1:, None])
    torch.testing.assert_close(log_ratios.double(), expected, rtol=0, atol=1e-5)
