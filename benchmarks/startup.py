"""
What the checks at the start of training cost, beside the loading of the teacher: CPU seconds of one core.

    python benchmarks/startup.py

For a vocabulary of 152,000 tokens, 10,000 prompts of about 200 tokens, and a teacher of 600M parameters in float32.
"""

import argparse
import time
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trl_rlad import RLADConfig
from trl_rlad.checkpoints import describe_teacher
from trl_rlad.teachers import LocalTeacher, TokenContract
from trl_rlad.teachers.contract import longest_prompt
from trl_rlad.teachers.loading import find_non_finite


VOCABULARY, PROMPTS = 152_000, 10_000
SHAPE = {  # of Qwen3-0.6B
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}


def make_teacher(model):
    """A teacher of a model that is there, before its trial."""
    teacher = LocalTeacher.__new__(LocalTeacher)
    teacher.args, teacher.accelerator = RLADConfig("none", use_cpu=True, bf16=False), Accelerator(cpu=True)
    teacher.source, teacher.name, teacher.config, teacher.temperature = model, "", model.config, 1.0
    teacher.max_length = model.config.max_position_embeddings
    teacher.set_up(model)
    return teacher


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    words = {f"word{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    student, teacher = (PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="word1") for _ in range(2))
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    teacher_model = make_teacher(model)
    prompts = [" ".join(f"word{i * j % VOCABULARY}" for j in range(150 + i % 100)) for i in range(PROMPTS)]
    checks = {
        "tokenizer contract": lambda: TokenContract.between(
            student, SimpleNamespace(tokenizer=teacher, eos_token_ids={1}, vocab_size=VOCABULARY), [1]
        ),
        "fingerprint of the vocabulary": lambda: describe_teacher(
            SimpleNamespace(tokenizer=teacher, name="", config=None), 1.0
        ),
        "longest prompt": lambda: longest_prompt(prompts, student),
        "finite weights": lambda: find_non_finite(model),
        "scores against the model's own logits": teacher_model.try_roads,
    }
    total = 0.0
    for name, check in checks.items():
        start = time.process_time()
        check()
        total += (seconds := time.process_time() - start)
        print(f"{name:>40}  {seconds:5.2f} s")
    print(f"{'in all':>40}  {total:5.2f} s")


if __name__ == "__main__":
    main()
