"""Tiny models, a word-level tokenizer, a dataset and a reward: whole training runs within seconds."""

import os
import sys
from importlib.resources import files

import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trl_rlad import RLADConfig, TeacherScorer
from trl_rlad.scoring import RowScorer, ServedRowScorer
from trl_rlad.teachers import ServedTeacher, TokenContract


# One of Qwen's own, which knows tools and images
CHAT_TEMPLATE = files("trl").joinpath("chat_templates/qwen3_vl.jinja").read_text()
WORDS = [f"w{i}" for i in range(28)]


def make_tokenizer(words=WORDS, eos_token="<eos>"):
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<end>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos_token, unk_token="<unk>", padding_side="left"
    )


def make_chat_tokenizer(chat_template=CHAT_TEMPLATE):
    """A tokenizer that reads and writes any text, byte by byte, in a chat format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens={"image_token": "<|image_pad|>"},
        padding_side="left",
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|vision_start|>", "<|vision_end|>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


def make_processor(patch_size=4):
    """
    Qwen's, which is this one but for videos, for which it needs torchvision: patches of 4, and 2 by 2 in a token.
    """
    image_processor = Qwen2VLImageProcessorPil(patch_size=patch_size, merge_size=2, min_pixels=64, max_pixels=256)
    return PaddleOCRVLProcessor(image_processor, make_chat_tokenizer(), chat_template=CHAT_TEMPLATE)


def make_image(seed, width=16, height=8):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def save_vision_model(path, seed, hidden_size=16, processor=None):
    """Save a random Qwen3.5 that reads images, with its processor, and return the path as a string."""
    processor = processor or make_processor()
    tokenizer = processor.tokenizer
    text_config = {
        "vocab_size": len(tokenizer) + 10,  # padded, and the class that loads it adds a token
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    vision_config = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": processor.image_processor.patch_size,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 16,
    }
    config = Qwen3_5Config(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def make_image_dataset(counts, size=16):
    """Rows with so many images each, of several sizes, in turn."""
    rows = []
    for i in range(size):
        content = "ab" * (1 + i % 3)
        images = [make_image(10 * i + j, 16, 8 + 8 * (i % 2)) for j in range(counts[i % len(counts)])]
        rows.append({"prompt": [{"role": "user", "content": content}], "images": images})
    return Dataset.from_list(rows)


def make_model(seed, vocab_size=32, hidden_size=16, layers=2, tokenizer=None, scale=0.3, positions=4096, head_dim=8):
    tokenizer = tokenizer or make_tokenizer()
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        initializer_range=scale,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def save_model(path, seed, tokenizer=None, **kwargs):
    """Save a random model with its tokenizer, and return the path as a string."""
    tokenizer = tokenizer or make_tokenizer()
    make_model(seed, tokenizer=tokenizer, **kwargs).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def save_renamed(path, source):
    """
    Save the model at `source` with other ids for its words, and its rows with them: another tokenizer, the same model.
    """
    tokenizer = make_tokenizer(WORDS[::-1])
    model = AutoModelForCausalLM.from_pretrained(source)
    old, order = make_tokenizer().get_vocab(), torch.arange(model.config.vocab_size)
    for word, id in tokenizer.get_vocab().items():
        order[id] = old[word]
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.weight.copy_(part.weight[order].clone())
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def save_table(path, scores):
    """
    Save a model whose next token is by the last one alone: `scores` (V, V) are its logits, by the last and the next.
    """
    model = make_model(0, vocab_size=len(scores), hidden_size=len(scores), scale=0.0)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(len(scores)))
        model.get_output_embeddings().weight.copy_(scores.T / len(scores) ** 0.5)  # the last norm makes √V of the 1
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def make_dataset(size=32):
    # Prompts of one to four words, so that batches are ragged
    return Dataset.from_list(
        [{"prompt": " ".join(WORDS[(i * 5 + j) % 28] for j in range(1 + i % 4))} for i in range(size)]
    )


def reward(completion_ids, **kwargs):
    """Share of even ids: no two completions are quite alike, and some groups have no signal."""
    return [round(sum(i % 2 == 0 for i in ids) / len(ids), 1) for ids in completion_ids]


async def async_reward(completion_ids, **kwargs):
    return reward(completion_ids)


def expect_metrics(trainer):
    """
    A list that gets what `teacher/log_ratio` and `teacher/kl` are to be at each loss, by a plain pass of the student.
    """
    expected, compute_loss, args = [], trainer.compute_loss, trainer.args

    def watched(model, batch, *rest, **kwargs):
        inputs = {
            name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if name in batch
        }
        inputs["input_ids"] = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        inputs["attention_mask"] = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with torch.no_grad():
            logits = model(**inputs).logits[:, -batch["completion_ids"].size(1) - 1 : -1].double()
        logps = (logits / args.temperature).log_softmax(-1)
        x = logps.gather(2, batch["completion_ids"][:, :, None])[:, :, 0] - batch["teacher_per_token_logps"]
        mask = batch["teacher_mask"]
        rows = (
            batch["teacher_kl_on"][:, None] if "teacher_kl_on" in batch and args.distillation_fraction == 0.0 else True
        )
        if "teacher_top_ids" in batch:  # of the rows that have the divergence
            teacher, ids = (torch.cat(batch[f"teacher_top_{name}"]) for name in ("logps", "ids"))
            teacher, student = teacher.double(), logps[mask & rows].gather(1, ids.long())
            p, q = (each.exp().where(teacher.isfinite(), 0.0) for each in (teacher, student))
            rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
            kl = (p * (teacher - student)).where(teacher.isfinite(), 0.0).sum(-1) + rest_p * (rest_p / rest_q).log()
        else:
            clip = args.teacher_log_ratio_clip or float("inf")
            kl = torch.where(x.abs() < clip, x**2 / 2, clip * (x.abs() - clip / 2))[mask & rows]
        expected.append({"teacher/log_ratio": x[mask].mean().item(), "teacher/kl": kl.mean().item()})
        return compute_loss(model, batch, *rest, **kwargs)

    trainer.compute_loss = watched
    return expected


def make_config(output_dir, cls=RLADConfig, **kwargs):
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 5,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "loss_type": "grpo",
        "epsilon_high": 0.28,
    }
    return cls(str(output_dir), **{**defaults, **kwargs})


def make_scorer(teacher, tokens_per_batch=1000, unknown_ids=(), nameable_ids=(), **kwargs):
    """A scorer of one teacher, on one process; of a served one with its `on_failure`."""
    parts = teacher, Accelerator(cpu=True), tokens_per_batch, TokenContract(teacher, unknown_ids, nameable_ids)
    is_served = isinstance(teacher, ServedTeacher)
    return TeacherScorer({"": ServedRowScorer(*parts, **kwargs) if is_served else RowScorer(*parts)})


def leave():
    """
    End one of several processes, its work done. Left to itself it is aborted now and then under DeepSpeed, with a
    teacher or without one, as a thread outlives the interpreter ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def watch_batches(trainer):
    """A list to which training adds each generation batch, with the rows that it was made of."""
    finish, seen = trainer.guide.finish, []

    def watch(batch, rewards_per_func, rows):
        batch = finish(batch, rewards_per_func, rows)
        seen.append((batch, rows))
        return batch

    trainer.guide.finish = watch
    return seen
