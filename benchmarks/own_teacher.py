"""
What `teacher_model="self"` teaches, in miniature: GRPO alone beside a student that reads the solution.

    python benchmarks/own_teacher.py            # nine runs of about a minute on one CPU thread
    python benchmarks/own_teacher.py --report   # the table of what is there

The task is chains of operators (see `trl_rlad/scripts/tasks/chains.py`), and the `teacher_prompt` the worked solution
before the puzzle. The student is the half-learned GPT that comes along, made to use what it is shown by a short
fine-tuning on both forms: of a plain puzzle it learns its own samples, so it stays as good as it was, and behind a
solution it learns that. All methods have the same steps, rollouts and learning rate, and the same puzzles by seed.

Each run adds a line to the results, from which the study goes on if it is interrupted.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback
from trl import SFTConfig

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.scripts import distil
from trl_rlad.scripts.arguments import MINI, read_method
from trl_rlad.scripts.sampling import grade, sample
from trl_rlad.scripts.tasks import Task, chains


RESULTS = Path(__file__).parent / "results" / "own_teacher.jsonl"
METHODS = {"GRPO": "grpo", 'RLAD, "self"': "rlad", 'RLAD + named, "self"': "rlad_named"}
SEEDS, STEPS, ROLLOUTS, PUZZLES, LENGTH = (1, 2, 3), 100, 128, 2000, chains.MAX_COMPLETION_LENGTH
SFT = {"steps": 300, "rows": 4800, "batch": 128, "rate": 1e-3}
CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
CPU |= {"save_strategy": "no", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10}


def show(row: dict) -> str:
    """The prompt of the teacher: the solution, and the puzzle behind it."""
    return f"{row['solution']} {row['prompt']}"


def make_student(path: Path):
    """Teach the half-learned student to use a solution that it is shown."""
    base, puzzles = str(MINI / "chains_gpt_half"), list(chains.make_dataset(SFT["rows"], seed=100, held_out=False))
    own = sample(base, [row["prompt"] for row in puzzles], max_new_tokens=LENGTH, batch_size=1000)
    rows = [{"prompt": row["prompt"], "completion": f" {text}"} for row, (text,) in zip(puzzles, own, strict=True)]
    rows += [{"prompt": show(row), "completion": f" {row['solution']}"} for row in puzzles]
    args = SFTConfig(
        str(path.parent / "sft"),
        max_steps=SFT["steps"],
        per_device_train_batch_size=SFT["batch"],
        learning_rate=SFT["rate"],
        logging_steps=50,
        **CPU,
    )
    trainer = distil.make_trainer(base, Dataset.from_list(rows).shuffle(seed=0), args)
    trainer.train()
    trainer.save_model(path)


def measure(model) -> dict:
    """Share of held-out puzzles that a model solves at temperature 1, plain and with the solution before it."""
    puzzles = chains.make_dataset(PUZZLES, seed=0, held_out=True)
    shares = {}
    for form, prompts in {"plain": list(puzzles["prompt"]), "shown": list(map(show, puzzles))}.items():
        with torch.random.fork_rng():
            completions = sample(model, prompts, max_new_tokens=LENGTH, batch_size=PUZZLES)
        shares[form] = mean(
            right for (right,) in grade(Task(None, puzzles, chains.correctness_reward), puzzles, completions)
        )
    return shares


def run(method: str, seed: int, student: Path, output_dir: Path) -> dict:
    """Train a student, and return the line of its results."""
    start = time.process_time()
    puzzles = chains.make_dataset(STEPS * ROLLOUTS // 8, seed, held_out=False)
    args = RLADConfig(
        str(output_dir),
        **read_method(METHODS[method]),
        max_steps=STEPS,
        per_device_train_batch_size=ROLLOUTS,
        max_completion_length=LENGTH,
        learning_rate=2e-4,
        seed=seed,
        logging_steps=10,
        trim_padding=False,
        **CPU,
    )
    puzzles = puzzles.map(lambda row: {"teacher_prompt": show(row)}) if args.needs_teacher else puzzles
    teacher = {"teacher_model": "self"} if args.needs_teacher else {}
    trainer = RLADTrainer(str(student), chains.correctness_reward, args, puzzles, **teacher)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    ratios = [round(log["teacher/log_ratio"], 3) for log in trainer.state.log_history if "teacher/log_ratio" in log]
    rewards = [round(log["reward"], 3) for log in trainer.state.log_history if "reward" in log]
    result = {"method": method, "seed": seed} | measure(trainer.model.eval()) | {"reward": rewards}
    return result | {"log_ratio": ratios, "cpu_seconds": round(time.process_time() - start)}


def report(lines: list[dict]):
    """Print the table."""
    (start,) = (line for line in lines if line["method"] == "start")
    plain = {(line["method"], line.get("seed")): line["plain"] for line in lines}
    print("| method | solved | by seed | over GRPO, by seed | with the solution before it |\n|---|---|---|---|---|")
    print(f"| before training | {start['plain']:.1%} | | | {start['shown']:.1%} |")
    for method in METHODS:
        mine = [line for line in lines if line["method"] == method]
        if mine:
            gains = [line["plain"] - plain["GRPO", line["seed"]] for line in mine if ("GRPO", line["seed"]) in plain]
            cells = [" ".join(f"{100 * each:.1f}" for each in (line["plain"] for line in mine))]
            cells += ["" if method == "GRPO" else " ".join(f"{100 * gain:+.1f}" for gain in gains)]
            shown = mean(line["shown"] for line in mine)
            print(f"| {method} | {mean(line['plain'] for line in mine):.1%} | {' | '.join(cells)} | {shown:.1%} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/own_teacher"))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    student = args.output_dir / "student"
    if not student.exists():
        make_student(student)
    jobs = [("start", None)] + [(method, seed) for seed in SEEDS for method in METHODS]
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(line["method"], line.get("seed")) for line in lines}
    for method, seed in [] if args.report else [job for job in jobs if job not in done]:
        if method == "start":
            lines.append({"method": method} | measure(AutoModelForCausalLM.from_pretrained(student)))
        else:
            lines.append(run(method, seed, student, args.output_dir / "runs"))
        with RESULTS.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    report(lines)


if __name__ == "__main__":
    main()
