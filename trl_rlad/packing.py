"""How sequences are dealt out to processes and cut into micro-batches. Pure functions of token counts."""

from collections import deque
from collections.abc import Hashable, Sequence
from heapq import heapify, heapreplace
from itertools import accumulate
from math import ceil


START = 16  # starting a micro-batch costs as much as this part of its budget


def sharing_pays(prompt_length: int, completion_lengths: Sequence[int], budget: int = 0) -> bool:
    """
    Whether completions of one prompt are cheaper on its key-value cache than each with a copy of the prompt.

    On the cache the prompt runs once, but the completions are padded to the longest of them, and a micro-batch holds
    no other group, however far it is from its `budget` of tokens. So it has to save a third of the cost. The `budget`
    of a micro-batch that is started in any case is 0.
    """
    apart = sum(prompt_length + length for length in completion_lengths)
    on_cache = prompt_length + len(completion_lengths) * max(completion_lengths)
    costs = on_cache + max(on_cache, budget) / START, apart + apart / START
    return len(completion_lengths) > 1 and 3 * costs[0] <= 2 * costs[1]


def group_rows(
    prompts: Sequence[Hashable], prompt_lengths: Sequence[int], completion_lengths: Sequence[int], budget: int
) -> list[list[int]]:
    """
    Rows that are scored together: those of one prompt where sharing it pays, all others by themselves.

    Args:
        prompts (`Sequence[Hashable]`):
            What tells the prompts apart.
        prompt_lengths (`Sequence[int]`), completion_lengths (`Sequence[int]`):
            Token counts of each row.
        budget (`int`):
            Tokens of a micro-batch.

    Returns:
        `list[list[int]]`: every row, once.
    """
    by_prompt: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(row)
    groups = []
    for rows in by_prompt.values():
        if sharing_pays(prompt_lengths[rows[0]], [completion_lengths[row] for row in rows], budget):
            groups.append(rows)
        else:
            groups.extend([row] for row in rows)
    return groups


def count_cost(prompt_length: int, completion_lengths: Sequence[int], hidden_size: int) -> int:
    """
    What it costs to score completions of one prompt that runs once, in multiples of a token without any before it.

    A layer of width H has about 12 H² parameters, so that a token takes 24 H² operations beside attention and, in a
    sequence of L tokens, 2 H L in it: as much where L is 12 H.
    """

    def cost(length):
        return length + length * length // (12 * hidden_size)

    return cost(prompt_length) + sum(
        cost(prompt_length + length) - cost(prompt_length) for length in completion_lengths
    )


def deal(costs: Sequence[int], homes: Sequence[int] | None, loads: Sequence[int]) -> list[list[int]]:
    """
    Deal items out so that all processes have about the same to do, and items leave home only for that.

    The dearest first, each goes to its home if it fits into the home's share, and else to the process with least.

    Args:
        costs (`Sequence[int]`):
            Cost of each item.
        homes (`Sequence[int]` or `None`):
            The process that each item is at. `None` for none: then all processes get items of about the same costs.
        loads (`Sequence[int]`):
            What each process has to do anyway.

    Returns:
        `list[list[int]]`: the indices of each process.
    """
    hands: list[list[int]] = [[] for _ in loads]
    totals, work = list(loads), sum(costs)
    # The level to which the work fills up those that have least to do anyway
    share = min((work + filled) / count for count, filled in enumerate(accumulate(sorted(loads)), start=1))
    heap = [(total, process) for process, total in enumerate(totals)]
    heapify(heap)
    for item in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        process = homes[item] if homes else 0
        if not homes or (totals[process] and totals[process] + costs[item] > share):
            total, process = heap[0]
            while total != totals[process]:  # it has been given something at home
                heapreplace(heap, (totals[process], process))
                total, process = heap[0]
        totals[process] += costs[item]
        hands[process].append(item)
    return hands


def slice_rows(lengths: Sequence[int], number: int) -> list[list[int]]:
    """A number of runs of rows of about the same tokens each: it differs by a row at most."""
    slices: list[list[int]] = [[] for _ in range(number)]
    total = sum(lengths)
    for row, end in enumerate(accumulate(lengths)):
        slices[(end - 1) * number // total].append(row)
    return slices


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """
    Cut items into micro-batches of at most `budget` tokens, padding counted. One that is longer goes by itself.

    Of all ways to cut the items, sorted by length, it is the one with the fewest tokens, with what starting each
    micro-batch costs.

    Returns:
        `list[list[int]]`: indices, the longest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    cost, starts = 0.0, []  # of the best cut of the items so far, and for each end where its last micro-batch starts
    # Starts that are the best from some end on: this end, the start, its length, the cost if it reached back to item 0
    candidates: deque[tuple[int, int, int, float]] = deque()
    for start, item in enumerate(order):
        length = lengths[item]
        since, from_0 = start + 1, cost - start * length
        while candidates:
            best_since, other, longer, other_from_0 = candidates[-1]
            since = other + max(1, budget // longer) + 1  # the first end that `other` doesn't reach
            behind = from_0 - other_from_0
            if longer > length:
                since = min(since, max(start + 1, int(behind // (longer - length)) + 1))
            elif behind < 0:
                since = start + 1
            if since > best_since:
                break
            candidates.pop()
        candidates.append((since, start, length, from_0))
        end = start + 1
        while len(candidates) > 1 and candidates[1][0] <= end:
            candidates.popleft()
        _, best, longest, from_0 = candidates[0]
        starts.append(best)
        cost = from_0 + end * longest + budget / START
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[starts[end - 1] : end])
        end = starts[end - 1]
    return batches[::-1]


def cut_shared(prompt_length: int, completion_lengths: Sequence[int], budget: int) -> list[list[int]]:
    """
    Cut completions of one prompt, which runs once for each micro-batch, into micro-batches of at most `budget` tokens
    that run. Those that are kept on the key-value cache, one copy of the prompt for each completion, may be eight
    times as many.

    Returns:
        `list[list[int]]`: indices, the longest completion first.
    """
    longest = max(completion_lengths)
    most = max(1, min((budget - prompt_length) // longest, 8 * budget // (prompt_length + longest)))
    rows = ceil(len(completion_lengths) / ceil(len(completion_lengths) / most))  # evenly
    order = sorted(range(len(completion_lengths)), key=lambda item: -completion_lengths[item])
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def micro_batches(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[int], size: int, window: int
) -> list[list[int]]:
    """
    Cut items into micro-batches of `size` of similar lengths, moving none out of its window.

    Prompts are padded on the left and completions on the right, so a micro-batch is as wide as its longest prompt and
    its longest completion together. Completions vary more: they are what is sorted by.

    Args:
        prompt_lengths (`Sequence[int]`), completion_lengths (`Sequence[int]`):
            Token counts of each item.
        size (`int`):
            Items of a micro-batch. If they don't divide the number of items, the last one is smaller.
        window (`int`):
            Items among which order is free.

    Returns:
        `list[list[int]]`: indices, in each window the longest completion first.
    """
    order: list[int] = []
    for start in range(0, len(completion_lengths), window):
        items = range(start, min(start + window, len(completion_lengths)))
        order += sorted(items, key=lambda item: (-completion_lengths[item], -prompt_lengths[item]))
    return [order[start : start + size] for start in range(0, len(order), size)]
