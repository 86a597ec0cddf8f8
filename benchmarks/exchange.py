"""
Measure what the exchange of rows and scores takes: bytes sent by each process and peak memory of each, for 2, 4 and 8
processes that talk over gloo. `fleet.py --check` compares the bytes with those that it counts.

    python benchmarks/exchange.py

The teacher answers at once, with eight named tokens from a vocabulary of 152,000. The bytes are those of the loopback
device of a network namespace of its own (Linux, `unshare`). `PYTHONPATH=OTHER_CHECKOUT` measures other code.
"""

import argparse
import json
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace


ROWS, MEAN, LONGEST, NAMED, VOCABULARY = 32, 2000, 8192, 8, 152_000


def draw_rows(rank: int) -> list[tuple[int, int, int]]:
    """The prompt, by its number, and the lengths of prompt and completion of a rank's rows, in groups of eight."""
    generator = random.Random(rank)
    mean, prompt, rows = MEAN * generator.uniform(0.7, 1.3), 0, []
    for row in range(ROWS):
        prompt = generator.randint(128, 512) if row % 8 == 0 else prompt
        rows.append((rank * ROWS + row // 8, prompt, int(min(max(generator.expovariate(1 / mean), 8), LONGEST))))
    return rows


def read_status(name: str) -> float:
    """MB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def read_loopback() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


def work():
    """Score one batch, twice: the first time warms up."""
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator

    from trl_rlad import TeacherScorer
    from trl_rlad.scoring import RowScorer
    from trl_rlad.teachers import TokenContract, TokenScores

    class Teacher:
        vocab_size, max_length, is_sharded, shares_prompts, mixes_rows = VOCABULARY, float("inf"), False, True, True
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=4096))

        def placed(self):
            return nullcontext()

        def score(self, prompts, completions, top_k=0, images=None):
            return [
                TokenScores(
                    torch.full((len(ids),), -1.0), ids[:, None].expand(-1, top_k), torch.full((len(ids), top_k), -2.0)
                )
                for ids in completions
            ]

    torch.set_num_threads(1)
    accelerator, teacher = Accelerator(cpu=True), Teacher()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    rows = draw_rows(rank)
    generator = torch.Generator().manual_seed(rank)
    widths = [max(column) for column in list(zip(*rows, strict=True))[1:]]
    prompts, completions = (torch.tensor(column)[:, None] for column in list(zip(*rows, strict=True))[1:])
    draw = [torch.randint(VOCABULARY, (ROWS, width), generator=generator) for width in widths]
    draw[0] = draw[0][torch.arange(ROWS) // 8]
    batch = {
        "prompt_ids": draw[0],
        "prompt_mask": (torch.arange(widths[0]) >= widths[0] - prompts).long(),
        "completion_ids": draw[1],
        "completion_mask": (torch.arange(widths[1]) < completions).long(),
    }
    contract = TokenContract(teacher, (), range(VOCABULARY))
    scorer = TeacherScorer({"": RowScorer(teacher, accelerator, 16384, contract)})
    scorer.score({name: value[:1] for name, value in batch.items()}, batch["completion_mask"][:1], NAMED)
    dist.barrier()
    start, before = read_loopback(), read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    dist.barrier()
    scores = scorer.score(batch, batch["completion_mask"], NAMED)
    peak, held = read_status("VmHWM") - before, read_status("VmRSS") - before
    dist.barrier()
    sent = (read_loopback() - start) / ranks / 1e6
    assert (scores["teacher_per_token_logps"] == -batch["completion_mask"].float()).all()
    peaks = [None] * ranks
    dist.all_gather_object(peaks, (peak, held))
    if rank == 0:
        print(json.dumps({"sent": sent, "peak": max(p for p, _ in peaks), "held": max(h for _, h in peaks)}))
    dist.barrier()
    dist.destroy_process_group()


def measure(processes: int) -> dict[str, float]:
    """MB that each process sends on average, and that the one with most holds at the peak and in the end."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *launch, __file__, "--work"]
    lines = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()
    return json.loads(next(line for line in lines if line.startswith("{")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8], help="numbers of processes")
    parser.add_argument("--work", action="store_true", help="be one of them")
    options = parser.parse_args()
    if options.work:
        return work()
    print("| processes | sent by each, MB | peak memory of each, MB | with the result held, MB |\n|---|---|---|---|")
    for processes in options.processes:
        seen = measure(processes)
        print(f"| {processes} | {seen['sent']:.2f} | {seen['peak']:.0f} | {seen['held']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
