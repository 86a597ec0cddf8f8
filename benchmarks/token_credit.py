"""
What each objective makes of right and of wrong tokens: on chains of operators each step is known to be one or the
other, which no reward says.

    python benchmarks/token_credit.py > benchmarks/results/token_credit.md      # half a minute on one CPU core

The student of a bed as it starts, 500 prompts with 8 rollouts each, one update after it. Of each method the weight
that `gradient_weights.py` draws, averaged over right and over wrong tokens, of completions that succeeded, of those
that failed beside one that succeeded, and of groups in which all are alike; and its *contrast*, the gap between right
and wrong tokens in standard deviations of all weights: how well it tells the two apart. Models that don't come along
are those that `comparison.py` has made.
"""

import argparse
import random
from functools import partial
from pathlib import Path

import torch
from beds import BEDS
from gradient_weights import credit, grpo, kdrl, trrd, weight
from plain_pytorch import logps_of, sample
from transformers import AutoModelForCausalLM, AutoTokenizer
from variants import share_out

from trl_rlad.objective.teacher_kl import reverse_kl
from trl_rlad.scripts.tasks.chains import EOS, OPERATORS, VALUES, correctness_reward, draw_prompt, solve


PROMPTS, GROUP = 500, 8


def gate(logps, old, teacher, advantage):
    """GRPO on the tokens that TRRD's clipping leaves."""
    kept = weight(trrd, (logps - teacher).detach(), advantage) != 0
    return grpo(logps, old, teacher, advantage * kept)


def acceptance(logps, old, teacher, advantage):
    return grpo(logps, old, teacher, share_out(advantage, old, teacher))


def distillation(logps, old, teacher, advantage):
    return -reverse_kl(logps, teacher, 1.0)


METHODS = {
    "GRPO": grpo,
    "RLAD": trrd,
    "its gate alone": gate,
    "RLAD, no clamp": partial(trrd, clip=None),
    "credit": credit,
    "acceptance": acceptance,
    "KDRL, bounded, 0.2": partial(kdrl, clip=1.0),
    "on-policy distillation, bounded": distillation,
}


def is_right(prompt: str, words: list[str]) -> list[bool]:
    """Whether each word of a completion is what follows from the one before it, and the end where it should be."""
    *names, last = prompt.split()
    marks = []
    for index, word in enumerate(words):
        if index == len(names):
            marks.append(word == EOS)
        else:
            marks.append(VALUES.get(word) == OPERATORS[names[index]][VALUES.get(last, 0)])
        last = word
    return marks


@torch.no_grad()
def roll_out(bed, folder: Path):
    """Rollouts of a bed's student, each `(B, T)`: log(student / teacher), advantages, what counts, what is right."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(bed.path(name, folder)) for name in (bed.student, bed.teachers["strong"])
    )
    tokenizer, rng = AutoTokenizer.from_pretrained(bed.path(bed.student, folder)), random.Random(0)
    torch.manual_seed(0)
    prompts = [prompt for prompt in (draw_prompt(rng) for _ in range(PROMPTS)) for _ in range(GROUP)]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(prompt.split()) for prompt in prompts])
    completions, mask = sample(student, ids, tokenizer.eos_token_id)
    student.eval()
    log_ratio = logps_of(student, ids, completions) - logps_of(teacher.eval(), ids, completions)
    texts = [
        tokenizer.decode(row[counts], skip_special_tokens=True) for row, counts in zip(completions, mask, strict=True)
    ]
    solutions = [" ".join(map(str, solve(prompt))) for prompt in prompts]
    rewards = torch.tensor(correctness_reward(texts, solutions)).view(-1, GROUP)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    words = map(tokenizer.convert_ids_to_tokens, completions.tolist())
    right = torch.tensor([is_right(*pair) for pair in zip(prompts, words, strict=True)])
    return log_ratio, advantages.view(-1, 1).expand_as(log_ratio), mask, right


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--beds", nargs="+", default=["half_gpt", "half_qwen3", "soft_qwen3", "far_qwen3"], help="of `beds.py`"
    )
    parser.add_argument("--models", type=Path, default=Path("outputs", "comparison"), help="folder of the models")
    options = parser.parse_args()
    print("# What each objective makes of right and of wrong tokens\n")
    print(
        "`python benchmarks/token_credit.py`: weights of $\\nabla\\log\\pi_S$ in the first update, by kind of token."
    )
    for name in options.beds:
        log_ratio, advantages, mask, right = roll_out(BEDS[name], options.models)
        classes = {
            f"{what}, {mark}": (mask & right.eq(mark == "right") & chosen)
            for what, chosen in (
                ("succeeded", advantages > 0),
                ("failed", advantages < 0),
                ("all alike", advantages == 0),
            )
            for mark in ("right", "wrong")
        }
        print(f"\n## {name}\n\n| | {' | '.join(classes)} | contrast |\n|---|" + "---|" * (len(classes) + 1))
        shares = [tokens.sum() / mask.sum() for tokens in classes.values()]
        print(f"| share of tokens | {' | '.join(f'{share:.1%}' for share in shares)} | |")
        means = [log_ratio[tokens].mean() for tokens in classes.values()]
        print(f"| log(student / teacher), nats | {' | '.join(f'{each:+.2f}' for each in means)} | |")
        for method, objective in METHODS.items():
            weights = weight(objective, log_ratio.unsqueeze(0), advantages)
            means = [weights[tokens].mean() for tokens in classes.values()]
            gap = weights[mask & right].mean() - weights[mask & ~right].mean()
            contrast = gap / weights[mask].std()
            print(f"| {method} | {' | '.join(f'{each:+.2f}' for each in means)} | {contrast:.2f} |")
        gone = weight(trrd, log_ratio.unsqueeze(0), advantages) == 0
        shares = [gone[tokens].float().mean() for tokens in list(classes.values())[:4]]
        print(f"| what RLAD's gate drops | {' | '.join(f'{share:.0%}' for share in shares)} | | | |")


if __name__ == "__main__":
    main()
