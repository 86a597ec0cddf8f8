"""How sequences are dealt out to processes and cut into micro-batches. Pure functions of token counts."""

from collections.abc import Hashable, Sequence


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
    totals = list(loads)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        poorest = totals.index(min(totals))
        hands[poorest].append(item)
        totals[poorest] += costs[item]
    return hands


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """
    Cut items into micro-batches of at most `budget` tokens, padding counted. One that is longer goes by itself.

    An item of less than three quarters of its batch's length opens a new batch, unless the batch is still small: an
    eighth of the budget.

    Returns:
        `list[list[int]]`: indices, the longest first.
    """
    batches: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        if batches:
            batch, longest = batches[-1], lengths[batches[-1][0]]
            is_small = 8 * len(batch) * longest < budget
            if (len(batch) + 1) * longest <= budget and (is_small or 4 * lengths[item] >= 3 * longest):
                batch.append(item)
                continue
        batches.append([item])
    return batches


def cut_shared(prompt_length: int, completion_lengths: Sequence[int], budget: int) -> list[list[int]]:
    """
    Cut completions of one prompt, which runs once for each micro-batch, into micro-batches of at most `budget` tokens that
    run. Those that are kept on the key-value cache, one copy of the prompt for each completion, may be eight times as many.

    Returns:
        `list[list[int]]`: indices, the longest completion first.
    """
    longest = max(completion_lengths)
    rows = max(1, min((budget - prompt_length) // longest, 8 * budget // (prompt_length + longest)))
    order = sorted(range(len(completion_lengths)), key=lambda item: -completion_lengths[item])
    return [order[start : start + rows] for start in range(0, len(order), rows)]
