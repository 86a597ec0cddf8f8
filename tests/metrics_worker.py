"""
Run by each process of `test_distributed.py`: two short runs, and what came of them: what this process was shown, and
its log.

    torchrun --nproc-per-node 2 metrics_worker.py OPTIONS_AS_JSON
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
import twin
from tenacity import wait_none

from trl_rlad import RLADTrainer
from trl_rlad.teachers import client


def main(output_dir, student, teachers, server, settings):
    torch.set_num_threads(1)
    client.WAIT, result = wait_none(), {}
    names = list(teachers)
    by_name = tiny.make_dataset().add_column("teacher_id", [names[i % len(names)] for i in range(32)])
    served = {"teacher_server_urls": server, "on_teacher_failure": "grpo", "shuffle_dataset": False, "max_steps": 1}
    for name, dataset, teacher, kwargs in (
        ("metrics", by_name, teachers, settings),
        ("failures", tiny.make_dataset(), None, served),
    ):
        args = tiny.make_config(Path(output_dir, name), per_device_train_batch_size=8, **kwargs)
        reward = twin.Watcher()
        trainer = RLADTrainer(student, reward, args, dataset, teacher_model=teacher)
        trainer.train()
        result[name] = {"logs": [log for log in trainer.state.log_history if "loss" in log], "rows": reward.calls}
    Path(output_dir, f"result_{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    tiny.leave()
