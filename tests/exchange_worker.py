"""
Run by each process of `test_distributed.py`: score uneven batches with all processes and alone, each row in a pass of
its own, and save whether every bit is the same.

    torchrun --nproc-per-node 4 exchange_worker.py OPTIONS_AS_JSON
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import tiny
import torch
from accelerate import Accelerator
from distributed_worker import count_scored_tokens
from test_teacher_scorer import make_batch

from trl_rlad import TeacherScorer
from trl_rlad.scoring import RowScorer, row_scorer
from trl_rlad.scoring.rows import unpad
from trl_rlad.teachers import LocalTeacher


PARTS = "prompt", "completion"
NAMES = {"top_k": 4, "keeps_names": True}
CASES = {
    "one teacher": {},
    "named tokens": NAMES,
    "slices": NAMES | {"slice": 60},
    "two teachers": NAMES | {"routed": True},
    "scored early on every second process": NAMES | {"early": True},
}


def draw(rank):
    """Groups of four completions of one prompt: fifteen on rank 0, and two of which none is wanted on rank 2."""
    groups = [15, 1, 2, 3][rank]
    batch = make_batch(seed=rank, rows=4 * groups, prompt=12)
    for name in ("prompt_ids", "prompt_mask"):
        batch[name] = batch[name][::4].repeat_interleave(4, dim=0)
    return batch, batch["completion_mask"] * (rank != 2)


def score(accelerator, teachers, rank, top_k=0, keeps_names=False, routed=False, early=False):
    batch, mask = draw(rank)
    teachers = teachers if routed else {"": teachers["a"]}
    scorer = TeacherScorer({name: RowScorer(teacher, accelerator, 1) for name, teacher in teachers.items()}, 60.0)
    # Of the second teacher there is no row on rank 1
    teacher_ids = ["ab"[row % 2 * (rank != 1)] for row in range(len(mask))] if routed else None
    if early and rank % 2 == 0:
        prompts, completions = (unpad(batch[f"{part}_ids"], batch[f"{part}_mask"]) for part in PARTS)
        wanted = [row[: len(ids)] for row, ids in zip(mask, completions, strict=True)]
        scorer.begin(*([row.tolist() for row in part] for part in (prompts, completions, wanted)), top_k)
        with scorer.score_early():
            pass
    keeps = torch.arange(len(mask)) % 3 > 0 if keeps_names else None
    return scorer.score(batch, mask, top_k, teacher_ids=teacher_ids, keeps_names=keeps)


def main(output_dir, teacher, other):
    torch.set_num_threads(1)
    args, accelerator = tiny.make_config(output_dir), Accelerator(cpu=True)
    rank, slice_size, result = accelerator.process_index, row_scorer.SLICE, {}
    alone = SimpleNamespace(num_processes=1, device=accelerator.device, gather=lambda tensor: tensor)
    teachers = {name: LocalTeacher(path, args, accelerator) for name, path in (("a", teacher), ("b", other))}
    assert all(each.shares_prompts for each in teachers.values())
    tokens = count_scored_tokens(teachers["a"])
    for name, case in CASES.items():
        row_scorer.SLICE = case.get("slice", slice_size)
        options = {key: value for key, value in case.items() if key != "slice"}
        tokens.clear()
        scores = score(accelerator, teachers, rank, **options)
        count = sum(tokens)
        expected = score(alone, teachers, rank, **options)
        assert scores.keys() == expected.keys()
        equal = [torch.equal(*pair) for key in scores for pair in zip(scores[key], expected[key], strict=True)]
        result[name] = {"equal": all(equal), "rows": len(equal), "tokens": count}
    Path(output_dir, f"result_{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    tiny.leave()
