"""
What the checks at the start of training cost, beside the loading of the teacher: CPU seconds of one core.

    python benchmarks/startup.py

For a vocabulary of 152,000 tokens, 10,000 prompts of about 200 tokens, and 600M parameters in bfloat16.
"""

import time
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_rlad.checkpoints import describe_teacher
from trl_rlad.teachers import TokenContract
from trl_rlad.teachers.contract import longest_prompt
from trl_rlad.teachers.loading import find_non_finite


VOCABULARY, PROMPTS, PARAMETERS = 152_000, 10_000, 600_000_000


def main():
    torch.set_num_threads(1)
    words = {f"word{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    student, teacher = (PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="word1") for _ in range(2))
    model = torch.nn.Linear(30_000, PARAMETERS // 30_000, bias=False, dtype=torch.bfloat16)
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
    }
    total = 0.0
    for name, check in checks.items():
        start = time.process_time()
        check()
        total += (seconds := time.process_time() - start)
        print(f"{name:>32}  {seconds:5.2f} s")
    print(f"{'in all':>32}  {total:5.2f} s")


if __name__ == "__main__":
    main()
