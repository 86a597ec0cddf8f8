"""
Count what the hasty student of `benchmarks/comparison.py` gets wrong first, before and after training by each method.

    python benchmarks/mistakes.py

Held-out puzzles of four people, sampled as in the comparison, by the first token that differs from the worked solution.
Four minutes on two CPU cores.
"""

import argparse
import multiprocessing
import os
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import comparison
import torch
from comparison import COMPARISON, MAX_COMPLETION_LENGTH, STUDENTS, make_dataset
from sampling import sample
from transformers import AutoModelForCausalLM, PrinterCallback


METHODS = ("before", "GRPO", "RLAD", "KDRL 0.2", "KDRL k3", "on-policy distillation")
KINDS = ("right", "`ok` too early", "`ok` missed", "wrong name", "other")


def classify(completion, solution):
    """Kind of the first mistake."""
    for index, (word, right) in enumerate(zip_longest(completion.split(), solution.split())):
        if word != right:
            if word == "ok":
                return "`ok` too early"
            if right == "ok":
                return "`ok` missed"
            return "wrong name" if index % 2 == 1 else "other"
    return "right"


def count(method, steps, rate, seed, output_dir):
    """Train by `method` with the strong teacher, and count the mistakes of four people's puzzles."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(output_dir / "hasty_student")
    if method != "before":
        trainer = comparison.make_trainer("hasty", method, "strong", rate, seed, steps, output_dir)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model = trainer.model
    puzzles = make_dataset([4], 200, seed=0, held_out=True)
    settings = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": MAX_COMPLETION_LENGTH, "batch_size": 200}
    completions = sample(model, list(puzzles["prompt"]), **settings)
    return Counter(
        classify(texts[0], solution) for texts, solution in zip(completions, puzzles["solution"], strict=True)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs", "comparison"), help="that of the comparison"
    )
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="learning rate of all methods")
    parser.add_argument("--seed", type=int, default=1, help="seed of the puzzles and the rollouts")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    if not (student := args.output_dir / "hasty_student").exists():
        COMPARISON["hasty_student"](student)
    steps = STUDENTS["hasty"]["steps"]
    jobs = [(method, steps, args.learning_rate, args.seed, args.output_dir) for method in METHODS]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        counts = pool.starmap(count, jobs, chunksize=1)
    print("\n| method | " + " | ".join(KINDS) + " |\n|" + "---|" * (len(KINDS) + 1))
    for method, found in zip(METHODS, counts, strict=True):
        print(f"| {method} | " + " | ".join(f"{found[kind] / found.total():.1%}" for kind in KINDS) + " |")


if __name__ == "__main__":
    main()
