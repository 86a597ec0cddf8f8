"""
Send 2,000 rows of 256 tokens to a teacher behind vLLM on this machine, and see how fast and how steadily they come
back.

    python benchmarks/served.py

Server and client share this machine's cores. The model is a small one, of random weights: this is about requests.
"""

import argparse
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import step_overhead as steps
import torch
from accelerate import Accelerator
from test_vllm import VLLM
from tqdm import tqdm

from trl_rlad import RLADConfig
from trl_rlad.scoring import ServedRowScorer, TeacherScorer
from trl_rlad.teachers import ServedTeacher


def server_memory(server: VLLM) -> float:
    """MiB of the server and its workers."""
    table = subprocess.run(["ps", "-eo", "pgid=,rss="], capture_output=True, text=True, check=True).stdout
    rows = (map(int, line.split()) for line in table.splitlines())
    return sum(rss for pgid, rss in rows if pgid == server.process.pid) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=256, help="of each row, a quarter of them its prompt")
    parser.add_argument("--batch", type=int, default=250, help="rows of a generation batch")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = steps.save(Path(folder, "model"), *steps.SIZES["1x"])
        server = VLLM(path, folder)
        try:
            config = RLADConfig(
                folder,
                use_cpu=True,
                bf16=False,
                report_to="none",
                teacher_server_urls=server.url,
                teacher_timeout=1200.0,
            )
            teacher = ServedTeacher([server.url], None, config)
            scorer = TeacherScorer({"": ServedRowScorer(teacher, Accelerator(cpu=True), 1)})
            log, before = [], server.count_requests()
            for _ in tqdm(range(args.rows // args.batch)):
                ids = torch.randint(4, 32, (args.batch, args.tokens), generator=generator)
                start = args.tokens // 4
                batch = {"prompt_ids": ids[:, :start], "completion_ids": ids[:, start:]}
                batch |= {f"{part}_mask": torch.ones_like(batch[f"{part}_ids"]) for part in ("prompt", "completion")}
                begun = time.perf_counter()
                scorer.score(batch, batch["completion_mask"])
                client = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                log.append((time.perf_counter() - begun, client, server_memory(server)))
            requests = server.count_requests() - before
        finally:
            server.kill()
    print("| rows | rows/s | tokens/s | client, MiB at most | server, MiB |\n|---|---|---|---|---|")
    for number, (seconds, client, served) in enumerate(log):
        rate = args.batch / seconds
        print(
            f"| {(number + 1) * args.batch:,} | {rate:.0f} | {rate * args.tokens:,.0f} | {client:.0f} | {served:.0f} |"
        )
    print(f"\n{requests:.0f} requests, with the checks of every minute.")


if __name__ == "__main__":
    main()
