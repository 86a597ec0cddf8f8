"""How sequences are dealt out to processes and cut into micro-batches. Pure functions of token counts."""

from collections.abc import Hashable, Sequence
from heapq import heapify, heapreplace
from math import ceil


def sharing_pays(prompt_length: int, completion_lengths: Sequence[int]) -> bool:
    """
    Whether completions of one prompt are cheaper on its key-value cache than each with a copy of the prompt.

    On the cache the prompt runs once, but the completions are padded to the longest of them, and a micro-batch holds
    no other group. So it has to save a third of the tokens.
    """
    apart = sum(prompt_length + length for length in completion_lengths)
    on_cache = prompt_length + len(completion_lengths) * max(completion_lengths)
    return len(completion_lengths) > 1 and 3 * on_cache <= 2 * apart


def group_rows(
    prompts: Sequence[Hashable], prompt_lengths: Sequence[int], completion_lengths: Sequence[int]
) -> list[list[int]]:
    """
    Rows that are scored together: those of one prompt where sharing it pays, all others by themselves.

    Args:
        prompts (`Sequence[Hashable]`):
            What tells the prompts apart.
        prompt_lengths (`Sequence[int]`), completion_lengths (`Sequence[int]`):
            Token counts of each row.

    Returns:
        `list[list[int]]`: every row, once.
    """
    by_prompt: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(row)
    groups = []
    for rows in by_prompt.values():
        if sharing_pays(prompt_lengths[rows[0]], [completion_lengths[row] for row in rows]):
            groups.append(rows)
        else:
            groups.extend([row] for row in rows)
    return groups


def deal(costs: Sequence[int], loads: Sequence[int]) -> list[list[int]]:
    """
    Deal items out so that all processes have about the same to do: the dearest first, each to the one with least.

    Args:
        costs (`Sequence[int]`):
            Cost of each item.
        loads (`Sequence[int]`):
            What each process has to do anyway.

    Returns:
        `list[list[int]]`: the indices of each process.
    """
    hands: list[list[int]] = [[] for _ in loads]
    totals = [(load, process) for process, load in enumerate(loads)]
    heapify(totals)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        total, poorest = totals[0]
        hands[poorest].append(item)
        heapreplace(totals, (total + costs[item], poorest))
    return hands


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """
    Cut items into micro-batches of at most `budget` tokens, padding counted. One that is longer goes by itself.

    Of all ways to cut the items, sorted by length, it is the one with the fewest tokens, where each micro-batch counts
    as a sixteenth of the budget more: what starting it costs.

    Returns:
        `list[list[int]]`: indices, the longest first.
    """
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    costs, starts = [0.0], [0]  # of the best cut of the first items, and where its last micro-batch starts
    for end in range(1, len(order) + 1):
        tokens = {start: (end - start) * lengths[order[start]] for start in range(end)}
        fitting = [start for start in tokens if start == end - 1 or tokens[start] <= budget]
        starts.append(min(fitting, key=lambda start: costs[start] + tokens[start]))
        costs.append(costs[starts[-1]] + tokens[starts[-1]] + budget / 16)
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.insert(0, order[starts[end] : end])
        end = starts[end]
    return batches


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
