"""Dealing and cutting, for any token counts."""

import random
import time
from itertools import pairwise, product

from hypothesis import given, settings
from hypothesis import strategies as st

from trl_rlad.packing import count_cost, cut, cut_shared, deal, group_rows, micro_batches, sharing_pays, slice_rows


lengths = st.lists(st.integers(1, 500), max_size=60)


@given(lengths, st.integers(1, 2000))
def test_cut_loses_nothing_and_keeps_to_the_budget(lengths, budget):
    batches = cut(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)


@given(st.integers(1, 500), st.lists(st.integers(1, 500), min_size=1, max_size=20), st.integers(1, 4000))
def test_cut_shared_loses_nothing_and_keeps_to_the_budget(prompt_length, lengths, budget):
    batches = cut_shared(prompt_length, lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or prompt_length + len(batch) * longest <= budget
        assert len(batch) == 1 or len(batch) * (prompt_length + longest) <= 8 * budget


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 7)), max_size=60), st.integers(1, 8))
def test_deal_loses_nothing_and_is_even(items, processes):
    costs, homes = [cost for cost, _ in items], [home % processes for _, home in items]
    hands = deal(costs, homes, [0] * processes)
    assert len(hands) == processes and sorted(i for hand in hands for i in hand) == list(range(len(costs)))
    totals = [sum(costs[i] for i in hand) for hand in hands]
    # Who has more than the share got the last item as the one that had least: they differ by that item at most
    assert max(totals) - min(totals) <= max(costs, default=0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300)), max_size=40), st.integers(1, 400))
def test_groups_lose_nothing_and_share_only_a_prompt(rows, prompt_length):
    prompts, completions = [prompt for prompt, _ in rows], [length for _, length in rows]
    groups = group_rows(prompts, [prompt_length] * len(rows), completions, 400)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    for group in groups:
        assert len({prompts[i] for i in group}) == 1
        if len(group) > 1:
            on_cache = prompt_length + len(group) * max(completions[i] for i in group)
            assert on_cache < sum(prompt_length + completions[i] for i in group)


def test_when_sharing_pays():
    # 512 + 8 * 64 = 1,024 tokens against 8 * (512 + 64) = 4,608
    assert sharing_pays(512, [64] * 8)
    # one long completion would pad the others: 100 + 4 * 400 = 1,700 against 4 * 100 + 3 * 10 + 400 = 830
    assert not sharing_pays(100, [10, 10, 10, 400])
    assert not sharing_pays(512, [64])
    # A micro-batch of its own for 24 + 8 * 6 = 72 tokens costs 72 + 4096 / 16 = 328, against 240 * 17 / 16 = 255
    # beside others; with a budget of 1,024 it is 72 + 64 = 136, less than two thirds of it
    assert not sharing_pays(24, [6] * 8, 4096) and sharing_pays(24, [6] * 8, 1024)
    # A third exactly: 2 + 2 * 1 = 4 tokens against 2 * (2 + 1) = 6; and less: 3 against 4
    assert sharing_pays(2, [1, 1]) and not sharing_pays(1, [1, 1])


def padded_cost(batches, lengths, budget):
    return sum(len(batch) * max(lengths[i] for i in batch) + budget / 16 for batch in batches)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 200))
def test_no_other_cut_is_cheaper(lengths, budget):
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    costs = []
    for bars in product([True, False], repeat=len(order) - 1):  # whether to cut behind each item
        bounds = [0, *(i + 1 for i, bar in enumerate(bars) if bar), len(order)]
        batches = [order[start:end] for start, end in pairwise(bounds)]
        if all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= budget for batch in batches):
            costs.append(padded_cost(batches, lengths, budget))
    assert padded_cost(cut(lengths, budget), lengths, budget) == min(costs)


def cut_by_looking_at_all(lengths, budget):
    """The same by all starts of the last micro-batch, in quadratic time."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best = [(0.0, [])]
    for end in range(1, len(order) + 1):
        sizes = {start: (end - start) * lengths[order[start]] for start in range(end)}
        fitting = [start for start in sizes if start == end - 1 or sizes[start] <= budget]
        start = min(fitting, key=lambda start: best[start][0] + sizes[start])
        best.append((best[start][0] + sizes[start] + budget / 16, [*best[start][1], order[start:end]]))
    return best[-1][1]


@settings(deadline=None)
@given(st.one_of(lengths, st.lists(st.integers(1, 4), max_size=60)), st.integers(1, 3000))
def test_cut_is_that_of_looking_at_all(lengths, budget):
    assert cut(lengths, budget) == cut_by_looking_at_all(lengths, budget)


def test_hand_worked_cut():
    # the longest first: 2 * 7 > 10; then two rows of 3 and one of 2 make 9 + 10/16 in one, 8 + 20/16 in two
    assert cut([3, 7, 2, 3], 10) == [[1], [0, 3], [2]]


def test_hand_worked_deal():
    # A share is 21 / 2 = 10.5. A keeps 9; 5 -> B, as 9 + 5 > 10.5; 4 -> B (5 < 9); 3 -> A or B (9 = 9): the first
    assert deal([5, 9, 3, 4], [0, 0, 0, 0], [0, 0]) == [[1, 2], [0, 3]]
    # Each is at home and has its share: 9 and 5 + 4
    assert deal([5, 9, 4], [0, 1, 0], [0, 0]) == [[0, 2], [1]]
    # Where B has 8 to do already a share is 29 / 2: A keeps 9 and 5; 4 -> B (8 < 14); 3 -> B (12 < 14)
    assert deal([5, 9, 3, 4], [0, 0, 0, 0], [0, 8]) == [[1, 0], [3, 2]]
    # B has more than anybody's share anyway, so that of A and C is (6 * 10 + 0) / 2
    assert deal([10] * 6, [0] * 6, [0, 100, 0]) == [[0, 1, 2], [], [3, 4, 5]]


def test_hand_worked_deal_without_homes():
    # 9 -> A, 5 -> B, 4 -> B (5 < 9), 3 -> A or B (9 = 9): the first
    assert deal([5, 9, 3, 4], None, [0, 0]) == [[1, 2], [0, 3]]
    # Where B has 8 to do already: 9 -> A, 5 -> B (8 < 9), 4 -> A (9 < 13), 3 -> A or B (13 = 13)
    assert deal([5, 9, 3, 4], None, [0, 8]) == [[1, 3, 2], [0]]


def test_hand_worked_cost():
    # With 12 H = 12: a row of 3 + 9 tokens takes 12 + 144 / 12; without the prompt, which runs once, 12 + 12 - 3
    assert count_cost(3, [9], 1) == 24 and count_cost(3, [9, 9], 1) == 24 + 21


def test_small_groups_do_not_have_a_micro_batch_each():
    groups = group_rows([i // 8 for i in range(128)], [24] * 128, [6] * 128, 4096)
    assert len(cut([30] * len(groups), 4096)) == 1 and all(len(group) == 1 for group in groups)


@given(lengths, st.integers(1, 5))
def test_slices_are_runs_of_about_the_same_tokens(lengths, number):
    slices = slice_rows(lengths, number)
    assert len(slices) == number and sum(slices, []) == list(range(len(lengths)))
    for part in slices:
        assert abs(sum(lengths[i] for i in part) - sum(lengths) / number) <= max(lengths, default=0)


def test_hand_worked_slices():
    # Of 33 tokens 16.5 each: the first four rows end at 3, 6, 10 and 11
    assert slice_rows([3, 3, 4, 1, 20, 2], 2) == [[0, 1, 2, 3], [4, 5]] and slice_rows([], 2) == [[], []]


def test_dealing_and_cutting_take_no_time_at_scale():
    generator = random.Random(0)
    costs = [int(min(max(generator.expovariate(1 / 16000), 8), 131072)) for _ in range(65_536)]
    for work in (lambda: deal(costs, [i // 64 for i in range(65_536)], [0] * 1024), lambda: cut(costs, 131072)):
        seconds = []
        for _ in range(5):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.15  # 0.07 on a core of its own


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 99)), max_size=40), st.integers(1, 5), st.integers(1, 4))
def test_micro_batches_keep_to_their_window(lengths, rows, batches):
    prompts, completions = [prompt for prompt, _ in lengths], [completion for _, completion in lengths]
    window = rows * batches
    order = sum(cuts := micro_batches(prompts, completions, rows, window), [])
    assert all(len(cut) == rows for cut in cuts[:-1])
    for start in range(0, len(order), window):
        part = order[start : start + window]
        assert sorted(part) == list(range(start, start + len(part)))
        assert [completions[i] for i in part] == sorted((completions[i] for i in part), reverse=True)


def test_hand_worked_micro_batches():
    # In the first window of four, 9 and 5 come first, then of the two 2s the one with the longer prompt
    assert micro_batches([1, 1, 1, 3, 1, 1], [2, 5, 9, 2, 7, 8], size=2, window=4) == [[2, 1], [3, 0], [5, 4]]


def test_a_micro_batch_may_be_full():
    assert cut([5, 5], 10) == [[0, 1]] and cut([5, 5], 9) == [[0], [1]]


def test_hand_worked_cut_shared():
    # A prompt of 159: 11 completions would run at once, but on the cache 8 * 170 // 160 = 8; of 17, evenly, 6, 6 and 5
    assert [len(batch) for batch in cut_shared(159, [1] * 17, 170)] == [6, 6, 5]
    assert cut_shared(10, [1, 3, 2], 100) == [[1, 2, 0]]
