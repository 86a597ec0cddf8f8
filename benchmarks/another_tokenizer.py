"""
How much of what a teacher gives is left when its tokenizer isn't the student's, in miniature.

    python benchmarks/another_tokenizer.py            # 25 runs of a minute or two, after a teacher of ten minutes
    python benchmarks/another_tokenizer.py --report   # the table of what is there

The mistaken student (see `trl_rlad/scripts/mini/make_models.py`) has words for tokens. Its teacher is the committed
one, with the same words; or a smaller one that has learnt the same solutions in characters, each with the space before
it: of the words that a solution has, only the names of people are one token of both. Puzzles have two or three people.

Each run adds a line to the results, from which the study goes on if it is interrupted.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from tables import add_result, interval, read_results
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.scripts.arguments import MINI, read_method
from trl_rlad.scripts.mini.make_models import POOL, make_model, train
from trl_rlad.scripts.sampling import sample
from trl_rlad.scripts.tasks.mini import EOS, NAMES, OPERATORS, PAD, correctness_reward, make_dataset


RESULTS = Path(__file__).parent / "results" / "another_tokenizer.jsonl"
METHODS = {
    "GRPO": (None, "grpo"),
    "RLAD": ("words", "rlad"),
    "RLAD, characters": ("characters", "rlad"),
    "RLAD + named": ("words", "rlad_named"),
    "RLAD + named, characters": ("characters", "rlad_named"),
}
SEEDS, STEPS, ROLLOUTS, PUZZLES, PEOPLE = range(5), 60, 128, 1000, [2, 3]
ROUNDS = ((1000, 2e-3), (1000, 1e-3))  # steps and learning rates of the teacher of characters
LENGTH = 2 * 2**3 + 1  # tokens of the longest solution, in words
SIZE = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 6}


def make_character_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of characters, each with the space before it."""
    characters = [*"knok?:", *NAMES, *OPERATORS]
    tokens = dict.fromkeys([PAD, EOS, *characters, *(f" {each}" for each in characters)])
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" ?."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def make_pool(tokenizer):
    """Make the token ids and the labels of the worked solutions, as `make_models.py` does for words."""
    puzzles = [row for n in PEOPLE for row in make_dataset([n], POOL[n] // 2, 0, held_out=False)]
    texts = [f"{puzzle['prompt']} {puzzle['solution']}{EOS}" for puzzle in puzzles]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    lengths = torch.tensor([len(tokenizer(puzzle["prompt"])["input_ids"]) for puzzle in puzzles])[:, None]
    scored = (torch.arange(batch.input_ids.shape[1]) >= lengths) & batch.attention_mask.bool()
    return batch.input_ids, batch.input_ids.masked_fill(~scored, -100)


def measure(model, length=LENGTH) -> float:
    """Share of held-out puzzles that a model solves, 0 to 1."""
    puzzles = make_dataset(PEOPLE, PUZZLES, seed=0, held_out=True)
    with torch.random.fork_rng():
        completions = sample(
            model, list(puzzles["prompt"]), 1, max_new_tokens=length, temperature=0.6, top_p=0.95, batch_size=500
        )
    return mean(correctness_reward([each for (each,) in completions], puzzles["solution"]))


def make_teacher(path: Path):
    """Train the teacher of characters, in two rounds."""
    tokenizer = make_character_tokenizer()
    torch.manual_seed(0)
    model = make_model(SIZE, tokenizer)
    model.config.max_position_embeddings = 256
    for number, (steps, rate) in enumerate(ROUNDS):
        folder = path.with_name(f"{path.name}_{number}")
        if folder.exists():
            model = AutoModelForCausalLM.from_pretrained(folder)
        else:
            train(path.name, model, make_pool(tokenizer), steps, rate)
            model.save_pretrained(folder)
        torch.manual_seed(number + 1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def run(method: str, seed: int, teacher: Path, output_dir: Path) -> dict:
    """Train a student, and return the line of its results."""
    kind, settings = METHODS[method]
    torch.manual_seed(seed)
    args = RLADConfig(
        str(output_dir),
        **read_method(settings),
        learning_rate=3e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        max_steps=STEPS,
        per_device_train_batch_size=ROLLOUTS,
        num_generations=8,
        max_completion_length=LENGTH,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = make_dataset(PEOPLE, STEPS * ROLLOUTS // 8, seed, held_out=False)
    models = {"words": str(MINI / "teacher"), "characters": str(teacher)}
    trainer = RLADTrainer(
        str(MINI / "student"), correctness_reward, args, data, **({"teacher_model": models[kind]} if kind else {})
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    seen = {name: round(log[name], 4) for name in ("teacher/unaligned", "teacher/named_mass") if name in log}
    accuracy = measure(trainer.model.eval())
    return {"method": method, "seed": seed, "steps": STEPS, "accuracy": round(accuracy, 4), **seen}


def report(lines: list[dict]):
    """Print the table, with 95% intervals."""
    for line in lines:
        if "seed" not in line:
            print(f"{line['method']}: {line['accuracy']:.1%}")
    print("| method | held-out accuracy | named mass | unaligned | runs |\n|---|---|---|---|---|")
    for method in METHODS:
        mine = [line for line in lines if line["method"] == method]
        if len(mine) > 1:
            values = [line["accuracy"] for line in mine]
            seen = [
                f"{mean(line[name] for line in mine):.2f}" if name in mine[0] else ""
                for name in ("teacher/named_mass", "teacher/unaligned")
            ]
            print(f"| {method} | {mean(values):.1%} ± {interval(values):.1%} | {seen[0]} | {seen[1]} | {len(mine)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/another_tokenizer"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    lines = read_results(RESULTS)
    if args.report:
        return report(lines)
    torch.set_num_threads(1)
    teacher = args.output_dir / "characters"
    if not teacher.exists():
        make_teacher(teacher)
    done = {(line["method"], line.get("seed")) for line in lines}
    for name, path, length in (
        ("the teacher in words", MINI / "teacher", LENGTH),
        ("the teacher in characters", teacher, 4 * LENGTH),
        ("the student", MINI / "student", LENGTH),
    ):
        if (name, None) not in done:
            add_result(RESULTS, {"method": name, "accuracy": round(measure(str(path), length), 4)})
    for seed in SEEDS:
        for method in args.methods:
            if (method, seed) not in done:
                add_result(RESULTS, run(method, seed, teacher, args.output_dir / "runs"))


if __name__ == "__main__":
    main()
