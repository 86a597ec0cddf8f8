"""The kinds of teacher within one process, and the set-ups that are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from hub_server import HubServer
from peft import LoraConfig, PeftModel, get_peft_model
from test_teacher_scorer import assert_names, make_batch, naive_scores
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_rlad import RLADTrainer
from trl_rlad.teachers import LocalTeacher, create_teacher


LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")


def score(teacher, batch):
    scores = tiny.make_scorer(teacher, 40).score(batch, batch["completion_mask"])
    return scores["teacher_per_token_logps"]


def make_teacher(teacher_model, tmp_path, **kwargs):
    return LocalTeacher(teacher_model, tiny.make_config(tmp_path, **kwargs), Accelerator(cpu=True))


def test_offloaded_weights_leave_the_device(tmp_path, teacher_path):
    # Without a GPU, a copy on the same device shows what moves: on the device, the weights are others than on the host
    teacher = make_teacher(teacher_path, tmp_path, teacher_offload="cpu")
    parameter = next(teacher.model.parameters())
    home, move = parameter.data_ptr(), teacher.model.to
    teacher.model.to = lambda device: teacher.model._apply(torch.clone) and move(device)
    with teacher.placed():
        away = parameter.data_ptr()
    assert away != home and parameter.data_ptr() == home
    batch = make_batch()
    for _ in range(2):
        torch.testing.assert_close(score(teacher, batch), naive_scores(teacher_path, batch, 1.0), rtol=0, atol=1e-5)


def test_a_released_teacher_comes_back(tmp_path, teacher_path):
    teacher, batch = make_teacher(teacher_path, tmp_path), make_batch()
    before = score(teacher, batch)
    teacher.release()
    assert torch.equal(score(teacher, batch), before)


def test_dtype_of_the_checkpoint_by_default(tmp_path, teacher_path):
    AutoModelForCausalLM.from_pretrained(teacher_path).bfloat16().save_pretrained(tmp_path / "bf16")
    tiny.make_tokenizer().save_pretrained(tmp_path / "bf16")
    assert make_teacher(str(tmp_path / "bf16"), tmp_path).model.dtype == torch.bfloat16
    kwargs = {"teacher_model_init_kwargs": {"dtype": "float32", "attn_implementation": "eager"}}
    model = make_teacher(str(tmp_path / "bf16"), tmp_path, **kwargs).model
    assert model.dtype == torch.float32 and model.config._attn_implementation == "eager"


def test_an_adapter_from_disk(tmp_path, teacher_path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(teacher_path), LORA)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would make the adapter the identity
            torch.nn.init.normal_(p, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    teacher, batch = make_teacher(str(tmp_path / "adapter"), tmp_path), make_batch()
    expected = naive_scores(tmp_path / "merged", batch, 1.0)
    assert teacher.name == "adapter"
    torch.testing.assert_close(score(teacher, batch), expected, rtol=0, atol=1e-5)
    assert (expected - naive_scores(teacher_path, batch, 1.0)).abs().max() > 0.1


def test_a_revision_is_asked_for_everywhere(tmp_path, teacher_path, monkeypatch):
    # The calls are recorded, as folders have no revisions; those of a Hub, which need a process of their own, are
    # below
    asked = set()

    def record(cls, position):
        real = cls.from_pretrained.__func__

        def from_pretrained(self, *args, **kwargs):
            asked.add((cls.__name__, str(args[position]), kwargs.get("revision")))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(from_pretrained))

    adapter = str(tmp_path / "adapter")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(teacher_path), LORA)
    adapted.peft_config["default"].revision = "v2"
    adapted.save_pretrained(adapter)
    tiny.make_tokenizer().save_pretrained(adapter)
    for cls, position in ((PreTrainedModel, 0), (AutoConfig, 0), (AutoTokenizer, 0), (PeftModel, 1)):
        record(cls, position)
    for path in (teacher_path, adapter):
        make_teacher(path, tmp_path, teacher_model_revision="v1")
    assert all(revision for _, _, revision in asked) and asked >= {
        ("AutoConfig", teacher_path, "v1"),
        ("PreTrainedModel", teacher_path, "v1"),
        ("AutoTokenizer", teacher_path, "v1"),
        ("AutoConfig", teacher_path, "v2"),  # the adapter's base
        ("PreTrainedModel", teacher_path, "v2"),
        ("PeftModel", adapter, "v1"),
        ("AutoTokenizer", adapter, "v1"),
    }


SCORE = """
import sys

import tiny
import torch
from accelerate import Accelerator
from trl_rlad.teachers import LocalTeacher

folder, *names = sys.argv[1:]
results = {}
for name in names:
    args = tiny.make_config(folder, teacher_model_revision="v1")
    teacher = LocalTeacher(name, args, Accelerator(cpu=True))
    results[name] = teacher.score([torch.arange(4, 9)], [torch.arange(9, 15)])[0].logps, teacher.tokenizer("w0")
torch.save(results, f"{folder}/results.pt")
"""


@pytest.mark.slow
def test_a_revision_on_a_hub_is_that_of_weights_tokenizer_and_adapter(tmp_path, teacher_path):
    # On `main` there are other weights, tokenizers and adapters, and `v1` of the adapter has `v2` of the base
    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def save_adapter(seed, tokenizer, **kwargs):
        base, folder = AutoModelForCausalLM.from_pretrained(teacher_path), tmp_path / f"adapter{seed}"
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, **kwargs)
        adapted = get_peft_model(base, config)
        adapted.peft_config["default"].base_model_name_or_path = "tester/base"
        adapted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        adapted.merge_and_unload().save_pretrained(tmp_path / f"merged{seed}")
        return files(folder)

    reverse, right = tiny.make_tokenizer(tiny.WORDS[::-1]), tiny.make_tokenizer()
    other = files(Path(tiny.save_model(tmp_path / "other", seed=3, tokenizer=reverse, hidden_size=24, vocab_size=40)))
    with HubServer() as hub:
        hub.repos |= {"tester/teacher": other, "tester/teacher@v1": files(Path(teacher_path))}
        hub.repos |= {"tester/base": other, "tester/base@v2": files(Path(teacher_path))}
        hub.repos["tester/adapter"] = save_adapter(0, reverse)
        hub.repos["tester/adapter@v1"] = save_adapter(1, right, revision="v2")
        env = hub.env(tmp_path / "home") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SCORE, str(tmp_path), "tester/teacher", "tester/adapter"]
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
        assert ran.returncode == 0, ran.stderr[-2000:]
    ids = torch.arange(4, 15)[None]
    for name, path in (("tester/teacher", teacher_path), ("tester/adapter", tmp_path / "merged1")):
        logps, tokens = torch.load(tmp_path / "results.pt", weights_only=False)[name]
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path)(ids).logits[0, 4:-1]
        expected = logits.log_softmax(-1).gather(1, ids[0, 5:, None])[:, 0]
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
        assert tokens["input_ids"] == [4]


def test_the_students_base_names_tokens_as_plain_passes_do(tmp_path, student_path):
    # The student has dropout, and is in train mode when the teacher is asked
    student = AutoModelForCausalLM.from_pretrained(student_path, attention_dropout=0.5)
    peft_config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.5, init_lora_weights=False)
    settings = {"alpha": 1.0, "teacher_kl_coef": 0.5, "teacher_kl": "forward", "teacher_top_k": 4}
    args = tiny.make_config(tmp_path, temperature=0.7, per_device_train_batch_size=16, **settings)
    options = {"peft_config": peft_config, "teacher_model": "base", "processing_class": tiny.make_tokenizer()}
    trainer = RLADTrainer(student, tiny.reward, args, tiny.make_dataset(), **options)
    trainer.model.train()
    batch = trainer._prepare_inputs([tiny.make_dataset()[i] for i in range(4) for _ in range(4)])
    assert trainer.model.training
    assert_names(batch, student_path, batch, 4, temperature=0.7)


def test_the_names_of_a_teacher_in_bfloat16(tmp_path, teacher_path):
    AutoModelForCausalLM.from_pretrained(teacher_path).bfloat16().save_pretrained(tmp_path / "bf16")
    tiny.make_tokenizer().save_pretrained(tmp_path / "bf16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    teacher = make_teacher(str(tmp_path / "bf16"), tmp_path, temperature=0.7)
    ids = torch.randint(4, 32, (1, 30), generator=torch.Generator().manual_seed(0))
    scores = teacher.score([ids[0, :5]], [ids[0, 5:]], 40)[0]
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0, 4:-1]
    logits = states.double() @ model.lm_head.weight.detach().double().T / 0.7
    expected = logits.log_softmax(-1)
    # The logits are rounded to bfloat16, to 2**-9 of their size and of the normalizer's; all that comes after them
    # isn't
    bound = 2**-8 * logits.abs().max().item()
    torch.testing.assert_close(scores.top_logps.double(), expected.gather(1, scores.top_ids), rtol=0, atol=bound)
    torch.testing.assert_close(scores.logps.double(), expected.gather(1, ids[0, 5:, None])[:, 0], rtol=0, atol=bound)
    torch.testing.assert_close(scores.top_logps.double().exp().sum(-1), torch.ones(25).double(), rtol=0, atol=1e-5)


def test_the_students_base_as_teacher(tmp_path, student_path):
    config = tiny.make_config(tmp_path)
    dataset = tiny.make_dataset()
    trainer = RLADTrainer(student_path, tiny.reward, config, dataset, peft_config=LORA, teacher_model="base")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved and all("lora" in name for name in moved)

    teacher, batch = trainer.teacher_scorer.teachers[""], make_batch()
    trainer.model.train()
    torch.testing.assert_close(score(teacher, batch), naive_scores(student_path, batch, 1.0), rtol=0, atol=1e-5)
    assert trainer.model.training and trainer.model.active_adapters == ["default"], "the student should be as before"
    assert teacher.max_length == 4096  # its positions, too
    # no second copy: the teacher's parameters are the student's
    assert {id(p) for p in teacher.model.parameters()} == {id(p) for p in trainer.model.parameters()}
    assert "without the adapter" in teacher.name


@pytest.mark.parametrize("positions", [6, 16])
def test_a_teacher_of_few_learned_positions(positions, tmp_path, teacher_path):
    # The check of its cache tries no row that is longer
    config = GPT2Config(vocab_size=40, n_positions=positions, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny.make_tokenizer().save_pretrained(tmp_path / "gpt2")
    teacher = LocalTeacher(str(tmp_path / "gpt2"), tiny.make_config(tmp_path), Accelerator(cpu=True))
    batch = make_batch(prompt=2, completion=4)
    scores = tiny.make_scorer(teacher).score(batch, batch["completion_mask"])["teacher_per_token_logps"]
    torch.testing.assert_close(scores, naive_scores(tmp_path / "gpt2", batch, 1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_students_base_leaves_the_student_in_its_mode(training, tmp_path, student_path):
    config, dataset = tiny.make_config(tmp_path), tiny.make_dataset()
    trainer = RLADTrainer(student_path, tiny.reward, config, dataset, peft_config=LORA, teacher_model="base")
    trainer.model.train(training)
    with trainer.teacher_scorer.teachers[""].placed():
        assert not trainer.model.training
    assert trainer.model.training == training


def accelerator_of(distributed_type, zero_stage=None):
    """
    A stand-in: these launches can't be had in one process without a GPU. `test_distributed.py` has the real ones.
    """

    class Stub:
        device = torch.device("cpu")

        class state:
            class deepspeed_plugin:
                pass

            class fsdp_plugin:
                fsdp_version = 2

    Stub.distributed_type, Stub.state.deepspeed_plugin.zero_stage = distributed_type, zero_stage
    return Stub


@pytest.mark.parametrize(
    ("distributed_type", "kwargs", "message"),
    [
        ("NO", {"teacher_zero_stage": 3}, "`teacher_zero_stage=3` needs DeepSpeed: launch with"),
        ("MULTI_GPU", {"teacher_zero_stage": 0}, "`teacher_zero_stage=0` needs DeepSpeed"),
        ("FSDP", {"teacher_offload": "cpu"}, "fsdp_offload_params: true"),
        (
            "DEEPSPEED",
            {"teacher_zero_stage": 3, "teacher_model_init_kwargs": {"quantization_config": {}}},
            "quantized",
        ),
        ("FSDP", {"teacher_model_init_kwargs": {"quantization_config": {}}}, "A quantized teacher is whole"),
        ("NO", {"teacher_offload": "cpu", "teacher_model_init_kwargs": {"quantization_config": {}}}, "stays on its"),
        ("NO", {"teacher_model_init_kwargs": {"foo": 1}}, "`teacher_model_init_kwargs={'foo': 1}`"),
    ],
)
def test_refused_set_ups(distributed_type, kwargs, message, tmp_path, teacher_path):
    args, accelerator = tiny.make_config(tmp_path, **kwargs), accelerator_of(DistributedType[distributed_type], 2)
    with pytest.raises(ValueError, match=message):
        create_teacher(teacher_path, args, accelerator, None, None)


def test_settings_can_be_written_as_json(tmp_path):
    init_kwargs = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.bfloat16}
    args = tiny.make_config(tmp_path, teacher_model_init_kwargs=init_kwargs)
    text = args.to_json_string()
    assert '"quant_method": "bitsandbytes"' in text and '"dtype": "bfloat16"' in text
    assert isinstance(args.teacher_model_init_kwargs["quantization_config"], BitsAndBytesConfig)  # and stays one


def test_only_causal_language_models_teach(tmp_path):
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a causal language model, but .* is a `BertForMaskedLM`"):
        make_teacher(str(tmp_path), tmp_path)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a causal language model, but .* is a `T5ForCond"):
        make_teacher(str(tmp_path), tmp_path)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("shares_prompts", [True, False])
def test_neither_mask_nor_positions_are_needed(attn_implementation, shares_prompts, tmp_path, teacher_path):
    kwargs = {"attn_implementation": attn_implementation}
    teacher = make_teacher(teacher_path, tmp_path, teacher_model_init_kwargs=kwargs)
    teacher.shares_prompts = shares_prompts
    assert teacher.model.config._attn_implementation == attn_implementation
    batch = make_batch(rows=6, prompt=20, completion=6)
    batch["prompt_ids"][1:4], batch["prompt_mask"][1:4] = batch["prompt_ids"][:1], batch["prompt_mask"][:1]
    torch.testing.assert_close(score(teacher, batch), naive_scores(teacher_path, batch, 1.0), rtol=0, atol=1e-5)


def test_a_cache_that_cannot_be_shared(tmp_path, teacher_path, monkeypatch, caplog):
    def refuse(*_):
        raise NotImplementedError("no copies")

    monkeypatch.setattr("transformers.DynamicCache.batch_repeat_interleave", refuse)
    teacher, batch = make_teacher(teacher_path, tmp_path), make_batch(rows=4, prompt=30, completion=4)
    batch |= {"prompt_mask": torch.ones(4, 30, dtype=torch.long), "prompt_ids": batch["prompt_ids"][:1].expand(4, -1)}
    scorer = tiny.make_scorer(teacher, 1000)
    scores = scorer.score(batch, batch["completion_mask"])["teacher_per_token_logps"]
    torch.testing.assert_close(scores, naive_scores(teacher_path, batch, 1.0), rtol=0, atol=1e-5)
    assert "on a shared prompt, so each completion runs its own" in caplog.text and not teacher.shares_prompts


def test_a_teacher_that_runs_out_of_memory_takes_smaller_batches(tmp_path, teacher_path, caplog):
    # A GPU's error, raised here by hand above a number of rows
    teacher, batch = make_teacher(teacher_path, tmp_path), make_batch()
    score_rows = teacher.score

    def score_few(prompts, completions, *args):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return score_rows(prompts, completions, *args)

    teacher.score = score_few
    scorer = tiny.make_scorer(teacher, 1000, nameable_ids=range(40))
    assert_names(scorer.score(batch, batch["completion_mask"], 3), teacher_path, batch, 3)
    assert "`teacher_tokens_per_batch=" in caplog.text and scorer.scorers[""].tokens_per_batch < 60


def test_out_of_memory_never_raises_the_number_of_tokens_at_once(tmp_path, teacher_path):
    # On a shared prompt a micro-batch has more rows than would fit with a prompt each
    teacher, batch = make_teacher(teacher_path, tmp_path), make_batch(rows=4, prompt=30, completion=4)
    batch |= {"prompt_mask": torch.ones(4, 30, dtype=torch.long), "prompt_ids": batch["prompt_ids"][:1].expand(4, -1)}
    score_rows, sizes = teacher.score, []

    def score_few(prompts, *args):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return score_rows(prompts, *args)

    teacher.score = score_few
    scorer = tiny.make_scorer(teacher, 50)
    scorer.score(batch, batch["completion_mask"])
    assert max(sizes) > 2 and scorer.scorers[""].tokens_per_batch <= 50


def test_a_sharded_teacher_that_runs_out_of_memory_does_not_go_on_alone(tmp_path, teacher_path):
    # The other processes are in the middle of the pass that has failed here, and would wait forever
    teacher, batch, sizes = make_teacher(teacher_path, tmp_path), make_batch(), []

    def fail(prompts, *args):
        sizes.append(len(prompts))
        raise torch.OutOfMemoryError

    teacher.score, teacher.is_sharded = fail, True
    with pytest.raises(torch.OutOfMemoryError):
        tiny.make_scorer(teacher, 1000).score(batch, batch["completion_mask"])
    assert len(sizes) == 1 and sizes[0] > 1


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_teacher(bits, tmp_path):
    teacher_path = str(Path(__file__).parent.parent / "examples" / "mini" / "teacher")  # wide enough for blocks of 64
    kwargs = {"quantization_config": {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}, "dtype": "float32"}
    teacher, batch = make_teacher(teacher_path, tmp_path, teacher_model_init_kwargs=kwargs), make_batch()
    assert teacher.model.is_quantized and any(p.dtype in (torch.uint8, torch.int8) for p in teacher.model.parameters())
    quantized, exact = score(teacher, batch), naive_scores(teacher_path, batch, 1.0)
    mask = batch["completion_mask"].bool()
    assert 0 < (quantized - exact)[mask].abs().mean() < 0.5
    teacher.release()
    assert torch.equal(score(teacher, batch), quantized)
