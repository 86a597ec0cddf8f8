"""
Work out what a training step costs on a fleet, TRL's way and ours: tokens, padding, imbalance, and seconds of each
phase.

    python benchmarks/fleet.py
    python benchmarks/fleet.py --lengths benchmarks/results/mini_lengths.json
    python benchmarks/fleet.py --check
    torchrun --nproc-per-node 2 benchmarks/fleet.py --check

Rows are drawn, dealt out and cut by the code that trains, and each forward pass costs what its tokens and pairs of
tokens cost. TRL's way is that of its reference model, for the teacher too. `--check` compares the worked out seconds
with steps that really run here, after the cost of a token, a pair and a pass has been measured on passes without
padding; and, not under `torchrun`, the bytes that 2, 4 and 8 processes send each other here (`exchange.py`).
"""

import argparse
import json
import math
import os
import random
import statistics
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from trl_rlad.packing import count_cost, cut, cut_shared, deal, group_rows, micro_batches, slice_rows
from trl_rlad.scoring.row_scorer import SLICE


NAMED = 8  # tokens of the teacher beside each
NODE = 8  # ranks of a node


@dataclass
class Cost:
    """Seconds of a pass, of each of its tokens, and of each pair of tokens in attention."""

    run: float
    token: float
    pair: float

    def seconds(self, passes) -> float:
        return sum(self.run + self.token * tokens + self.pair * pairs for tokens, pairs in passes)


@dataclass
class Model:
    """Parameters, layers, and width of the attention."""

    parameters: float
    layers: int
    width: int

    def cost(self, flops: float, passes: int, gather: float) -> Cost:
        # One forward pass takes 2 FLOP a parameter and token, and 2 a pair, as a causal kernel leaves out half of them
        work = passes / flops
        return Cost(gather, 2 * self.parameters * work, 2 * self.layers * self.width * work)


@dataclass
class Fleet:
    """Ranks with their rollouts, and devices with their useful FLOP/s, and bytes/s within nodes and between them."""

    name: str
    ranks: int
    student: Model
    teacher: Model
    mean_length: int
    longest: int
    rollouts: int = 64
    micro_batch: int = 4
    budget: int = 16384
    is_sharded: bool = False
    flops: float = 4e14
    within: float = 4e11
    bandwidth: float = 5e10


QWEN3_600M = Model(0.6e9, 28, 2048)
QWEN3_8B = Model(8.2e9, 36, 4096)
QWEN3_32B = Model(32.8e9, 64, 8192)
FLEETS = [
    Fleet("one GPU", 1, QWEN3_600M, QWEN3_8B, 600, 2048),
    Fleet("one node", 8, QWEN3_600M, QWEN3_8B, 600, 2048),
    Fleet("twice the rollouts", 8, QWEN3_600M, QWEN3_8B, 600, 2048, rollouts=128),
    Fleet("longer", 8, QWEN3_600M, QWEN3_8B, 4000, 32768, budget=32768),
    Fleet("larger teacher, ZeRO-3", 8, QWEN3_600M, QWEN3_32B, 600, 2048, is_sharded=True),
    Fleet("64 ranks", 64, QWEN3_8B, QWEN3_32B, 4000, 32768, budget=32768, is_sharded=True),
    Fleet("1,024 ranks", 1024, QWEN3_8B, QWEN3_32B, 16000, 131072, budget=131072, is_sharded=True),
]


def draw_rows(fleet: Fleet, lengths: list | None, group: int = 8) -> list[list[tuple[int, int, int]]]:
    """For each rank the prompt, by its number, and the lengths of prompt and completion of its rows."""
    generator, ranks = random.Random(0), []
    for rank in range(fleet.ranks):
        rows = []
        for row in range(fleet.rollouts):
            if lengths:
                prompt, completion = lengths[(rank * fleet.rollouts + row) % len(lengths)]
            else:
                prompt = generator.randint(128, 512) if row % group == 0 else prompt
                completion = int(min(max(generator.expovariate(1 / fleet.mean_length), 8), fleet.longest))
            rows.append((rank * fleet.rollouts + row // group, prompt, completion))
        ranks.append(rows)
    return ranks


def dense(rows: int, width: int) -> tuple[int, int]:
    """Tokens and pairs of a pass over rows of one width."""
    return rows * width, rows * width**2


def padded_passes(rows, micro_batch: int, is_trimmed: bool):
    """The passes of a student, or of a reference model, over the rows of a rank."""
    prompts, completions = [row[1] for row in rows], [row[2] for row in rows]
    cuts = micro_batches(prompts, completions, micro_batch, window=len(rows))
    if not is_trimmed:
        return [dense(len(part), max(prompts) + max(completions)) for part in cuts]
    return [dense(len(part), max(prompts[i] for i in part) + max(completions[i] for i in part)) for part in cuts]


def teacher_passes(rows, budget: int, shares_prompts: bool):
    """The passes of our teacher over the rows that a rank was dealt."""
    passes = []
    groups = group_rows(*zip(*rows, strict=True), budget) if shares_prompts else [[i] for i in range(len(rows))]
    lengths = [sum(rows[group[0]][1:]) for group in groups if len(group) == 1]
    passes += [dense(len(part), max(lengths[i] for i in part)) for part in cut(lengths, budget)]
    for group in groups:
        if len(group) > 1:
            prompt, completions = rows[group[0]][1], [rows[i][2] for i in group]
            for part in cut_shared(prompt, completions, budget):
                longest = max(completions[i] for i in part)
                passes.append(dense(1, prompt))
                passes.append((len(part) * longest, len(part) * longest * (prompt + longest)))
    return passes


def slice_ranks(ranks):
    """The rows of all ranks that are dealt out and scored together."""
    lengths = [[prompt + completion for _, prompt, completion in rows] for rows in ranks]
    number = math.ceil(max(map(sum, lengths)) / SLICE)
    slices = [slice_rows(each, number) for each in lengths]
    return [[[rows[i] for i in part[n]] for rows, part in zip(ranks, slices, strict=True)] for n in range(number)]


def deal_rows(ranks, shares_prompts: bool, hidden_size: int, budget: int):
    """For each rank the rows that it scores, each with the rank that it is at home, dealt out as `exchange` does."""
    rows = [(row, home) for home, each in enumerate(ranks) for row in each]
    prompts, prompt_lengths, lengths = zip(*(row for row, _ in rows), strict=True)
    groups = [[i] for i in range(len(rows))]
    if shares_prompts:
        groups = group_rows(prompts, prompt_lengths, lengths, budget)
    costs = [count_cost(prompt_lengths[group[0]], [lengths[i] for i in group], hidden_size) for group in groups]
    homes = [rows[group[0]][1] for group in groups] if shares_prompts else None  # as of a sharded teacher
    hands = deal(costs, homes, [0] * len(ranks))
    return [[rows[i] for group in hand for i in groups[group]] for hand in hands]


@dataclass
class Traffic:
    """Bytes that a rank sends to the others, within its node and to other nodes, and holds of rows of others."""

    within: float = 0.0
    between: float = 0.0
    held: float = 0.0

    def seconds(self, fleet: Fleet) -> float:
        return self.within / fleet.within + self.between / fleet.bandwidth


def count_traffic(ranks, dealt) -> list[Traffic]:
    """The traffic of each rank: the table of all lengths, token ids of rows that leave home, and their scores back."""
    traffic = [Traffic() for _ in ranks]

    def send(source, target, size):
        if source // NODE == target // NODE:
            traffic[source].within += size
        else:
            traffic[source].between += size
        traffic[target].held += size

    most = max(map(len, ranks))
    for rank, each in enumerate(traffic):
        beside = min(NODE, len(ranks) - rank // NODE * NODE) - 1
        each.within, each.between = ((16 + 24 * most) * count for count in (beside, len(ranks) - 1 - beside))
        each.held = 24 * most * len(ranks)
    for rank, rows in enumerate(dealt):
        for (_, prompt, completion), home in rows:
            if home != rank:
                send(home, rank, 4 * (prompt + completion))
                send(rank, home, (4 + 8 * NAMED) * completion)
    return traffic


def count_traffic_to_all(ranks) -> Traffic:
    """As it was until version 0.1: everybody is sent all rows, 8 bytes a token, and all scores."""
    sizes = [sum(8 * prompt + (8 + 4 + 12 * NAMED) * completion for _, prompt, completion in rows) for rows in ranks]
    beside, mean = min(NODE, len(ranks)) - 1, statistics.mean(sizes)
    return Traffic(beside * mean, (len(ranks) - 1 - beside) * mean, sum(sizes))


def slowest(ranks_passes, cost: Cost, in_step: bool) -> float:
    """Seconds until the last rank is done; `in_step`, all ranks wait for each other at each pass."""
    if not in_step:
        return max(cost.seconds(passes) for passes in ranks_passes)
    rounds = max(map(len, ranks_passes))
    return sum(max(cost.seconds(passes[i : i + 1]) for passes in ranks_passes) for i in range(rounds))


def imbalance(ranks_passes) -> float:
    """Tokens of the busiest rank over those of the mean."""
    tokens = [sum(count for count, _ in passes) for passes in ranks_passes]
    return max(tokens) / statistics.mean(tokens)


def work_out(fleet: Fleet, ranks, student: Cost, teacher: Cost, width: int) -> dict[str, dict[str, float]]:
    """Padding, imbalance and seconds of TRL's way and ours, with a teacher of this width."""
    slices = slice_ranks(ranks)
    dealt = [deal_rows(each, not fleet.is_sharded, width, fleet.budget) for each in slices]
    traffic = list(map(count_traffic, slices, dealt))
    real = sum(prompt + completion for rows in ranks for _, prompt, completion in rows)
    padded, trimmed = (
        [padded_passes(rows, fleet.micro_batch, is_ours) for rows in ranks] for is_ours in (False, True)
    )
    scored = [
        [teacher_passes([row for row, _ in rows], fleet.budget, not fleet.is_sharded) for rows in each]
        for each in dealt
    ]
    figures = {}
    for way, trained, parts in (("TRL", padded, [padded]), ("ours", trimmed, scored)):
        seconds = {
            "student": slowest(trained, student, fleet.is_sharded),
            "teacher": sum(slowest(part, teacher, fleet.is_sharded) for part in parts),
            "exchange": sum(max(each.seconds(fleet) for each in part) for part in traffic) if way == "ours" else 0.0,
        }
        figures[way] = {
            "padding": 1 - real / sum(count for one in trained for count, _ in one),
            "imbalance": imbalance(trained),
            **seconds,
            "step": sum(seconds.values()),
            # Sent in all slices, held in one
            "within": max(sum(each.within for each in rank) for rank in zip(*traffic, strict=True)),
            "between": max(sum(each.between for each in rank) for rank in zip(*traffic, strict=True)),
            "held": max(each.held for part in traffic for each in part),
        }
    return figures


def fit_cost(seconds: dict[tuple[int, int], float]) -> Cost:
    """What a pass, a token and a pair cost, from the seconds of passes without padding, given by rows and width."""
    figures = torch.tensor([[1.0, *dense(*shape)] for shape in seconds], dtype=torch.float64)
    measured = torch.tensor(list(seconds.values()), dtype=torch.float64)
    # Relative errors are to be small, so each equation is divided by its right side
    ones = torch.ones(len(seconds), 1, dtype=torch.float64)
    return Cost(*torch.linalg.lstsq(figures / measured[:, None], ones).solution.flatten().tolist())


def check():
    """
    Steps of TRL's GRPO and of ours with a teacher of four times the size, run and worked out: the seconds for which
    the busiest rank has its core.
    """
    import step_overhead as steps
    from teacher_scoring import time_ways
    from transformers import Qwen3ForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = (steps.save(Path(folder, size), *steps.SIZES[size]) for size in ("1x", "4x"))
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        rollouts = [steps.make_rollouts("exponential", seed=rank) for rank in range(ranks)]
        mine = rollouts[int(os.environ.get("RANK", 0))]
        ways = {
            "TRL": steps.make_step(student, None, False, 8, mine, folder),
            "ours": steps.make_step(student, teacher, True, 8, mine, folder),
            "one token": steps.make_step(student, None, False, 8, ([[5]] * 64, [[5]] * 64), folder),
        }
        trained = Qwen3ForCausalLM.from_pretrained(student)
        add_fused_lm_head(trained, outputs=("log_probs", "entropy"))
        scored = Qwen3ForCausalLM.from_pretrained(teacher).eval()
        add_fused_lm_head(scored)

        def draw(rows, width):
            ids = torch.randint(4, 32, (rows, width))
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "fused_lm_head": True}

        def train(rows, width):
            trained(**draw(rows, width)).loss.backward()

        @torch.no_grad()
        def score(rows, width):
            scored(**draw(rows, width))

        shapes = [(8, 50), (8, 120), (8, 250), (8, 500), (4, 100), (2, 300)]
        ways |= {("train", *shape): partial(train, *shape) for shape in shapes}
        ways |= {("score", *shape): partial(score, *shape) for shape in shapes}
        seconds = time_ways(ways, 7, torch.device("cpu"))
        costs = [fit_cost({shape: seconds[kind, *shape] for shape in shapes}) for kind in ("train", "score")]
        # Rewards, metrics and their exchange, which a step has beside its passes
        beside = seconds["one token"] - costs[0].seconds([dense(8, 2)] * 8)
        lengths = [(len(p), len(c)) for each in rollouts for p, c in zip(*each, strict=True)]
        fleet = Fleet("here", ranks, None, None, 0, 0, micro_batch=8, budget=1024)
        figures = work_out(fleet, draw_rows(fleet, lengths), *costs, scored.config.hidden_size)
    expected = {"TRL": figures["TRL"]["student"] + beside, "ours": figures["ours"]["step"] + beside}
    pairs = {way: (seconds[way], expected[way]) for way in expected}
    everyone = [pairs] * ranks
    if ranks > 1:
        dist.all_gather_object(everyone, pairs)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"| {ranks} process(es) | measured, s | worked out, s | off by |\n|---|---|---|---|")
        for way in pairs:
            seconds, expected = (max(column) for column in zip(*(each[way] for each in everyone), strict=True))
            print(f"| {way} | {seconds:.2f} | {expected:.2f} | {expected / seconds - 1:+.0%} |")


def check_bytes():
    """Bytes that processes send each other here, and worked out."""
    import exchange

    print("\n| processes | sent by each, MB | worked out, MB | off by |\n|---|---|---|---|")
    for processes in (2, 4, 8):
        sent, ranks = exchange.measure(processes)["sent"], list(map(exchange.draw_rows, range(processes)))
        traffic = count_traffic(ranks, deal_rows(ranks, True, 4096, 16384))
        counted = statistics.mean(each.within + each.between for each in traffic) / 1e6
        print(f"| {processes} | {sent:.2f} | {counted:.2f} | {counted / sent - 1:+.0%} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", help="JSON file with pairs of a prompt's and a completion's length, to draw from")
    parser.add_argument("--flops", type=float, help="useful FLOP/s of a device")
    parser.add_argument("--within", type=float, help="bytes/s between devices of a node")
    parser.add_argument("--bandwidth", type=float, help="bytes/s between nodes")
    parser.add_argument("--check", action="store_true", help="compare with steps that run here")
    options = parser.parse_args()
    if options.check:
        check()
        return check_bytes() if "RANK" not in os.environ else None
    lengths = json.loads(Path(options.lengths).read_text()) if options.lengths else None
    print(
        "| fleet | ranks | mean and longest | padding | imbalance | student, s | teacher, s | exchange, s | step, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    traffic = []
    for fleet in FLEETS:
        given = {name: getattr(options, name) for name in ("flops", "within", "bandwidth") if getattr(options, name)}
        fleet = replace(fleet, **given)
        gathers = [
            2 * model.parameters / fleet.bandwidth * fleet.is_sharded for model in (fleet.student, fleet.teacher)
        ]
        costs = fleet.student.cost(fleet.flops, 3, 2 * gathers[0]), fleet.teacher.cost(fleet.flops, 1, gathers[1])
        ranks = draw_rows(fleet, lengths)
        figures = work_out(fleet, ranks, *costs, fleet.teacher.width)
        cells = [fleet.name, f"{fleet.ranks:,}", f"{fleet.mean_length:,}, {fleet.longest:,}"]
        for name in ("padding", "imbalance", "student", "teacher", "exchange", "step"):
            form = {"padding": ".0%", "imbalance": ".2f"}.get(name, ".3g")
            cells.append(" / ".join(f"{figures[way][name]:{form}}" for way in ("TRL", "ours")))
        print("| " + " | ".join(cells) + " |")
        if fleet.ranks > 1:
            before, cells = count_traffic_to_all(ranks), [fleet.name, f"{fleet.ranks:,}"]
            for name in ("within", "between", "held"):
                cells.append(f"{getattr(before, name) / 1e6:,.0f} / {figures['ours'][name] / 1e6:,.0f}")
            cells.append(f"{before.seconds(fleet):.2g} / {figures['ours']['exchange']:.2g}")
            traffic.append("| " + " | ".join(cells) + " |")
    print("\n| fleet | ranks | sent within the node, MB | sent to others, MB | held of others, MB | exchange, s |")
    print("\n".join(["|---|---|---|---|---|---|", *traffic]))


if __name__ == "__main__":
    main()
