"""
Time a step whose reward function waits as long as the teacher takes, and see what the wait adds.

    python benchmarks/overlap.py

The reward sleeps, as one does that asks a judge or a sandbox elsewhere: once as a plain function, once as a coroutine. The
teacher's passes sleep too, as a thread does that waits for a GPU, so that it doesn't matter what else runs here; all around
them is what trains. Student and rollouts are small.
"""

import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

import step_overhead as steps
import torch

from trl_rlad.teachers import LocalTeacher


WAIT = 2.0  # seconds of the teacher, and of the reward


def waiting(completion_ids, **kwargs):
    time.sleep(WAIT)
    return steps.reward(completion_ids)


async def async_waiting(completion_ids, **kwargs):
    await asyncio.sleep(WAIT)
    return steps.reward(completion_ids)


def slow_down(teacher: type[LocalTeacher]):
    """Have each pass over `steps.ROLLOUTS` rows take `WAIT` in all."""
    score = teacher.score

    def slow(self, prompts, *args):
        time.sleep(WAIT * len(prompts) / steps.ROLLOUTS)
        return score(self, prompts, *args)

    teacher.score = slow


def main():
    torch.set_num_threads(1)
    slow_down(LocalTeacher)
    generator = random.Random(0)  # no two rollouts are alike
    rollouts = [[generator.choices(range(4, 32), k=8) for _ in range(steps.ROLLOUTS)] for _ in range(2)]
    ways = {
        "a reward at once": steps.reward,
        "a function that waits": waiting,
        "a coroutine that waits": async_waiting,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = steps.save(Path(folder, "model"), *steps.SIZES["1x"])
        ways = {name: steps.make_step(path, path, True, 32, rollouts, folder, reward) for name, reward in ways.items()}
        seconds = {name: [] for name in ways}
        for _ in range(8):  # in turns, and the first round warms up
            for name, step in ways.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print("| step with | s | the wait adds |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.2f} | {value / medians['a reward at once'] - 1:+.0%} |")


if __name__ == "__main__":
    main()
