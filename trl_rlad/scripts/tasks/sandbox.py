"""
Scores answers with reasoning-gym's own scorers, some of which evaluate as Python what the model wrote.

No code of an answer runs: `eval` is [`evaluate`] there, which takes literals and formulas alone. So an answer can't
give itself a score, and what it can still do is to take long or need much memory. Therefore each is judged in a fork
of its own, of a process that has the scorer ready and never evaluates an answer; the fork has a time, a bound on its
memory, one pipe for one number, and is ended. Nothing that happens in it is there for the next answer.

Should an answer find a way past `evaluate`, it could set its own score. It finds an empty environment and home, no
network where the kernel lets a process leave it, no files but those of Python, and no further processes.
Python's audit hooks, which see to most of this, are no wall against an attacker who knows them: on a machine with
something to lose, train in a container.
"""

import ast
import ctypes
import gc
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from math import isnan, nan
from pathlib import Path
from queue import SimpleQueue
from threading import Timer
from typing import Any


NEW_USER_AND_NETWORK = 0x10000000 | 0x40000000  # of Linux's sched.h
MEMORY = 2**31  # bytes beyond those that the scorer has when it is ready
START_SECONDS = 300.0
SPARE_SECONDS = 30.0  # for a loaded machine, before a process that should have answered is ended
SCORE = struct.Struct("d")
REPLY = struct.Struct("Qd")  # the number of a request and its score, NaN for none


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
            Number of answers at which the scorer ran out of time or memory, or its process ended, or that would have
            had a score that isn't from 0 to 1.
    """

    program = [sys.executable, "-I", __file__]  # `-I` leaves out the user's own packages

    def __init__(self, task: str, config: dict[str, Any], seconds: float = 10.0, num_workers: int = 2):
        self.task, self.config, self.seconds, self.failures = task, config, seconds, 0
        self.numbers = count(1)
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
        scores = list(self.pool.map(self._score, answers, entries))
        self.failures += sum(map(isnan, scores))
        return [0.0 if isnan(score) else score for score in scores]

    def _score(self, answer, entry):
        worker, number, score = self.workers.get(), next(self.numbers), nan
        try:
            worker = worker or self._start()
            reply = exchange(worker, (number, answer, entry), self.seconds + SPARE_SECONDS)
            if reply is None or reply[0] != number:
                worker = end(worker)
            else:
                score = reply[1]
        finally:
            self.workers.put(worker)
        return score

    def _start(self):
        # Without its environment it has none of the parent's secrets
        worker = subprocess.Popen(
            self.program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"HOME": tempfile.gettempdir(), "OMP_NUM_THREADS": "1"},
            cwd=tempfile.gettempdir(),
        )
        if exchange(worker, (self.task, self.config, self.seconds), START_SECONDS) is None:
            end(worker)
            raise RuntimeError(f"The scorer of {self.task!r} doesn't start; its own error is above.")
        return worker


def exchange(worker: subprocess.Popen, request: Any, seconds: float) -> tuple[int, float] | None:
    """A worker's reply to a request; `None`, and the worker is killed, if it doesn't come in time."""
    timer = Timer(seconds, worker.kill)
    timer.daemon = True
    timer.start()
    try:
        worker.stdin.write(pickle.dumps(request))
        worker.stdin.flush()
        reply = worker.stdout.read(REPLY.size)
    except BrokenPipeError:
        reply = b""
    finally:
        timer.cancel()
    return REPLY.unpack(reply) if len(reply) == REPLY.size else None


def end(worker: subprocess.Popen):
    worker.kill()
    worker.communicate()


def serve():
    """Have what comes in on stdin, which the parent alone writes, judged in forks. No answer is evaluated here."""
    with suppress(AttributeError, OSError):
        # Linux, while there is one thread; where it isn't allowed, nothing happens
        ctypes.CDLL(None).unshare(NEW_USER_AND_NETWORK)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    task, config, seconds = pickle.load(requests)
    from reasoning_gym.factory import create_dataset
    from sympy.parsing import sympy_parser  # its `parse_expr` calls `eval`

    dataset = create_dataset(task, **config)
    for module in (sympy_parser, *(each for name, each in sys.modules.items() if name.startswith("reasoning_gym"))):
        vars(module)["eval"] = evaluate
    with suppress(Exception):
        dataset.score_answer(dataset[0]["answer"], dataset[0])  # what it imports, no fork has to
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # an answer may print
        os.dup2(nowhere, stream)
    confine = prepare_to_confine(seconds)
    gc.freeze()  # or a collection would copy all of it into each fork
    replies.write(REPLY.pack(0, 0.0))
    while True:
        try:
            number, answer, entry = pickle.load(requests)
        except EOFError:  # the parent has ended
            return
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            judge(dataset, answer, entry, writer, confine)
        os.close(writer)
        ready, _, _ = select.select([reader], [], [], seconds)
        claim = os.read(reader, SCORE.size + 1) if ready else b""
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # and whatever it may have started
        os.kill(pid, signal.SIGKILL)  # if it hasn't come to have a group
        os.waitpid(pid, 0)
        os.close(reader)
        score = SCORE.unpack(claim)[0] if len(claim) == SCORE.size else nan
        replies.write(REPLY.pack(number, score if 0.0 <= score <= 1.0 else nan))


def judge(dataset: Any, answer: str, entry: dict, pipe: int, confine: Callable[[], None]):
    """Write the score of an answer to a pipe, and end this process."""
    try:
        os.setsid()  # a group of its own
        os.closerange(3, pipe)
        os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))
        confine()
        try:
            score = float(dataset.score_answer(answer, entry))
        except Exception:  # some scorers raise on an answer that they can't read
            score = 0.0
        os.write(pipe, SCORE.pack(score))
    finally:
        os._exit(0)


def prepare_to_confine(seconds: float) -> Callable[[], None]:
    """A function that gives up all that a scorer doesn't need, with no way back."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limits = {
        resource.RLIMIT_AS: size * resource.getpagesize() + MEMORY,
        resource.RLIMIT_CPU: int(seconds) + 2,  # for when nobody is left to end it
        resource.RLIMIT_FSIZE: 0,
    }
    roots = tuple({os.path.realpath(path) + os.sep for path in (sys.prefix, sys.base_prefix, *sys.path)})

    def refuse(event, args):
        is_allowed = event in ALLOWED
        if event == "open":
            path, _, flags = args
            is_allowed = isinstance(path, (str, bytes)) and not flags & WRITING
            is_allowed = is_allowed and os.path.realpath(os.fsdecode(path)).startswith(roots)
        if not is_allowed:
            raise PermissionError(f"{event} in an answer")

    def confine():
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, value))
        sys.addaudithook(refuse)

    return confine


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Of Python's audit hooks: https://docs.python.org/3/library/audit_events.html. What imports and sympy's parser need
ALLOWED = {"import", "compile", "exec", "marshal.loads", "object.__getattr__", "os.listdir", "os.scandir"}


def evaluate(source: str, namespace: dict | None = None, local_names: dict | None = None, run=eval) -> Any:
    """
    `eval` of a literal or a formula.

    Raises:
        `ValueError`: for what has anything but constants, lists and the like, operators, names that the caller gives
            on purpose, and calls of sympy's numbers, symbols and mathematical functions.
    """
    names = {**(namespace or {}), **(local_names or {})}
    for node in ast.walk(ast.parse(source.strip(), mode="eval")):
        is_allowed = isinstance(node, DATA)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            is_allowed = is_function(node.func.id, names.get(node.func.id))
        if not is_allowed:
            raise ValueError(f"{ast.unparse(node)!r} is no part of a literal or a formula")
    # Without the names of the frame around, in which scorers have the right answer
    return run(source.strip(), {"__builtins__": {}} if namespace is None else namespace, local_names)


DATA = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Name, ast.Load)
DATA += (ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator)


def is_function(name: str, value: Any) -> bool:
    import sympy

    kinds = sympy.core.function.Application, sympy.Number, sympy.Symbol
    return isinstance(value, type) and issubclass(value, kinds) or name in ("abs", "sqrt", "cbrt", "root")


if __name__ == "__main__":
    serve()
