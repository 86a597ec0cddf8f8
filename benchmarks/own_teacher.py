"""
Whether a student that has the solution before it can teach itself: `teacher_model="self"` in miniature.

The student of the main job misreads one of the four operators. It is trained on, on its own (mistaken) answers, and as
often to repeat a solution that stands before the puzzle: so it can use a hint, and knows no more than before without
one. Its `teacher_prompt` is the puzzle with the solution. A control is the student that never saw a hint.

    python benchmarks/own_teacher.py  # a quarter of an hour of one core; writes results/own_teacher.md
"""

import argparse
import random
import time
from pathlib import Path
from statistics import mean, stdev

import torch
import transformers
from transformers import AutoModelForCausalLM, PrinterCallback

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.scripts.arguments import MINI, read_method
from trl_rlad.scripts.mini.make_models import MISREADINGS, make_pool, save, train
from trl_rlad.scripts.tasks.mini import EOS, OPERATORS, correctness_reward, draw_puzzles, make_dataset, make_tokenizer


PEOPLE, LENGTH, STEPS, ROLLOUTS, SEEDS = [2, 3], 17, 40, 128, (0, 1, 2)
METHODS = {
    "GRPO": (read_method("grpo"), None),
    "RLAD, itself": (read_method("rlad"), "self"),
    "RLAD + named, itself": (read_method("rlad_named"), "self"),
    "the same, lagging behind": ({**read_method("rlad_named"), "beta": 1e-6, "sync_ref_model": True}
        | {"ref_model_sync_steps": 5, "ref_model_mixup_alpha": 0.5}, "self"),
    "RLAD + named, the larger teacher": (read_method("rlad_named"), str(MINI / "teacher")),
}  # fmt: skip


def hint(row: dict) -> dict:
    return {"teacher_prompt": f"{row['solution']} {row['prompt']}"}


def make_student(path: Path):
    """Train the mistaken student on, to repeat a solution that stands before the puzzle."""
    tokenizer = make_tokenizer()
    ids, labels = make_pool(tokenizer, 0, OPERATORS | {"|": MISREADINGS["|"]})
    puzzles = [puzzle for n in (2, 3, 4) for puzzle in draw_puzzles(n, 5000, random.Random(1), held_out=False)]
    hinted = [f"{hint(each._asdict())['teacher_prompt']} {each.solution} {EOS}" for each in puzzles]
    batch = tokenizer(hinted, padding=True, padding_side="right", return_tensors="pt")
    lengths = torch.tensor([len(hint(each._asdict())["teacher_prompt"].split()) for each in puzzles])[:, None]
    scored = (torch.arange(batch.input_ids.size(1)) >= lengths) & batch.attention_mask.bool()
    own = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[: len(puzzles)]
    width = batch.input_ids.size(1) - ids.size(1)
    pad = torch.nn.functional.pad
    ids = torch.cat([batch.input_ids, pad(ids[own], (0, width), value=tokenizer.pad_token_id)])
    labels = torch.cat([batch.input_ids.masked_fill(~scored, -100), pad(labels[own], (0, width), value=-100)])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MINI / "student")
    train("student", model, (ids, labels), 400, 1e-3)
    save(model, path)


@torch.no_grad()
def accuracy(model, prompts: str) -> float:
    """Share of held-out puzzles that are solved, greedily, from the column `prompts`, with dropout off."""
    tokenizer, dataset = make_tokenizer(), make_dataset(PEOPLE, 384, 0, held_out=True).map(hint)
    inputs = tokenizer(list(dataset[prompts]), padding=True, return_tensors="pt", return_token_type_ids=False)
    output = model.eval().generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    completions = tokenizer.batch_decode(output[:, inputs.input_ids.size(1) :], skip_special_tokens=True)
    return 100 * mean(correctness_reward(completions, dataset["solution"]))


def run(student: str, method: str, seed: int, folder: Path) -> float:
    settings, teacher = METHODS[method]
    args = RLADConfig(
        str(folder / "trainer"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=3e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        max_steps=STEPS,
        per_device_train_batch_size=ROLLOUTS,
        max_completion_length=LENGTH,
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    puzzles = make_dataset(PEOPLE, STEPS * ROLLOUTS // 8, seed, held_out=False).map(hint)
    trainer = RLADTrainer(student, correctness_reward, args, puzzles, teacher_model=teacher)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return accuracy(trainer.model, "prompt")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/own_teacher"))
    parser.add_argument("--report", type=Path, default=Path(__file__).parent / "results" / "own_teacher.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    make_student(args.output_dir / "student")
    students = {"can use a hint": str(args.output_dir / "student"), "can't": str(MINI / "student")}
    start, lines = time.process_time(), []
    for kind, student in students.items():
        model = AutoModelForCausalLM.from_pretrained(student)
        before = accuracy(model, "prompt"), accuracy(model, "teacher_prompt")
        lines.append(f"| {kind} | before: without and with the hint | {before[0]:.1f} and {before[1]:.1f} | |")
        for method in METHODS if kind == "can use a hint" else ["RLAD, itself", "RLAD + named, itself"]:
            scores = [run(student, method, seed, args.output_dir) for seed in SEEDS]
            lines.append(f"| {kind} | {method} | {mean(scores):.1f} | {stdev(scores):.1f} |")
            print(lines[-1], f"{time.process_time() - start:.0f} s", flush=True)
    args.report.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
