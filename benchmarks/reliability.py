"""
Kill a run again and again and see whether it ends as an undisturbed one does; run it for long and see whether anything
grows.

    python benchmarks/reliability.py --kills 20            # five to ten minutes
    python benchmarks/reliability.py --soak 2000           # ten minutes

Both train the student of `examples/mini/` with all that has a state: distillation first, then a divergence whose
coefficient moves, over the teacher's named tokens, with accumulation, a warm-up, and a reward that is a coroutine, so
that the teacher scores in a thread.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.checkpoints import last_checkpoint
from trl_rlad.scripts.arguments import MINI
from trl_rlad.scripts.tasks.mini import MAX_COMPLETION_LENGTH, correctness_reward, make_dataset


async def reward(**columns):
    await asyncio.sleep(0.001)
    return correctness_reward(**columns)


def train(folder, steps, callback=None, **kwargs):
    """Train, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    settings = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "distillation_fraction": 0.3,
        "teacher_kl_coef": 1.0,
        "teacher_kl_coef_final": 0.1,
        "teacher_kl": "forward",
        "teacher_kl_on": "failed",
        "logging_steps": 50,
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = RLADTrainer(
        str(MINI / "student"),
        reward,
        RLADConfig(str(folder), **settings | kwargs),
        make_dataset([2, 3, 4], 1000, seed=0, held_out=False),
        teacher_model=str(MINI / "teacher"),
    )
    trainer.remove_callback(PrinterCallback)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model(str(folder / "done"))


def start(folder, steps):
    command = [sys.executable, __file__, "--folder", str(folder), "--train", str(steps)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(folder / "log.txt").open("a"))


def newest(folder):
    """The checkpoint of the highest step, torn or whole."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), default=None)


def kill_again_and_again(folder, kills, steps, rng):
    """
    Kill a run at random moments. Returns for each whether its newest checkpoint was torn, and whether the run ended as
    an undisturbed one.
    """
    whole, killed, torn = folder / "whole", folder / "killed", []
    for each in (whole, killed):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir(parents=True)
    if start(whole, steps).wait() != 0:
        raise RuntimeError(f"The undisturbed run failed: {(whole / 'log.txt').read_text()[-2000:]}")
    bar = tqdm(total=kills, desc="Kills")
    while not (killed / "done" / "model.safetensors").exists():
        find = newest if len(torn) % 2 else last_checkpoint  # every other time while it writes a checkpoint
        before, process = find(killed), start(killed, steps)
        if len(torn) < kills:
            while find(killed) == before and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.02 if find is newest else 0.4))
            process.send_signal(signal.SIGKILL)
            process.wait()
            torn.append(str(newest(killed)) != last_checkpoint(killed))
            bar.update()
        elif process.wait() != 0:
            raise RuntimeError(f"The run did not go on: {(killed / 'log.txt').read_text()[-2000:]}")
    weights = [load_file(each / "done" / "model.safetensors") for each in (whole, killed)]
    return torn, all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Watch(TrainerCallback):
    """Writes down memory, threads and open files."""

    def __init__(self, path, bar):
        self.path, self.bar = path, bar

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        if state.global_step % 25 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            row = {
                "step": state.global_step,
                "memory": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                "threads": threading.active_count(),
                "files": len(os.listdir("/proc/self/fd")),
            }
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def plot(rows, path):
    figure, axes = plt.subplots(3, sharex=True, figsize=(7, 5), layout="constrained")
    labels = {"memory": "memory, MiB", "threads": "Python threads", "files": "open files"}
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows])
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.2 * max(row[name] for row in rows))
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs", "reliability"), help="where everything goes")
    parser.add_argument("--kills", type=int, default=0, help="kill a run so many times")
    parser.add_argument("--soak", type=int, default=0, help="train for so many steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--train", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.folder, args.train, save_strategy="steps", save_steps=1, save_total_limit=3)
    if args.kills:
        with warnings.catch_warnings(action="ignore"):  # that a checkpoint was torn
            # Between two kills there are about two steps
            torn, same = kill_again_and_again(args.folder, args.kills, 4 * args.kills, random.Random(args.seed))
        print(f"{len(torn)} kills, {sum(torn)} of them tore a checkpoint. Same weights to the last bit: {same}")
    if args.soak:
        folder = args.folder / "soak"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tqdm(total=args.soak, desc="Steps") as bar:
            train(
                folder, args.soak, Watch(folder / "soak.jsonl", bar), save_strategy="no", gradient_accumulation_steps=1
            )
        rows = [json.loads(line) for line in (folder / "soak.jsonl").read_text().splitlines()]
        plot(rows, folder / "soak.png")
        early, late = rows[len(rows) // 5], rows[-1]
        for name in ("memory", "threads", "files"):
            print(f"{name}: {early[name]:.0f} at step {early['step']}, {late[name]:.0f} at step {late['step']}")


if __name__ == "__main__":
    main()
