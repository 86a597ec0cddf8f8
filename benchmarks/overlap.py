"""
Time a step whose reward function waits as long as the teacher takes, and see what the wait adds.

    python benchmarks/overlap.py

The reward sleeps, as one does that asks a judge or a sandbox elsewhere: once as a plain function, once as a coroutine.
The teacher's passes sleep too, as a thread does that waits for a GPU or for a server, so that it doesn't matter what
else runs here; all around them is what trains. The server is the tests', over real sockets. Student and rollouts are
small.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

import step_overhead as steps
import torch
from teacher_server import TeacherServer, is_check, right

from trl_rlad.teachers import LocalTeacher, client


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
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    slow_down(LocalTeacher)
    generator = random.Random(0)  # no two rollouts are alike
    rollouts = [[generator.choices(range(4, 32), k=8) for _ in range(steps.ROLLOUTS)] for _ in range(2)]
    rewards = {
        "a reward at once": steps.reward,
        "a function that waits": waiting,
        "a coroutine that waits": async_waiting,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = steps.save(Path(folder, "model"), *steps.SIZES["1x"])
        with TeacherServer(path) as server:

            def late(handler, answer):  # as many requests as are in flight at once are answered at once
                is_check(handler) or time.sleep(WAIT * client.IN_FLIGHT / steps.ROLLOUTS)
                right(handler, answer)

            ways = {}
            for place, settings in {"here": {}, "behind a URL": {"teacher_server_urls": server.url}}.items():
                for name, reward in rewards.items():
                    ways[place, name] = steps.make_step(path, path, True, 32, rollouts, folder, reward, **settings)
            server.fault, score = late, server.score
            server.score = lambda body: score(body) if body["prompt_logprobs"] else make_scores(body)
            seconds = time_steps(ways)
    medians = {way: statistics.median(values[1:]) for way, values in seconds.items()}
    print("| teacher | step with | s | the wait adds |\n|---|---|---|---|")
    for (place, name), value in medians.items():
        print(f"| {place} | {name} | {value:.2f} | {value / medians[place, 'a reward at once'] - 1:+.0%} |")


def make_scores(body):
    """Any, as it is the time that matters."""
    return [None, *({str(id): {"logprob": -1.0}} for id in body["prompt"][1:])]


def time_steps(ways):
    """Seconds of each step, in turns."""
    seconds = {way: [] for way in ways}
    for _ in range(8):  # the first round warms up
        for way, step in ways.items():
            start = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
