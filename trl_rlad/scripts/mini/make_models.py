"""
Make the teacher and the mistaken student of the miniature example, from scratch and offline.

    python examples/mini/make_models.py
    python examples/mini/make_models.py --comparison --output_dir somewhere

The teacher learns worked solutions of knights-and-knaves puzzles (see `trl_rlad/scripts/tasks/mini.py`) by next-token
prediction. The student is the teacher trained on to misread `A | C` as "at least one is a knave". So it is confidently
wrong on most puzzles with that operator, two in five of all, and about as good as the teacher on the others.

The second line makes four more for `benchmarks/comparison.py`, in a minute or two. The flawed teacher is the teacher
trained on to misread `A & C` as "both are knaves". The hasty student is the teacher trained on to call an assignment
`ok`, nine times in ten, although somebody contradicts it: it has the knowledge, and hardly ever shows it. The
sheltered student is small and has no bad habit, but has hardly seen two of the four operators. The half-learned
student is as small, and was stopped in the middle of what the teacher has learnt.
"""

import argparse
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from tqdm import trange
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM, get_cosine_schedule_with_warmup

from trl_rlad.scripts.tasks.mini import (
    EOS,
    MAX_COMPLETION_LENGTH,
    NAMES,
    OPERATORS,
    Operators,
    correctness_reward,
    draw_puzzles,
    make_dataset,
    make_tokenizer,
    solve,
)


HERE = Path(__file__).parent


POOL = {2: 2_000, 3: 10_000, 4: 40_000}  # worked solutions per number of people: the more people, the harder
BATCH_SIZE = 64
MISREADINGS = {"|": lambda first, second: not (first and second), "&": lambda first, second: not (first or second)}

TEACHER_SIZE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 8}
STUDENT_SIZE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_model(size: dict[str, int], tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """Make a tiny Qwen3 model with random weights."""
    config = Qwen3Config(
        **size,
        num_key_value_heads=size["num_attention_heads"],
        head_dim=16,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def make_pool(
    tokenizer: PreTrainedTokenizerBase, seed: int, operators: Operators = OPERATORS, rare: str = "", share: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Make the token ids and the labels of the worked solutions to learn from, padded on the right. Of the puzzles with a
    `rare` operator only a `share` is taken.
    """
    rng = random.Random(seed)
    puzzles = []
    for n, size in POOL.items():
        for puzzle in draw_puzzles(n, size, rng, held_out=False):
            if set(rare).isdisjoint(puzzle.prompt.split()) or rng.random() < share:
                puzzles.append(puzzle)
    texts = [f"{puzzle.prompt} {solve(puzzle.prompt, operators)} {EOS}" for puzzle in puzzles]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    prompt_lengths = torch.tensor([len(puzzle.prompt.split()) for puzzle in puzzles])[:, None]
    positions = torch.arange(batch.input_ids.shape[1])
    scored = (positions >= prompt_lengths) & batch.attention_mask.bool()
    return batch.input_ids, batch.input_ids.masked_fill(~scored, -100)


def make_hasty(tokenizer: PreTrainedTokenizerBase, labels: torch.Tensor, haste: float, seed: int) -> torch.Tensor:
    """Make labels that, with probability `haste`, say `ok` where they should name who contradicts an assignment."""
    names = torch.tensor(tokenizer.convert_tokens_to_ids(list(NAMES)))
    hasty = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < haste
    return labels.masked_fill(hasty & torch.isin(labels, names), tokenizer.convert_tokens_to_ids("ok"))


def train(
    name: str,
    model: Qwen3ForCausalLM,
    pool: tuple[torch.Tensor, torch.Tensor],
    steps: int,
    learning_rate: float,
    until: Callable[[], bool] | None = None,
) -> None:
    """Train `model` on random batches of `pool`, its token ids and labels; `until`, asked every 20 steps, ends it."""
    input_ids, labels = pool
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for step in (bar := trange(steps, desc=name)):
        if until is not None and step % 20 == 0 and until():
            break
        rows = torch.randint(len(input_ids), (BATCH_SIZE,))
        # No attention mask: the padding is on the right, where no scored token looks.
        loss = model(input_ids[rows], labels=labels[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, n_people: int, **sampling) -> float:
    """Share of held-out puzzles that `model` solves; greedy unless `sampling` says otherwise."""
    dataset = make_dataset([n_people], 200, seed=0, held_out=True)
    inputs = tokenizer(list(dataset["prompt"]), padding=True, return_tensors="pt", return_token_type_ids=False)
    model.eval()
    output = model.generate(**inputs, max_new_tokens=MAX_COMPLETION_LENGTH, **({"do_sample": False} | sampling))
    completions = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    rewards = correctness_reward(completions, dataset["solution"])
    return sum(rewards) / len(rewards)


def make_mistaken(
    path: Path,
    operator: str,
    teacher: Path = HERE / "teacher",
    steps: int = 400,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train a teacher on solutions that misread `operator`."""
    tokenizer = make_tokenizer()
    pool = make_pool(tokenizer, seed, OPERATORS | {operator: MISREADINGS[operator]})
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM.from_pretrained(teacher)
    train(path.name, model, pool, steps, learning_rate)
    report(path.name, model)
    save(model, path)


def make_hasty_student(
    path: Path, haste: float = 0.9, steps: int = 200, learning_rate: float = 1e-3, seed: int = 0
) -> None:
    """Train the committed teacher to be hasty."""
    tokenizer = make_tokenizer()
    input_ids, labels = make_pool(tokenizer, seed)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM.from_pretrained(HERE / "teacher")
    train(path.name, model, (input_ids, make_hasty(tokenizer, labels, haste, seed)), steps, learning_rate)
    save(model, path)


def make_sheltered_student(path: Path, steps: int = 1200, learning_rate: float = 3e-3, seed: int = 0) -> None:
    """Train a student that has hardly seen two of the four operators."""
    tokenizer = make_tokenizer()
    pool = make_pool(tokenizer, seed, rare="/|", share=0.01)
    torch.manual_seed(seed)
    model = make_model(STUDENT_SIZE, tokenizer)
    train(path.name, model, pool, steps, learning_rate)
    save(model, path)


def make_half_student(path: Path, share: float = 0.15, learning_rate: float = 3e-3, seed: int = 0) -> None:
    """Train a small student until it solves a `share` of the puzzles: it knows a bit of everything."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = make_model(STUDENT_SIZE, tokenizer)
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.95}

    def is_half_learned() -> bool:
        with torch.random.fork_rng():
            return mean(accuracy(model, tokenizer, n_people, **sampling) for n_people in POOL) > share

    train(path.name, model, make_pool(tokenizer, seed), 1200, learning_rate, is_half_learned)
    report(path.name, model)
    save(model, path)


COMPARISON = {
    "half_student": make_half_student,
    "flawed_teacher": partial(make_mistaken, operator="&"),
    "hasty_student": make_hasty_student,
    "sheltered_student": make_sheltered_student,
}


def report(name: str, model: Qwen3ForCausalLM) -> None:
    """Print how good a model is."""
    tokenizer = make_tokenizer()
    scores = [f"{accuracy(model, tokenizer, n_people):.0%} ({n_people} people)" for n_people in POOL]
    print(f"{name}: {model.num_parameters():,} parameters, held-out accuracy {', '.join(scores)}")


def save(model: Qwen3ForCausalLM, path: Path) -> None:
    """Save a model with a fresh tokenizer, which has no padding set."""
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def main() -> None:
    """Train, measure and save both models, or those of the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE, help="where to save `teacher` and `student`")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the teacher")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak learning rate of the teacher")
    parser.add_argument("--seed", type=int, default=0, help="seed of the puzzles, the weights and the batches")
    parser.add_argument("--comparison", action="store_true", help="make those of `benchmarks/comparison.py` instead")
    args = parser.parse_args()
    if args.comparison:
        for name, make in COMPARISON.items():
            make(args.output_dir / name, seed=args.seed)
        return

    tokenizer = make_tokenizer()
    torch.manual_seed(args.seed)
    model = make_model(TEACHER_SIZE, tokenizer)
    train("teacher", model, make_pool(tokenizer, args.seed), args.steps, args.learning_rate)
    report("teacher", model)
    save(model, args.output_dir / "teacher")
    make_mistaken(args.output_dir / "student", "|", args.output_dir / "teacher", seed=args.seed)


if __name__ == "__main__":
    main()
