"""
What `teacher_model="self"` teaches, in miniature: GRPO alone beside a student that reads the solution.

    python benchmarks/own_teacher.py    # eighteen runs of a quarter of a minute on one CPU thread

The task is chains of operators (see `trl_rlad/scripts/tasks/chains.py`), and the `teacher_prompt` the worked solution
before the puzzle. The student is the half-learned GPT that comes along, made to use what it is shown by a short
fine-tuning on both forms: of a plain puzzle it learns its own samples, so it stays as good as it was, and behind a
solution it learns that. The teacher is the student as it is, one that lags behind it, or the student of the beginning.
All methods have the same steps, rollouts and learning rate, and by seed the same puzzles.

Each run adds a line to the results, from which the study goes on if it is interrupted.
"""

import argparse
import time
from itertools import product
from pathlib import Path
from statistics import mean

import torch
import transformers
from datasets import Dataset
from tables import add_result, read_results
from trl import SFTConfig

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.scripts import distil
from trl_rlad.scripts.arguments import MINI, read_method
from trl_rlad.scripts.sampling import evaluate, sample
from trl_rlad.scripts.tasks import Task, chains


OUTPUTS = Path("outputs/own_teacher")
RESULTS = Path(__file__).parent / "results" / "own_teacher.jsonl"
METHODS = {  # and the teacher
    "GRPO": ("grpo", None),
    'RLAD, "self"': ("rlad", "self"),
    'RLAD + named, "self"': ("rlad_named", "self"),
    'RLAD, "self" that lags behind': ("rlad", "lag"),
    'RLAD + named, "self" that lags behind': ("rlad_named", "lag"),
    "RLAD + named, the student of the beginning": ("rlad_named", "frozen"),
}
LAG = {"beta": 1e-6, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.05}
SEEDS, STEPS, ROLLOUTS, PUZZLES, LENGTH = (1, 2, 3), 100, 128, 2000, chains.MAX_COMPLETION_LENGTH
CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
CPU |= {"save_strategy": "no", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10}


def show(row: dict) -> str:
    """The prompt of the teacher: the solution, and the puzzle behind it."""
    return f"{row['solution']} {row['prompt']}"


def make_student(path: Path):
    """Teach the half-learned student to use a solution that it is shown."""
    base, puzzles = str(MINI / "chains_gpt_half"), list(chains.make_dataset(4800, seed=100, held_out=False))
    own = sample(base, [row["prompt"] for row in puzzles], max_new_tokens=LENGTH, batch_size=1000)
    rows = [{"prompt": row["prompt"], "completion": f" {text}"} for row, (text,) in zip(puzzles, own, strict=True)]
    rows += [{"prompt": show(row), "completion": f" {row['solution']}"} for row in puzzles]
    sft = {"max_steps": 300, "per_device_train_batch_size": 128, "learning_rate": 1e-3, "logging_steps": 50}
    args = SFTConfig(str(path.parent / "sft"), **sft, **CPU)
    trainer = distil.make_trainer(base, Dataset.from_list(rows).shuffle(seed=0), args)
    trainer.train()
    trainer.save_model(path)
    add_result(RESULTS, {"method": "start"} | measure(trainer.model.eval()))


def measure(model) -> dict:
    """Share of held-out puzzles that a model solves at temperature 1, plain and with the solution before it."""
    puzzles = chains.make_dataset(PUZZLES, seed=0, held_out=True)
    forms = {"plain": puzzles, "shown": puzzles.map(lambda row: {"prompt": show(row)})}
    tasks = {form: Task(None, each, chains.correctness_reward) for form, each in forms.items()}
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": LENGTH, "batch_size": PUZZLES}
    with torch.random.fork_rng():
        return {form: evaluate(model, task, 1, **sampling)["overall"]["mean@1"] for form, task in tasks.items()}


def run(method: str, seed: int, student: str) -> dict:
    """Train a student, and return the line of its results."""
    start, (settings, teacher) = time.process_time(), METHODS[method]
    puzzles = chains.make_dataset(STEPS * ROLLOUTS // 8, seed, held_out=False)
    size = {"max_steps": STEPS, "per_device_train_batch_size": ROLLOUTS, "max_completion_length": LENGTH}
    options = {"learning_rate": 2e-4, "seed": seed, "logging_steps": 10, "trim_padding": False}
    options |= read_method(settings) | (LAG if teacher == "lag" else {})
    args = RLADConfig(str(OUTPUTS / "runs"), **size, **options, **CPU)
    puzzles = puzzles.map(lambda row: {"teacher_prompt": show(row)}) if args.needs_teacher else puzzles
    teacher = {None: None, "frozen": student}.get(teacher, "self")
    trainer = RLADTrainer(student, chains.correctness_reward, args, puzzles, teacher_model=teacher)
    trainer.train()
    result = {"method": method, "seed": seed} | measure(trainer.model.eval())
    for name in ("reward", "teacher/log_ratio"):
        result[name] = [round(log[name], 3) for log in trainer.state.log_history if name in log]
    return result | {"cpu_seconds": round(time.process_time() - start)}


def report(lines: list[dict]):
    """Print the table."""
    start = lines[0]
    grpo = {line["seed"]: line["plain"] for line in lines if line["method"] == "GRPO"}
    print("| method | solved | over GRPO, by seed | with the solution before it |\n|---|---|---|---|")
    print(f"| before training | {start['plain']:.1%} | | {start['shown']:.1%} |")
    for method in METHODS:
        if mine := [line for line in lines if line["method"] == method]:
            plain, shown = (mean(line[form] for line in mine) for form in ("plain", "shown"))
            gains = " ".join(f"{100 * (line['plain'] - grpo[line['seed']]):+.1f}" for line in mine)
            print(f"| {method} | {plain:.1%} | {gains if method != 'GRPO' else ''} | {shown:.1%} |")


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    student = OUTPUTS / "student"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if not student.exists():
        make_student(student)
    done = [(line["method"], line.get("seed")) for line in read_results(RESULTS)]
    for method, seed in product(METHODS, SEEDS):
        if (method, seed) not in done:
            add_result(RESULTS, run(method, seed, str(student)))
    report(read_results(RESULTS))


if __name__ == "__main__":
    main()
