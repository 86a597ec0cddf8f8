"""Two steps of training with what a wheel brings along, on the models and puzzles of the folder that is named."""

import math
import sys
from pathlib import Path

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.scripts.tasks.mini import correctness_reward, make_dataset


mini = Path(sys.argv[1])


assert mini.parents[1] not in Path(sys.modules["trl_rlad"].__file__).parents, "this is the source, not the wheel"
trainer = RLADTrainer(
    str(mini / "student"),
    teacher_model=str(mini / "teacher"),
    reward_funcs=correctness_reward,
    args=RLADConfig(
        "out",
        teacher_kl_coef=1.0,  # so that there is something to learn where all completions are right
        teacher_kl="forward",
        max_steps=2,
        per_device_train_batch_size=32,
        max_completion_length=33,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    ),
    train_dataset=make_dataset([2, 3], 64, 0, False),
)
trainer.train()
logs = [log for log in trainer.state.log_history if "loss" in log]
assert len(logs) == 2 and all(0 < log["grad_norm"] < math.inf and log["teacher/kl"] > 0 for log in logs), logs
print("Two steps:", [f"teacher/kl {log['teacher/kl']:.3f}" for log in logs])
