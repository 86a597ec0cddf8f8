"""Tiny models, a word-level tokenizer, a dataset and a reward: whole training runs within seconds."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trl_rlad import RLADConfig


WORDS = [f"w{i}" for i in range(28)]


def make_tokenizer(words=WORDS, eos_token="<eos>"):
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<end>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos_token, unk_token="<unk>", padding_side="left"
    )


def make_model(seed, vocab_size=32, hidden_size=16, layers=2, tokenizer=None, scale=0.3):
    tokenizer = tokenizer or make_tokenizer()
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
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
