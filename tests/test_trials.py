"""The model itself is the reference: what is tried at the start, and what follows from it."""

import pytest
import tiny
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from test_padding import train
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from trl import GRPOTrainer

from trl_rlad import RLADTrainer
from trl_rlad.scoring import RowScorer
from trl_rlad.scoring.rows import Row
from trl_rlad.teachers import LocalTeacher, TokenContract
from trl_rlad.trials import rotates_by_length


SIZE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
ORIGINAL = 32  # the positions of the first training, which is where longrope switches
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [4.0, 8.0, 12.0, 16.0],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": LONGROPE,
    "dynamic": DYNAMIC,
}
SCALES = {
    "Llama": (LlamaForCausalLM, LlamaConfig, {}),
    "Granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "Gemma 2": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 1.5, "sliding_window": 8}),
}


def save(path, family="Llama", rope="default", **kwargs):
    model_class, config_class, settings = SCALES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZE | settings | {"rope_parameters": ROPES[rope]} | kwargs))
    model.save_pretrained(path)
    tiny.make_tokenizer().save_pretrained(path)
    return str(path)


def save_adapter(path, base, seed=0, **kwargs):
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | kwargs)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(path)
    return str(path)


def load(path, base=None):
    """A model of its own, whose rotary embedding remembers no pass, without any road of ours."""
    model = AutoModelForCausalLM.from_pretrained(base or path)
    return (PeftModel.from_pretrained(model, path) if base else model).eval()


def rows_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(4, 32, (2, 60), generator=generator)
    tokens = torch.randint(4, 32, (len(lengths), 60), generator=generator)
    rows = zip(tokens, lengths, strict=True)
    return [(prompts[which][:prompt], row[:completion]) for row, (which, prompt, completion) in rows]


def plain(make_model, rows, temperature=1.0):
    """Log-probabilities of the whole vocabulary, of each row alone."""
    logps = []
    for prompt, completion in rows:
        with torch.no_grad():
            logits = make_model()(input_ids=torch.cat([prompt, completion])[None]).logits[0].float()
        logps.append((logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1))
    return logps


def score(teacher, rows, budget, top_k=0):
    """Scores of the rows as a run has them: grouped, cut into micro-batches and put back."""
    scores = RowScorer(teacher, Accelerator(cpu=True), budget).score([Row(*row, {}) for row in rows], top_k)
    by_row = {number: score for numbers, score in scores for number in numbers}
    return [by_row[number] for number in range(len(rows))]


def assert_scores(teacher, rows, expected, budget=1000, top_k=0):
    for score_of_row, logps, (_, ids) in zip(score(teacher, rows, budget, top_k), expected, rows, strict=True):
        torch.testing.assert_close(score_of_row.logps, logps.gather(1, ids[:, None])[:, 0], rtol=0, atol=2e-4)
        if top_k:
            torch.testing.assert_close(score_of_row.top_logps, logps.topk(top_k).values, rtol=0, atol=2e-4)


def make_teacher(path, tmp_path, **kwargs):
    return LocalTeacher(path, tiny.make_config(tmp_path / "out", **kwargs), Accelerator(cpu=True))


ADAPTERS = {
    "none": None,
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "up_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["down_proj"], "use_dora": True},
}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(SCALES)),
    st.sampled_from(sorted(ROPES)),
    st.sampled_from(sorted(ADAPTERS)),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([3, 26]), st.integers(1, 30)), min_size=2, max_size=6),
    st.sampled_from([1, 80, 1000]),
    st.sampled_from([0, 3]),
)
def test_any_rotary_embedding_scale_and_adapter_scores_as_the_model_itself(
    tmp_path_factory, family, rope, adapter, tied, lengths, budget, top_k
):
    folder = tmp_path_factory.mktemp("any")
    path = base = save(folder / "base", family, rope, tie_word_embeddings=tied)
    if ADAPTERS[adapter] is not None:
        path = save_adapter(folder / "adapter", base, **ADAPTERS[adapter])
    rows = rows_of(lengths)
    teacher = make_teacher(path, folder, temperature=0.7)
    expected = plain(lambda: load(path, base if path != base else None), rows, 0.7)
    assert_scores(teacher, rows, expected, budget, top_k)


# a. Rotary embeddings that depend on the length of the pass


def test_a_short_row_beside_a_long_one_and_a_shared_prompt_across_the_switch_of_longrope(tmp_path, caplog):
    path = save(tmp_path / "base", rope="longrope")
    teacher = make_teacher(path, tmp_path)
    assert not teacher.mixes_rows and not teacher.shares_prompts and not teacher.reads_logits
    assert "depends on what runs beside it, so each row runs alone" in caplog.text
    rows = rows_of([(0, 26, 3), (0, 26, 4), (0, 26, 20), (1, 4, 2)])
    expected = plain(lambda: load(path), rows)
    assert_scores(teacher, rows, expected)
    teacher.mixes_rows = True  # the fault that it is about
    with pytest.raises(AssertionError):
        assert_scores(teacher, rows, expected)


def test_dynamic_ntk_is_refused_beyond_its_positions(tmp_path):
    # In transformers it remembers the longest pass so far, so there is no number that a row has by itself
    path = save(tmp_path / "base", rope="dynamic")
    model, (short, long) = load(path), rows_of([(0, 50, 20), (0, 60, 59)])
    before = plain(lambda: model, [short])[0]
    plain(lambda: model, [long])
    assert (plain(lambda: model, [short])[0] - before).abs().mean() > 0.01
    teacher = make_teacher(path, tmp_path)
    assert teacher.max_length == 64 and teacher.mixes_rows
    with pytest.raises(ValueError, match='64 positions.*"rope_type": "yarn"'):
        TokenContract(teacher).check([Row(*short, {})])


@pytest.mark.parametrize("rope", ROPES)
def test_which_rotary_embeddings_depend_on_the_length(rope, tmp_path):
    model = load(save(tmp_path / "base", rope=rope))
    assert rotates_by_length(model, model.config, 256, 1e-3, torch.device("cpu")) == (rope in ("longrope", "dynamic"))
    rows = rows_of([(0, 5, 5)])  # and the trial leaves no trace
    assert torch.equal(plain(lambda: model, rows)[0], plain(lambda: load(tmp_path / "base"), rows)[0])


STUDENTS = {
    "longrope": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=LONGROPE)),
    "dynamic": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=DYNAMIC)),
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, eos_token_id=1, bos_token_id=None
        )
    ),
    "a state and no mask": lambda: RwkvForCausalLM(
        RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, intermediate_size=32)
    ),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_that_sees_the_padding_keeps_trls(kind, tmp_path, caplog):
    torch.manual_seed(0)
    STUDENTS[kind]().save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    kwargs = {"max_steps": 2, "gradient_accumulation_steps": 2, "num_iterations": 2}
    expected = train(GRPOTrainer, str(tmp_path), tmp_path / "grpo", **kwargs)
    weights = train(RLADTrainer, str(tmp_path), tmp_path / "rlad", **kwargs)
    assert "`trim_padding` is off" in caplog.text
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


# b. Logits that aren't the LM head's on the last hidden states


class CappedLlama(LlamaForCausalLM):
    """With a cap under a name that nobody knows."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output


@pytest.mark.parametrize("top_k", [0, 4])
def test_a_head_that_caps_its_logits_by_another_name(top_k, tmp_path, caplog):
    path = save(tmp_path / "base")
    model = CappedLlama.from_pretrained(path)
    teacher = make_teacher(model, tmp_path, temperature=0.7)
    assert teacher.reads_logits and teacher.mixes_rows and not teacher.shares_prompts
    assert "isn't its LM head on its last hidden states" in caplog.text
    rows = rows_of([(0, 26, 3), (0, 26, 4), (1, 26, 20), (1, 4, 1)])
    expected = plain(lambda: CappedLlama.from_pretrained(path), rows, 0.7)
    assert_scores(teacher, rows, expected, 100, top_k)
    teacher.reads_logits = False  # the fault that it is about
    with pytest.raises(AssertionError):
        assert_scores(teacher, rows, expected, 100, top_k)


# c. Adapters


@pytest.mark.parametrize("adapter", ["embeddings", "head"])
def test_an_adapter_of_tied_embeddings_changes_one_side_only(adapter, tmp_path):
    base = save(tmp_path / "base", tie_word_embeddings=True)
    path = save_adapter(tmp_path / "adapter", base, **ADAPTERS[adapter])
    rows = rows_of([(0, 26, 3), (0, 26, 4), (1, 4, 20)])
    expected = plain(lambda: load(path, base), rows)
    assert_scores(make_teacher(path, tmp_path), rows, expected)
    merged = PeftModel.from_pretrained(load(base), path).merge_and_unload()
    assert max((a - b).abs().max() for a, b in zip(plain(lambda: merged, rows), expected, strict=True)) > 1.0


def test_a_model_object_with_an_adapter_injected_into_its_head(tmp_path):
    base = save(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = inject_adapter_in_model(config, load(base))
    rows = rows_of([(0, 26, 3), (0, 26, 4), (1, 4, 20)])
    expected = plain(lambda: model, rows)
    teacher = make_teacher(model, tmp_path)
    assert_scores(teacher, rows, expected)
    assert teacher.reads_logits
    assert max((a - b).abs().max() for a, b in zip(plain(lambda: load(base), rows), expected, strict=True)) > 0.1


def test_an_adapter_on_a_base_in_4_bit(tmp_path):
    kwargs = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "dtype": "float32"}
    base = tiny.save_model(tmp_path / "base", 0, hidden_size=64, head_dim=32)
    path = save_adapter(tmp_path / "adapter", base, r=4)
    rows = rows_of([(0, 26, 3), (0, 26, 4), (1, 4, 20)])
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **kwargs), path).eval()
    expected = plain(lambda: reference, rows)
    teacher = make_teacher(path, tmp_path, teacher_model_init_kwargs=kwargs)
    assert_scores(teacher, rows, expected)


def test_adapters_of_one_base_of_which_one_has_a_head_of_its_own(tmp_path):
    base, bases = save(tmp_path / "base"), {}
    paths = [
        save_adapter(tmp_path / f"{seed}", base, seed, **ADAPTERS[name])
        for seed, name in enumerate(["attention", "saved", "head", "embeddings"])
    ]
    for path in paths[1:3]:  # what is saved whole is the base's at first
        weights = load_file(f"{path}/adapter_model.safetensors")
        weights = {name: value + 0.3 * ("lm_head.weight" in name) for name, value in weights.items()}
        save_file(weights, f"{path}/adapter_model.safetensors", {"format": "pt"})
    args = tiny.make_config(tmp_path / "out")
    teachers = [LocalTeacher(path, args, Accelerator(cpu=True), bases) for path in paths]
    rows = rows_of([(0, 26, 3), (0, 26, 4), (1, 4, 20)])
    for path, teacher in [*zip(paths, teachers, strict=True)] * 2:
        assert_scores(teacher, rows, plain(lambda path=path: load(path, base), rows))
