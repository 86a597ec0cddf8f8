"""
Compare the scores of a teacher behind a URL with those of a copy at hand.

    trl-rlad compare http://localhost:8000 Qwen/Qwen3-8B
"""

import argparse
import sys
import tempfile
from typing import Any

from . import HelpFormatter


ROWS, LENGTH = 16, 128


def compare(url: str, model: str, dtype: str = "auto") -> tuple[float, float]:
    """Mean and largest difference between the log-probabilities of a served teacher and of a copy, in nats. The rows
    are the copy's own samples, prompted by a random token, as rollouts are far likelier than random ids."""
    import torch
    from accelerate import Accelerator

    from ..config import RLADConfig
    from ..teachers import LocalTeacher, ServedTeacher

    with tempfile.TemporaryDirectory() as folder:
        args = RLADConfig(
            folder, bf16=False, report_to="none", teacher_server_urls=url, teacher_model_init_kwargs={"dtype": dtype}
        )
        served, local = ServedTeacher([url], model, args), LocalTeacher(model, args, Accelerator())
        torch.manual_seed(0)
        prompts = torch.randint(len(local.tokenizer), (ROWS, 1))
        length = int(min(LENGTH, served.max_length, local.max_length)) - 1
        model_here: Any = local.model
        with local.placed():
            sampling = {"do_sample": True, "min_new_tokens": length, "max_new_tokens": length}
            rows = model_here.generate(prompts.to(model_here.device), **sampling).cpu()
            completions = [row[1:] for row in rows]
            expected = local.score(list(prompts), completions)
        scores = served.score(list(prompts), completions)
        served.release()
    differences = torch.cat([(a.logps - b.logps.cpu()).abs() for a, b in zip(scores, expected, strict=True)])
    return differences.mean().item(), differences.max().item()


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser("trl-rlad compare", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("url", help="address of the server")
    parser.add_argument("model", help="name or path of a copy of its model")
    parser.add_argument("--dtype", default="auto", help="dtype in which the copy is loaded")
    args = parser.parse_args(arguments)
    from ..teachers.server import TOLERANCE

    mean, largest = compare(args.url, args.model, args.dtype)
    print(f"Log-probabilities differ by {mean:.2g} nats on average, and by {largest:.2g} at most.")
    if mean > TOLERANCE:
        sys.exit(f"That is more than {TOLERANCE} on average: this is not the same model.")
