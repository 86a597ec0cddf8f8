"""Dealing and cutting, for any token counts."""

from hypothesis import given
from hypothesis import strategies as st

from trl_rlad.packing import cut, cut_shared, deal, group_rows, sharing_pays


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


def test_hand_worked_cut():
    # the longest first: 2 * 7 > 10; then two rows of 3 make 6, and a third of 2 < 3/4 * 3 goes by itself
    assert cut([3, 7, 2, 3], 10) == [[1], [0, 3], [2]]


def test_an_item_too_short_for_its_batch_opens_a_new_one():
    # 50 < 3/4 of 100, and 100 is no less than 200 / 8; 80 is long enough, and then 2 * 100 is the whole budget
    assert cut([100, 50, 80, 50], 200) == [[0, 2], [1, 3]]
    # in a budget of 4,000, a batch of 100 is still small (below 500)
    assert cut([100, 50, 80, 50], 4000) == [[0, 2, 1, 3]]


def test_hand_worked_deal():
    # 9 -> A, 5 -> B, 4 -> B (5 < 9), 3 -> A or B (9 = 9): the first
    assert deal([5, 9, 3, 4], [0, 0]) == [[1, 2], [0, 3]]
    # Where B has 8 to do already: 9 -> A, 5 -> B (8 < 9), 4 -> A (9 < 13), 3 -> A or B (13 = 13)
    assert deal([5, 9, 3, 4], [0, 8]) == [[1, 3, 2], [0]]
