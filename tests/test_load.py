"""Sixteen processes that ask one server at once."""

import multiprocessing
import threading
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from teacher_server import TeacherServer

from trl_rlad.scoring.rows import Row
from trl_rlad.teachers import ServedTeacher, client


PROCESSES, ROWS, LENGTH = 16, 40, 200


def make_row(rank, number):
    generator = torch.Generator().manual_seed(100 * rank + number)
    prompt, completion = torch.randint(4, 32, (2, LENGTH), generator=generator)
    return Row(prompt, completion)


def peak_memory():
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def ask(rank, folder, pipe):
    try:
        pipe.send(score_rows(rank, folder, pipe.recv()))
    except Exception as error:
        pipe.send(repr(error))
        raise


def score_rows(rank, folder, url):
    torch.set_num_threads(1)
    client.IN_FLIGHT = client.in_flight(PROCESSES)
    scorer = tiny.make_scorer(ServedTeacher([url], None, tiny.make_config(folder, teacher_server_urls=[url])))
    rows = [make_row(rank, number) for number in range(ROWS)]
    row_scorer = scorer.scorers[""]
    before = peak_memory()
    row_scorer.begin(rows)
    scores = dict.fromkeys(range(ROWS), 0.0)
    for numbers, each in row_scorer.score(rows):
        scores |= {number: each.logps.sum().item() for number in numbers}
    return scores, peak_memory() - before


@pytest.mark.slow
def test_no_row_is_lost_or_asked_twice(teacher_path, tmp_path):
    fork, lock, seen = multiprocessing.get_context("fork"), threading.Lock(), {"now": 0, "most": 0}
    pipes = [fork.Pipe() for _ in range(PROCESSES)]
    processes = [
        fork.Process(target=ask, args=(rank, tmp_path, there), daemon=True) for rank, (_, there) in enumerate(pipes)
    ]
    for process in processes:  # before there are threads
        process.start()
    with TeacherServer(teacher_path) as server:
        right = server.respond

        def respond(path, body):  # each token's score is minus its id
            ids = body["prompt"]
            if len(ids) < 2 * LENGTH:  # a check
                return right(path, body)
            with lock:
                seen["now"] += 1
                seen["most"] = max(seen["most"], seen["now"])
            entries = [None, *({str(id): {"logprob": -float(id)}} for id in ids[1:])]
            with lock:
                seen["now"] -= 1
            return {"model": "teacher", "choices": [{"prompt_logprobs": entries}]}

        server.respond = respond
        for here, _ in pipes:
            here.send(server.url)
        answers = [here.recv() if here.poll(60) else "silent" for here, _ in pipes]
    for process in processes:
        process.join(30)
    asked = Counter(tuple(request["prompt"]) for request in server.requests if len(request["prompt"]) == 2 * LENGTH)
    for rank, answer in enumerate(answers):
        assert not isinstance(answer, str), answer
        scores, memory = answer
        rows = [make_row(rank, number) for number in range(ROWS)]
        assert scores == {number: -float(row.completion.sum()) for number, row in enumerate(rows)}
        assert all(asked[tuple(torch.cat([row.prompt, row.completion]).tolist())] == 1 for row in rows)
        assert memory < 100
    assert len(asked) == PROCESSES * ROWS and seen["most"] <= 256


def test_the_requests_of_all_processes_together_are_bounded():
    assert [client.in_flight(processes) for processes in (1, 2, 8, 16, 256, 1024)] == [32, 32, 32, 16, 1, 1]
