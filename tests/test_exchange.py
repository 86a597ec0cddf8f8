"""Rows dealt out, sent, scored and sent back: by threads that stand for processes, which `test_distributed.py` has."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier, local
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_rlad.scoring import RowScorer
from trl_rlad.scoring import exchange as module
from trl_rlad.scoring.exchange import exchange
from trl_rlad.scoring.rows import Row
from trl_rlad.teachers import TokenScores


class Processes:
    """Threads with the two collective operations that an exchange needs. `sent` has the bytes that left each."""

    def __init__(self, count):
        self.count, self.barrier, self.here = count, Barrier(count, timeout=20), local()
        self.posted, self.sent = [None] * count, [0] * count

    def run(self, work):
        def start(rank):
            self.here.rank = rank
            return work(SimpleNamespace(process_index=rank, device=torch.device("cpu"), gather=self.gather))

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(start, range(self.count)))

    def post(self, value):
        self.barrier.wait()
        self.posted[self.here.rank] = value
        self.barrier.wait()
        return list(self.posted)

    def gather(self, tensor):
        self.sent[self.here.rank] += tensor.nbytes * (self.count - 1)
        return torch.cat(self.post(tensor))

    def all_to_all_single(self, received, flat, sizes, own_sizes):
        rank = self.here.rank
        parts = flat.split(own_sizes)
        self.sent[rank] += sum(part.nbytes for other, part in enumerate(parts) if other != rank)
        arrived = [each[rank] for each in self.post(parts)]
        assert [len(part) for part in arrived] == sizes and not len(arrived[rank])
        received.copy_(torch.cat(arrived))


def score(rows):
    """What can be told from the row alone, and differs from that of all others."""
    scores = []
    for row in rows:
        logps = row.completion * 0.5 + row.prompt.float().mean() + len(row.images)
        named = torch.stack([row.completion, row.completion + row.prompt.sum()], dim=1)
        scores.append(TokenScores(logps, named, torch.stack([logps, -logps], dim=1)))
    return scores


def make_teacher(**kwargs):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=16))
    return SimpleNamespace(
        **{"config": config, "vocab_size": 150_000, "shares_prompts": False, "is_sharded": False, **kwargs}
    )


def make_rows(rank, lengths):
    generator = torch.Generator().manual_seed(rank)

    def draw(length):
        return torch.randint(150_000, (length,), generator=generator)

    prompts = [draw(length) for length in (2, 30)]  # of the second it pays to share a copy
    images = {"pixel_values": torch.ones(1)}
    return [Row(prompts[which], draw(length), images if has_images else {}) for which, length, has_images in lengths]


row_lists = st.lists(
    st.tuples(st.integers(0, 1), st.integers(1, 40), st.sampled_from([False, False, True])), max_size=9
)


@pytest.fixture
def processes(monkeypatch):
    def make(count):
        made = Processes(count)
        monkeypatch.setattr(module.dist, "all_to_all_single", made.all_to_all_single)
        return made

    return make


@pytest.mark.parametrize("teacher", [{"shares_prompts": True}, {"is_sharded": True}], ids=["whole", "sharded"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(row_lists, min_size=2, max_size=4))
def test_every_row_gets_its_own_scores_wherever_they_were_made(teacher, processes, lengths):
    teacher = make_teacher(**teacher)
    rows = [make_rows(rank, each) for rank, each in enumerate(lengths)]
    scored = [[] for _ in rows]

    def work(accelerator):
        def watched(dealt):
            scored[accelerator.process_index] += dealt
            return score(dealt)

        return exchange(rows[accelerator.process_index], watched, teacher, 50, 2, accelerator)

    results = processes(len(rows)).run(work)
    for given_rows, got in zip(rows, results, strict=True):
        for one, other in zip(score(given_rows), got, strict=True):
            assert all(torch.equal(a, b.to(a)) for a, b in zip(one, other, strict=True))
    assert sum(map(len, scored)) == sum(map(len, rows))  # each once
    for rank, each in enumerate(rows):  # with images at home
        assert sum(bool(row.images) for row in each) == sum(bool(row.images) for row in scored[rank])


def test_what_is_sent_does_not_grow_with_the_number_of_processes(processes):
    def work(accelerator):
        lengths = [(0, 20, False)] * (6 + 2 * (accelerator.process_index % 2))
        return exchange(make_rows(accelerator.process_index, lengths), score, make_teacher(), 50, 2, accelerator)

    for count in (2, 4, 8):
        made = processes(count)
        made.run(work)
        # For all are two numbers and 24 bytes a row. Of every second process one row of 2 + 20 tokens goes to one that
        # has less, and 20 scores of 4 + 8 + 8 bytes come back
        rest = sorted(sent - (count - 1) * (16 + 24 * 8) for sent in made.sent)
        assert rest == [22 * 4] * (count // 2) + [20 * 20] * (count // 2)


def test_rows_that_are_even_stay_at_home(processes):
    made = processes(2)
    rows = make_rows(0, [(0, 20, False)] * 3)
    made.run(lambda accelerator: exchange(rows, score, make_teacher(), 50, 2, accelerator))
    assert made.sent == [16 + 3 * 24] * 2


def test_a_process_that_ran_out_of_memory_still_deals_as_the_others(processes):
    # Of 8 rows of 24 + 6 tokens each: on a budget of 4,096 they are dealt one by one, on one of 40 as groups
    teacher = make_teacher(shares_prompts=True, mixes_rows=True, placed=nullcontext)
    teacher.score = lambda prompts, completions, top_k, images: score(list(map(Row, prompts, completions)))
    rows = [Row(torch.arange(24), torch.arange(6) + number) for number in range(8)]

    def work(accelerator):
        accelerator.num_processes, rank = 2, accelerator.process_index
        scorer = RowScorer(teacher, accelerator, 4096)
        scorer.tokens_per_batch = [4096, 40][rank]
        return list(scorer.score([rows, []][rank], 2))

    results = processes(2).run(work)
    assert results[1] == [] and len(results[0]) == 8
    for (_, scores), expected in zip(results[0], score(rows), strict=True):
        assert torch.equal(scores.logps, expected.logps)


def test_of_a_sharded_teacher_every_process_gets_the_like(processes):
    # Each pass waits for the widest one: of one process two rows of 42 tokens, which cost 2 * (42 + 9), and of the
    # other 4 * (22 + 2) + 6
    scored = [[], []]

    def work(accelerator):
        rank = accelerator.process_index
        rows = make_rows(rank, [[(0, 40, False)] * 2, [(0, 20, False)] * 4 + [(0, 4, False)]][rank])
        watched = lambda dealt: scored[rank].extend(map(len, dealt)) or score(dealt)  # noqa: E731
        return exchange(rows, watched, make_teacher(is_sharded=True), 50, 2, accelerator)

    processes(2).run(work)
    assert [sorted(lengths) for lengths in scored] == [[6, 22, 22, 42], [22, 22, 42]]
