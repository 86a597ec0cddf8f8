"""
Whether a student that has the solution before it can teach itself: `teacher_model="self"` on a toy.

A prompt has three letters, and its solution their values under a secret permutation. The student has learnt to repeat
a solution that stands before the letters, and to guess without one: it can use a hint, and knows nothing. Its
`teacher_prompt` is the solution with the prompt. A control has learnt to guess alone.

    python benchmarks/own_teacher.py  # two minutes of one core; writes results/own_teacher.md
"""

import argparse
import random
import tempfile
import time
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev
from string import ascii_lowercase

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.scripts.arguments import read_method
from trl_rlad.scripts.mini.make_models import STUDENT_SIZE, make_model, save
from trl_rlad.scripts.tasks.mini import EOS, PAD, make_word_tokenizer


LETTERS, LENGTH, STEPS, SEEDS = ascii_lowercase[:16], 3, 150, (0, 1, 2)
SECRET = dict(zip(LETTERS, random.Random(0).sample(LETTERS, len(LETTERS)), strict=True))
TOKENIZER = make_word_tokenizer([PAD, EOS, *LETTERS])
LAG = {"beta": 1e-6, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.05}
METHODS = {
    "RLAD + named, itself": (read_method("rlad_named"), "self"),
    "RLAD + named, itself, lagging behind": (read_method("rlad_named") | LAG, "self"),
    "RLAD, itself": (read_method("rlad"), "self"),
    "GRPO": (read_method("grpo"), None),
}


def make_dataset(size: int, seed: int) -> Dataset:
    rng = random.Random(seed)
    prompts = [rng.choices(LETTERS, k=LENGTH) for _ in range(size)]
    rows = [{"prompt": " ".join(each), "solution": " ".join(SECRET[letter] for letter in each)} for each in prompts]
    return Dataset.from_list([row | {"teacher_prompt": f"{row['solution']} {row['prompt']}"} for row in rows])


def reward(completions: list[str], solution: list[str], **kwargs) -> list[float]:
    return [float(completion.strip() == right) for completion, right in zip(completions, solution, strict=True)]


def make_student(path: str, share: float, steps: int = 1500):
    """Train a student from scratch, on a `share` of hints that may be anything, and to guess."""
    torch.manual_seed(0)
    model, eos = make_model(STUDENT_SIZE, TOKENIZER), TOKENIZER.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = torch.randint(2, len(TOKENIZER), (64, 3 * LENGTH + 1))
        ids[:, -1] = eos
        hinted = torch.rand(64) < share
        ids[hinted, -LENGTH - 1 : -1] = ids[hinted, :LENGTH]
        labels = ids.clone()
        labels[:, : 2 * LENGTH] = -100
        for rows, start in ((hinted, 0), (~hinted, LENGTH)):  # without a hint, all but it
            if rows.any():
                loss = model(ids[rows, start:], labels=labels[rows, start:]).loss * rows.float().mean()
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save(model, Path(path))
    TOKENIZER.save_pretrained(path)


@torch.no_grad()
def accuracy(model, column: str) -> float:
    """Share of the letters of 200 likeliest answers that are right, in percent."""
    dataset = make_dataset(200, seed=100)
    inputs = TOKENIZER(list(dataset[column]), return_tensors="pt", return_token_type_ids=False)
    output = model.eval().generate(**inputs, max_new_tokens=LENGTH + 1, do_sample=False)
    completions = TOKENIZER.batch_decode(output[:, inputs.input_ids.size(1) :], skip_special_tokens=True)
    pairs = zip(completions, dataset["solution"], strict=True)
    return 100 * mean(a == b for answer, right in pairs for a, b in zip_longest(answer.split(), right.split()))


def run(student: str, method: str, seed: int, folder: str) -> float:
    settings, teacher = METHODS[method]
    args = RLADConfig(
        folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        per_device_train_batch_size=64,
        max_completion_length=LENGTH + 1,
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = RLADTrainer(student, reward, args, make_dataset(STEPS * 8, seed), teacher_model=teacher)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return accuracy(trainer.model, "prompt")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path(__file__).parent / "results" / "own_teacher.md")
    path = parser.parse_args().report
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    lines = ["| student | method | letters right, % | standard deviation |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for kind, share in (("can use a hint", 0.5), ("can't", 0.0)):
            make_student(student := f"{folder}/{kind}", share)
            model = AutoModelForCausalLM.from_pretrained(student)
            before = accuracy(model, "prompt"), accuracy(model, "teacher_prompt")
            lines.append(f"| {kind} | before training; with the hint {before[1]:.1f} | {before[0]:.1f} | |")
            print(lines[-1], flush=True)
            for method in METHODS if share else ["RLAD + named, itself"]:
                scores = [run(student, method, seed, f"{folder}/run") for seed in SEEDS]
                lines.append(f"| {kind} | {method} | {mean(scores):.1f} | {stdev(scores):.1f} |")
                print(lines[-1], f"{time.process_time():.0f} s", flush=True)
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
