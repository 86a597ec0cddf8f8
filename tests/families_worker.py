"""
Run by each process of `test_distributed.py`: the first scores three rows of each family, the other one, and both save
the largest differences from plain forward passes.

    accelerate launch --config_file CONFIG families_worker.py OPTIONS_AS_JSON
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import tiny
import torch
from accelerate import Accelerator


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import families

from trl_rlad import RLADConfig, TeacherScorer
from trl_rlad.scoring import RowScorer
from trl_rlad.teachers import create_teacher, loading, local


def main(output_dir):
    torch.set_num_threads(1)
    local.load_processing_class = lambda *_: SimpleNamespace(eos_token_id=None)  # the rows are of token ids
    args = RLADConfig(output_dir, use_cpu=True, bf16=False, temperature=families.TEMPERATURE)
    assert args.device.type == "cpu"  # which sets up the processes
    accelerator = Accelerator(cpu=True)
    differences = {}
    for name in families.FAMILIES:
        texts, images = families.make_text_rows(), []
        if "vision_config" in families.FAMILIES[name][2]:
            images = families.make_image_rows(name)
        with loading.active_deepspeed_config(None):
            model = families.make_model(name)
            expected = {id(row): families.plain_scores(model, row) for row in texts + images}
            if accelerator.is_main_process:
                model.save_pretrained(Path(output_dir, name))
        accelerator.wait_for_everyone()
        teacher = create_teacher(str(Path(output_dir, name)), args, accelerator, None, None)
        assert teacher.reads_images == bool(images)
        for kind, rows in (("images", images), ("text", texts)):
            if rows:
                rows = rows[:3] if accelerator.process_index == 0 else rows[3:]
                batch = families.make_batch(rows)
                scorer = TeacherScorer({"": RowScorer(teacher, accelerator, 30)})
                scores = scorer.score(batch, batch["completion_mask"])["teacher_per_token_logps"]
                differences[f"{name}, {kind}"] = max(
                    (score[: len(expected[id(row)])] - expected[id(row)]).abs().max().item()
                    for score, row in zip(scores, rows, strict=True)
                )
        getattr(teacher.model, "destroy", lambda: None)()
    Path(output_dir, f"result_{accelerator.process_index}.json").write_text(json.dumps(differences))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    tiny.leave()
