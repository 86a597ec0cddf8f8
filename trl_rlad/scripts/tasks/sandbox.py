"""
Scores answers with reasoning-gym's own scorers, in processes apart: some of them evaluate as Python what the model
wrote.

Code in an answer finds an empty environment and home, no network where the kernel lets a process leave it, no files
but those of Python, no further processes, bounded memory, and a few seconds. Python's audit hooks, which see to most
of this, are no wall against an attacker who knows them: on a machine with something to lose, train in a container.
"""

import ctypes
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any


NEW_USER_AND_NETWORK = 0x10000000 | 0x40000000  # of Linux's sched.h
MEMORY = 2**31  # bytes beyond those that the scorer has when it is ready
START_SECONDS = 300.0
READY = b"ready\n"


class Sandbox:
    """
    A few processes that score answers to one task.

    Args:
        task (`str`):
            Name of a task of reasoning-gym.
        config (`dict`):
            Its settings.
        seconds (`float`, *optional*, defaults to `10.0`):
            Time for one answer. One that takes longer scores 0.
        num_workers (`int`, *optional*, defaults to `2`):
            Number of processes. They are started when they are first needed.

    Attributes:
        failures (`int`):
            Number of answers at which the scorer ran out of time or memory, or its process ended.
    """

    def __init__(self, task: str, config: dict[str, Any], seconds: float = 10.0, num_workers: int = 2):
        self.task, self.config, self.seconds, self.failures = task, config, seconds, 0
        self.pool = ThreadPoolExecutor(num_workers)
        self.workers = SimpleQueue()
        for _ in range(num_workers):
            self.workers.put(None)

    def score(self, answers: list[str], entries: list[dict]) -> list[float]:
        """
        Scores from 0 to 1. An answer that the scorer can't read, or at which it fails, scores 0.

        Args:
            answers (`list[str]`):
                What the model answered.
            entries (`list[dict]`):
                The entry of reasoning-gym's dataset that each is an answer to.

        Raises:
            `RuntimeError`: if a process doesn't start.
        """
        return list(self.pool.map(self._score, answers, entries))

    def _score(self, answer, entry):
        worker, line = self.workers.get(), b""
        try:
            worker = worker or self._start()
            with suppress(BrokenPipeError):
                worker.stdin.write(pickle.dumps((answer, entry)))
                line = read_line(worker, 2 * self.seconds)  # it should have ended itself before
        finally:
            if not line and worker is not None:
                worker.kill()
                worker.communicate()
                worker = None
            self.workers.put(worker)
        self.failures += not line
        return float(line or 0.0)

    def _start(self):
        # Without its environment it has none of the parent's secrets; `-I` leaves out the user's own packages
        worker = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"HOME": tempfile.gettempdir(), "OMP_NUM_THREADS": "1"},
            cwd=tempfile.gettempdir(),
            bufsize=0,
        )
        worker.stdin.write(pickle.dumps((self.task, self.config, self.seconds)))
        if read_line(worker, START_SECONDS) != READY:
            worker.kill()
            raise RuntimeError(f"The scorer of {self.task!r} doesn't start; its own error is above.")
        return worker


def read_line(worker: subprocess.Popen, seconds: float) -> bytes:
    """What a worker says within a time, or nothing."""
    ready, _, _ = select.select([worker.stdout], [], [], seconds)
    return worker.stdout.readline() if ready else b""


def confine():
    """Give up what a scorer doesn't need. There is no way back."""
    size = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    roots = tuple({os.path.realpath(path) + os.sep for path in (sys.prefix, sys.base_prefix, *sys.path)})

    def refuse(event, args):
        kind = event.split(".")[0]
        if event == "open":
            path, _, flags = args
            is_allowed = isinstance(path, (str, bytes)) and not flags & WRITING
            is_allowed = is_allowed and os.path.realpath(os.fsdecode(path)).startswith(roots)
        else:
            is_allowed = event in ("os.listdir", "os.scandir") or kind not in REFUSED
        if not is_allowed:
            raise PermissionError(f"{event} in an answer")

    sys.addaudithook(refuse)


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Kinds of events of Python's audit hooks: https://docs.python.org/3/library/audit_events.html
REFUSED = {
    "ctypes",
    "fcntl",
    "mmap",
    "os",
    "pty",
    "resource",
    "shutil",
    "signal",
    "socket",
    "subprocess",
    "sqlite3",
    "syslog",
}


def serve():
    """Score what comes in on stdin, which the parent alone writes, and answer with numbers, which can't harm it."""
    with suppress(
        AttributeError, OSError
    ):  # Linux, while there is one thread; where it isn't allowed, nothing happens
        ctypes.CDLL(None).unshare(NEW_USER_AND_NETWORK)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    task, config, seconds = pickle.load(requests)
    from reasoning_gym.factory import create_dataset

    dataset = create_dataset(task, **config)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # an answer may print
        os.dup2(nowhere, stream)
    confine()
    replies.write(READY)
    while True:
        try:
            answer, entry = pickle.load(requests)
        except EOFError:  # the parent has ended
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends this process, whatever it is doing
        try:
            score = float(dataset.score_answer(answer, entry))
        except BaseException:  # some scorers raise on an answer that they can't read; an answer may exit
            score = 0.0
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        replies.write(f"{score}\n".encode())


if __name__ == "__main__":
    serve()
