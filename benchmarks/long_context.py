"""
Measure the peak memory of scoring rows of 32,768 tokens with named tokens from a vocabulary of 152,000, part by part.

    python benchmarks/long_context.py

The teacher is tiny, so that what doesn't depend on its size is seen; on a CPU, above the memory of its weights.
"""

import argparse

import torch
from accelerate import Accelerator
from teacher_scoring import TINY, bare_teacher, make_batch, peak_memory
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_rlad import RLADConfig, TeacherScorer
from trl_rlad.lm_head import LMHead
from trl_rlad.scoring import RowScorer
from trl_rlad.teachers import TokenContract


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768, help="of each row")
    parser.add_argument("--rows", type=int, default=2, help="of the batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = TINY | {"vocab_size": 152_000, "max_position_embeddings": options.tokens}
    args = RLADConfig("unused", use_cpu=True, bf16=False)
    accelerator = Accelerator(cpu=True)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=False))
    teacher = bare_teacher(model, args, accelerator)
    teacher.shares_prompts, teacher.lm_head = False, LMHead(model, 1.0)
    prompt = 256
    batch = make_batch([(prompt, options.tokens - prompt)] * options.rows, teacher.vocab_size, accelerator.device)
    contract = TokenContract(teacher, (), range(teacher.vocab_size))
    kept = {}

    def forward():
        with torch.no_grad():
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)[:1]
            kept["states"] = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]

    def head():
        labels = batch["completion_ids"][0]
        kept["named"] = teacher.lm_head.top_k(kept["states"][-len(labels) :], labels, 8)

    def score(top_k):
        scorer = TeacherScorer({"": RowScorer(teacher, accelerator, 16384, contract)})
        kept["scores"] = scorer.score(batch, batch["completion_mask"], top_k)

    parts = {
        "the body's pass over one row": forward,
        "the head's, with eight named tokens": head,
        "the scorer, without named tokens": lambda: score(0),
        "the scorer, with eight": lambda: score(8),
    }
    print(f"{options.rows} rows of {options.tokens:,} tokens\n\n| part | peak memory, MiB |\n|---|---|")
    for name, part in parts.items():
        print(f"| {name} | {peak_memory(part, accelerator.device):.0f} |", flush=True)
    size = sum(each.nbytes for name in ("ids", "logps") for each in kept["scores"][f"teacher_top_{name}"])
    print(f"| of it the named tokens that the batch keeps | {size / 2**20:.0f} |")


if __name__ == "__main__":
    main()
