"""
GRPO and RLAD on chains of operators in plain PyTorch, written from the equations (arXiv 2402.03300 and 2602.22495) and
sharing nothing with TRL or this library but the task and the models: does `comparison.py` measure the methods, or us?

    python benchmarks/plain_pytorch.py               # ten runs of a minute on one CPU core
    python benchmarks/plain_pytorch.py --report      # beside the library's runs in `results/chains_runs.jsonl`

Bed, rates, steps and rollouts are those of `comparison.py`: `half_gpt`, 300 steps of 16 x 8 rollouts in two updates.
"""

import argparse
import random
from itertools import chain
from pathlib import Path
from statistics import mean

import torch
from tables import add_result, read_results
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rlad.scripts.arguments import MINI
from trl_rlad.scripts.tasks.chains import LENGTH, draw_prompt, solve


RESULTS = Path(__file__).parent / "results"
RATES = {"GRPO": 2e-4, "RLAD": 5e-4}  # each method's best in `comparison.py`
STEPS, PROMPTS, GROUP, UPDATES, WARM_UP = 300, 16, 8, 2, 10
LOW, HIGH, ALPHA, BOUND = 0.2, 0.28, 0.5, 1.0


def logps_of(model, ids, completion):
    """Log-probability of each token of a completion `(B, T)` behind prompts of one length."""
    logits = model(torch.cat([ids, completion], 1)).logits[:, ids.size(1) - 1 : -1]
    return logits.log_softmax(-1).gather(2, completion.unsqueeze(2)).squeeze(2)


@torch.no_grad()
def sample(model, ids, end):
    """Sample at temperature 1. Returns token ids `(B, T)` and which of them count, the end included."""
    model.eval()
    tokens, cache, step = [], None, ids
    for _ in range(LENGTH + 1):
        out = model(step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, torch.multinomial(out.logits[:, -1].softmax(-1), 1)
        tokens.append(step)
    model.train()
    completion = torch.cat(tokens, 1)
    ended_before = (completion == end).cumsum(1) - (completion == end).long()
    return completion, ended_before == 0


def grade(tokenizer, end, prompt, completion):
    """1 if there are as many digits as operators, the last one right, and then the end."""
    words = tokenizer.convert_ids_to_tokens(completion.tolist())
    right = words[-1] == tokenizer.convert_ids_to_tokens(end) and words[-2] == str(solve(prompt)[-1])
    return float(right and all(word.isdigit() for word in words[:-1]))


def run(method, seed):
    """Train a student, and measure it on 4,000 fresh puzzles."""
    torch.manual_seed(seed)
    rng = random.Random(f"plain {seed}")
    tokenizer = AutoTokenizer.from_pretrained(MINI / "chains_gpt_half")
    end = tokenizer.eos_token_id
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(MINI / f"chains_gpt_{name}") for name in ("half", "strong")
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATES[method], weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(update / WARM_UP, 1.0))

    def draw(rng, size):
        prompts = [draw_prompt(rng) for _ in range(size)]
        return prompts, torch.tensor([tokenizer.convert_tokens_to_ids(each.split()) for each in prompts])

    for _ in range(STEPS):
        prompts, ids = draw(rng, PROMPTS)
        ids = ids.repeat_interleave(GROUP, 0)
        completion, mask = sample(student, ids, end)
        rewards = torch.tensor(
            [grade(tokenizer, end, prompts[i // GROUP], row) for i, row in enumerate(completion)]
        ).view(PROMPTS, GROUP)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        advantages = advantages.view(-1, 1)
        with torch.no_grad():
            old, guide = logps_of(student, ids, completion), logps_of(teacher, ids, completion)
        for part in torch.randperm(len(ids)).chunk(UPDATES):
            logps = logps_of(student, ids[part], completion[part])
            log_ratio = logps - old[part]
            if method == "RLAD":  # Eq. 3 and 5, the student against the teacher bounded as in Appendix B
                log_ratio = ALPHA * log_ratio + (1 - ALPHA) * (logps - guide[part]).clamp(-BOUND, BOUND)
            ratio, advantage = log_ratio.exp(), advantages[part]
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
            loss = -((gain * mask[part]).sum(1) / mask[part].sum(1)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            warm_up.step()
            optimizer.zero_grad()
    prompts, ids = draw(random.Random("plain, held out"), 4000)
    parts = [sample(student, part, end)[0] for part in ids.split(1000)]
    return mean(grade(tokenizer, end, *pair) for pair in zip(prompts, chain(*parts), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--report", action="store_true", help="only the table of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "plain_pytorch.jsonl"
    lines = read_results(path)
    done = [(line["method"], line["seed"]) for line in lines]
    for seed in options.seeds:
        for method in RATES:
            if (method, seed) not in done and not options.report:
                lines.append({"method": method, "seed": seed, "rate": RATES[method], "accuracy": run(method, seed)})
                add_result(path, lines[-1])
    library = read_results(RESULTS / "chains_runs.jsonl")
    print("| method | plain PyTorch | the library |\n|---|---|---|")
    for method, rate in RATES.items():
        job = {"student": "half_gpt", "method": method, "teacher": "strong", "rate": rate}
        theirs = [each["curve"][-1][1] for each in library if each["seed"] and job.items() <= each.items()]
        columns = [line["accuracy"] for line in lines if line["method"] == method], theirs
        print(f"| {method} | {' | '.join(', '.join(f'{each:.1%}' for each in column) for column in columns)} |")


if __name__ == "__main__":
    main()
