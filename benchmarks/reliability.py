"""
Kill a run again and again and see whether it ends as an undisturbed one does; run it for long and see whether anything
grows.

    python benchmarks/reliability.py --kills 20            # five to ten minutes
    python benchmarks/reliability.py --kills 20 --ranks 2  # half an hour: of a rank, of the teacher's server, of all
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
from contextlib import suppress
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
    served = "teacher_server_urls" in kwargs
    trainer = RLADTrainer(
        str(MINI / "student"),
        reward,
        RLADConfig(str(folder), **settings | kwargs),
        make_dataset([2, 3, 4], 1000, seed=0, held_out=False),
        teacher_model=None if served else str(MINI / "teacher"),
    )
    trainer.remove_callback(PrinterCallback)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model(str(folder / "done"))


def train_ranks(folder, steps):
    """Train in one of several processes, with a teacher behind a URL."""
    Path(folder, f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    url = (folder.parent / "url.txt").read_text()
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    # The batch of both is that of one process
    batch = {
        "per_device_train_batch_size": 8,
        "teacher_server_urls": url,
        "teacher_timeout": 400.0,
        "ddp_timeout": 120,
    }
    train(folder, steps, **saving, **batch)


def serve(folder, port):
    """A teacher's server as in the tests, in a process of its own."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from teacher_server import TeacherServer

    torch.set_num_threads(1)
    server = TeacherServer(str(MINI / "teacher"))
    server.start(port)
    half = folder / "url.tmp"
    half.write_text(server.url)
    half.rename(folder / "url.txt")
    threading.Event().wait()


class Cluster:
    """A run of two ranks and its teacher's server, each in processes of its own."""

    def __init__(self, folder, steps):
        self.folder, self.steps, self.log, self.port = folder, steps, folder / "log.txt", 0
        folder.mkdir(parents=True)
        self.log.touch()
        self.start_server()
        self.start()

    def start_server(self):
        (self.folder.parent / "url.txt").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--folder", str(self.folder.parent), "--serve", str(self.port)]
        self.server = subprocess.Popen(command)
        self.wait("the server doesn't start", (self.folder.parent / "url.txt").exists)
        self.port = int((self.folder.parent / "url.txt").read_text().rpartition(":")[2])

    def start(self):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        command += ["--folder", str(self.folder), "--train_ranks", str(self.steps)]
        self.run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log.open("a"))

    def ranks(self):
        return [int((self.folder / f"{rank}.pid").read_text()) for rank in range(2)]

    def has_ended(self):
        return self.run.poll() is not None

    def wait(self, what, holds):
        """For something, but not for ever."""
        deadline = time.monotonic() + 300.0
        while not holds():
            if time.monotonic() > deadline:
                raise RuntimeError(f"Hung, {what}: {self.log.read_text()[-3000:]}")
            time.sleep(0.01)

    def go_on(self):
        """Wait for the next checkpoint, or for the end."""
        before = last_checkpoint(self.folder)
        self.wait("no new checkpoint", lambda: last_checkpoint(self.folder) != before or self.has_ended())

    def kill(self, victim, rng):
        """Kill a rank, the server or the run. Returns the seconds until the run has ended or gone on, and whether its
        log has told the cause."""
        start, read = time.monotonic(), len(self.log.read_text())
        if victim == "server":
            self.server.kill()
            self.server.wait()
            time.sleep(rng.uniform(0.0, 15.0))
            self.start_server()
            self.go_on()
        elif victim == "rank":
            os.kill(rng.choice(self.ranks()), signal.SIGKILL)
            self.wait("the other rank doesn't end", self.has_ended)
        else:
            self.end()
        cause = {"server": f":{self.port}", "rank": "Signal 9 (SIGKILL)"}.get(
            victim
        )  # of a run nobody is left to tell
        return time.monotonic() - start, cause and cause in self.log.read_text()[read:]

    def end(self):
        for pid in [self.run.pid, *self.ranks()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.run.wait()

    def finish(self):
        """The weights of the student in the end."""
        self.wait("no end", self.has_ended)
        self.server.kill()
        self.server.wait()
        if self.run.returncode != 0:
            raise RuntimeError(f"It did not go on: {self.log.read_text()[-3000:]}")
        return load_file(self.folder / "done" / "model.safetensors")


def kill_any(folder, kills, steps, rng):
    """
    Kill one of two ranks, the teacher's server or all at random moments. Returns for each who it was and what
    `Cluster.kill` says, and how far the student's weights are from an undisturbed run's.
    """
    shutil.rmtree(folder, ignore_errors=True)
    whole, found = Cluster(folder / "whole", steps).finish(), []
    cluster = Cluster(folder / "killed", steps)
    for _ in tqdm(range(kills), desc="Kills"):
        cluster.go_on()
        if cluster.has_ended():  # by itself, too early or with an error, which `finish` tells
            break
        time.sleep(rng.uniform(0.0, 0.6))
        victim = rng.choice(["rank", "server", "run"])
        found.append((victim, *cluster.kill(victim, rng)))
        (folder / "kills.json").write_text(json.dumps(found) + "\n")
        if cluster.has_ended():
            cluster.start()
    weights = cluster.finish()
    return found, max((whole[name] - weights[name]).abs().max().item() for name in whole)


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
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2), help="with 2, kill a rank or a server too")
    parser.add_argument("--soak", type=int, default=0, help="train for so many steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    for name in ("--train", "--train_ranks", "--serve"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.folder, args.serve)
    if args.train_ranks:
        train_ranks(args.folder, args.train_ranks)
    if args.train:
        train(args.folder, args.train, save_strategy="steps", save_steps=1, save_total_limit=3)
    if args.kills and args.ranks == 2:
        with warnings.catch_warnings(action="ignore"):
            found, difference = kill_any(args.folder / "ranks", args.kills, 5 * args.kills, random.Random(args.seed))
        for victim, seconds, told in found:
            print(f"{victim}: {'ended' if victim != 'server' else 'went on'} after {seconds:.1f} s; told: {told}")
        print(f"{len(found)} kills. Largest difference of a weight from the undisturbed run: {difference:.2g}")
    elif args.kills:
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
