"""Dealing and cutting, for any token counts."""

from itertools import pairwise, product

from hypothesis import given, settings
from hypothesis import strategies as st

from trl_rlad.packing import cut, cut_shared, deal, group_rows, micro_batches, sharing_pays


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


@given(lengths, st.integers(1, 8))
def test_deal_loses_nothing_and_is_even(costs, processes):
    hands = deal(costs, [0] * processes)
    assert len(hands) == processes and sorted(i for hand in hands for i in hand) == list(range(len(costs)))
    totals = [sum(costs[i] for i in hand) for hand in hands]
    # The last item that the fullest process got went to the one that had least: they differ by that item at most
    assert max(totals) - min(totals) <= max(costs, default=0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300)), max_size=40), st.integers(1, 400))
def test_groups_lose_nothing_and_share_only_a_prompt(rows, prompt_length):
    prompts, completions = [prompt for prompt, _ in rows], [length for _, length in rows]
    groups = group_rows(prompts, [prompt_length] * len(rows), completions)
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
    # A third exactly: 2 + 2 * 1 = 4 tokens against 2 * (2 + 1) = 6; and less: 3 against 4
    assert sharing_pays(2, [1, 1]) and not sharing_pays(1, [1, 1])


def count_cost(batches, lengths, budget):
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
            costs.append(count_cost(batches, lengths, budget))
    assert count_cost(cut(lengths, budget), lengths, budget) == min(costs)


def test_hand_worked_cut():
    # the longest first: 2 * 7 > 10; then two rows of 3 and one of 2 make 9 + 10/16 in one, 8 + 20/16 in two
    assert cut([3, 7, 2, 3], 10) == [[1], [0, 3], [2]]


def test_hand_worked_deal():
    # 9 -> A, 5 -> B, 4 -> B (5 < 9), 3 -> A or B (9 = 9): the first
    assert deal([5, 9, 3, 4], [0, 0]) == [[1, 2], [0, 3]]
    # Where B has 8 to do already: 9 -> A, 5 -> B (8 < 9), 4 -> A (9 < 13), 3 -> A or B (13 = 13)
    assert deal([5, 9, 3, 4], [0, 8]) == [[1, 3, 2], [0]]


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
