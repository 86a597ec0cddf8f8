"""
Time a step whose reward function waits as long as the teacher scores, and see what the wait adds.

    python benchmarks/overlap.py

The reward sleeps, as one does that asks a judge or a sandbox elsewhere: once as a plain function, once as a coroutine. Rows
and models are those of `step_overhead.py`, with a teacher of four times the student's size.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import step_overhead as steps
import torch


def time_ways(ways: dict) -> dict[str, float]:
    """Median seconds of each way; they take turns. Waiting counts."""
    seconds = {name: [] for name in ways}
    for _ in range(8):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first round warms up


def main():
    torch.set_num_threads(1)
    rollouts = steps.make_rollouts("exponential")
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = (steps.save(Path(folder, size), *steps.SIZES[size]) for size in ("1x", "4x"))
        wait = [0.0]

        def waiting(completion_ids, **kwargs):
            time.sleep(wait[0])
            return steps.reward(completion_ids)

        async def async_waiting(completion_ids, **kwargs):
            await asyncio.sleep(wait[0])
            return steps.reward(completion_ids)

        def make(reward, path=teacher):
            return steps.make_step(student, path, True, 8, rollouts, folder, reward)

        alone = time_ways({"alpha 1": make(steps.reward, None), "with its teacher": make(steps.reward)})
        wait[0] = alone["with its teacher"] - alone["alpha 1"]
        ways = {
            "a reward at once": steps.reward,
            "a function that waits": waiting,
            "a coroutine that waits": async_waiting,
        }
        seconds = time_ways({name: make(reward) for name, reward in ways.items()})
    print(f"The teacher takes {wait[0]:.2f} s, and so does the reward where it waits\n")
    print("| step with | s | the wait adds |\n|---|---|---|")
    for name, value in seconds.items():
        added = value - seconds["a reward at once"]
        print(
            f"| {name} | {value:.2f} | {added / wait[0]:.0%} of itself, {added / seconds['a reward at once']:.0%} of a step |"
        )


if __name__ == "__main__":
    main()
