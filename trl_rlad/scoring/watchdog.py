"""A time limit on what all processes do together, so that one that is stuck is named instead of waited for."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist


# Seconds between a rank's report and its exit: a launcher then kills the others, whose reports may be under way
GRACE = 5.0


@cache
def barrier_group() -> dist.ProcessGroup | None:
    """The group that knows who is missing. All processes create it together: call it before one may be stuck."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return dist.new_group(backend="gloo")
    return None


@contextmanager
def time_limit(seconds: float, call: str) -> Iterator[None]:
    """
    Have all processes come to the body and then run it, each within `seconds`; with a single process, just run it.

    Args:
        seconds (`float`):
            The limit.
        call (`str`):
            What is done, for the messages.

    Raises:
        `TimeoutError`: if not all processes have come to the start in time; it names those that are missing. A process
            that doesn't come to the end in time can't be interrupted, as it may be inside of a collective operation:
            it prints its name, the call and its stack, and exits.
    """
    group = barrier_group()
    if group is None:
        yield
        return
    rank, start = dist.get_rank(), time.monotonic()
    try:
        dist.monitored_barrier(group, timeout=timedelta(seconds=seconds), wait_all_ranks=True)
    except RuntimeError as error:
        waited = time.monotonic() - start
        reason = "" if waited >= seconds else " One of them has failed: its own error tells why."
        raise TimeoutError(
            f"Rank {rank} waited {waited:.0f} s in vain for the other ranks to start {call}.{reason} {error}"
        ) from error

    def give_up():
        try:
            with tempfile.TemporaryFile("w+") as file:
                faulthandler.dump_traceback(file)
                file.seek(0)
                report = f"Rank {rank} has not ended {call} within {seconds:g} s. It is here:\n{file.read()}"
            # In one piece: the ranks share a stderr, and all of them may report at once
            sys.stderr.write(report)
            sys.stderr.flush()
            time.sleep(GRACE)
        finally:
            os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_agreement(settings: dict[str, Any], seconds: float):
    """
    Compare the settings of all processes, before they wait for each other in what one of them doesn't do.

    Args:
        settings (`dict[str, Any]`):
            Those of this process by name.
        seconds (`float`):
            Time for all to come here.

    Raises:
        `ValueError`: if they differ; it names the setting, and its values on two ranks.
        `TimeoutError`: if a process is missing.
    """
    with time_limit(seconds, "the comparison of their settings"):
        group = barrier_group()
        if group is None:
            return
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, settings, group=group)
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs[name] != value:
                raise ValueError(
                    f"`{name}` is {value!r} on rank 0 and {theirs[name]!r} on rank {rank}: start all processes with "
                    "the same settings."
                )
