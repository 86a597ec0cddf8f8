"""
The rows of all processes, each scored where there is time for it: deal, send, score, send back.

All processes know the lengths of all rows and work out the same deal, so that no plan is sent around. Token ids and
scores go from one process to another, and to nobody else.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.functional import pad

from ..packing import count_cost, deal, group_rows
from ..teachers import Teacher, TokenScores
from .rows import Row, hash_ids


def exchange(
    rows: list[Row],
    score: Callable[[list[Row]], list[TokenScores]],
    teacher: Teacher,
    budget: int,
    top_k: int,
    accelerator: Accelerator,
) -> list[TokenScores]:
    """
    Score rows in whatever processes have time. All of them call it at once, also without rows.

    Args:
        rows (`list[Row]`):
            Those of this process. Rows with images stay here: their tensors are a thousand times the size of their
            tokens.
        score (`Callable`):
            What scores rows in this process.
        teacher ([`~trl_rlad.teachers.Teacher`]):
            By which they are scored.
        budget (`int`):
            Tokens of its micro-batches, the same in all processes.
        top_k (`int`):
            Number of the likeliest tokens that it names.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the other processes.

    Returns:
        `list[TokenScores]`: those of `rows`.
    """
    here, device = accelerator.process_index, accelerator.device
    hidden_size, top_k = teacher.config.get_text_config().hidden_size, min(top_k, teacher.vocab_size)
    texts, at_home = [row for row in rows if not row.images], [row for row in rows if row.images]
    load = sum(count_cost(len(row.prompt), [len(row.completion)], hidden_size) for row in at_home)
    homes, loads, prompts, prompt_lengths, lengths = gather_lengths(texts, load, accelerator)

    groups = [[i] for i in range(len(homes))]
    if teacher.shares_prompts:
        groups = group_rows(prompts, prompt_lengths, lengths, budget)
    costs = [count_cost(prompt_lengths[group[0]], [lengths[i] for i in group], hidden_size) for group in groups]
    # A sharded teacher waits in each micro-batch for the widest one: all processes should have the like
    hands = deal(costs, None if teacher.is_sharded else [homes[group[0]] for group in groups], loads)
    hands = [[i for group in hand for i in groups[group]] for hand in hands]
    mine = hands[here]
    # For each other process, the rows of this one that it scores, and its rows that this one scores
    sent = [[i for i in hand if homes[i] == here != process] for process, hand in enumerate(hands)]
    taken = [[i for i in mine if homes[i] == process != here] for process in range(len(hands))]

    dealt = dict(enumerate(texts, start=homes.index(here) if texts else 0))
    ids = swap(
        [[ids for i in part for ids in (dealt[i].prompt, dealt[i].completion)] for part in sent],
        [[length for i in part for length in (prompt_lengths[i], lengths[i])] for part in taken],
        torch.zeros(0, dtype=torch.int32, device=device),
    )
    ids = [part.long().cpu() for part in ids]
    dealt |= dict(zip(chain(*taken), map(Row, ids[::2], ids[1::2]), strict=True))

    scores = score([dealt[i] for i in mine] + at_home)

    known = dict(zip(mine, scores, strict=False))
    empty = torch.zeros(0, device=device), torch.zeros(0, top_k, dtype=torch.int32, device=device)
    parts = [
        swap([[known[i][kind] for i in part] for part in taken], [[lengths[i] for i in part] for part in sent], like)
        for kind, like in enumerate((*empty, empty[1].float()))
    ]
    known |= dict(zip(chain(*sent), map(TokenScores, *parts), strict=True))
    of_texts, of_images = (known[i] for i in sorted(dealt.keys() - set(chain(*taken)))), iter(scores[len(mine) :])
    return [next(of_images if row.images else of_texts) for row in rows]


def gather_lengths(rows: Sequence[Row], load: int, accelerator: Accelerator) -> tuple[list[int], ...]:
    """
    What all processes need to know: of all rows in the order of the processes, their homes; the load of each process;
    and again of all rows, a hash of the prompt, and the lengths of prompts and completions.
    """
    table = torch.zeros(len(rows), 3, dtype=torch.long)
    for entry, row in zip(table, rows, strict=True):
        prompt = int.from_bytes(hash_ids(row.prompt)[:8], "little", signed=True)
        entry[:] = torch.tensor([prompt, len(row.prompt), len(row.completion)])
    counts, loads = accelerator.gather(torch.tensor([[len(rows), load]], device=accelerator.device)).T.tolist()
    padded = pad(table, (0, 0, 0, max(counts) - len(rows)))
    parts = accelerator.gather(padded.to(accelerator.device)).cpu().view(len(counts), max(counts), 3)
    table = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    homes = [process for process, count in enumerate(counts) for _ in range(count)]
    return homes, loads, *table.T.tolist()


def swap(parts: list[list[torch.Tensor]], lengths: list[list[int]], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    Send tensors to each process, and get from each the tensors whose lengths these are, of the dtype of `like` and on
    its device.
    """
    flat = torch.cat([like, *(each.to(like) for each in chain(*parts))])
    received = flat.new_empty(sum(map(sum, lengths)), *flat.shape[1:])
    dist.all_to_all_single(received, flat, list(map(sum, lengths)), [sum(map(len, part)) for part in parts])
    return received.split(list(chain(*lengths)))
