"""
Run by each process of `test_distributed.py`: score a given batch, train three steps, and save what came out.

    accelerate launch --config_file CONFIG distributed_worker.py OPTIONS_AS_JSON
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import tiny
import torch
import twin
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig
from test_teacher_scorer import make_batch
from transformers import TrainerCallback

from trl_rlad import RLADTrainer
from trl_rlad.teachers import FSDPTeacher, OwnTeacher


def make_ragged_batch(rank):
    """Rank 0 has thirty long rows, rank 1 three short ones."""
    return make_batch(seed=1, rows=30) if rank == 0 else make_batch(seed=2, rows=3, prompt=2, completion=2)


def count_scored_tokens(teacher):
    """Count the tokens of the rows that this process has its teacher score."""
    score, tokens = teacher.score, []

    def counted(prompts, completions, *args):
        tokens.extend(len(row) for row in (*prompts, *completions))
        return score(prompts, completions, *args)

    teacher.score = counted
    return tokens


class KillAfter(TrainerCallback):
    """Die between two checkpoints, without any chance to say goodbye."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def fail_as(rank, *_):
    raise RuntimeError(f"the teacher of rank {rank} fails")


def watch_parameters(model):
    """The largest number of the model's parameters that this process ever held at once while running a layer."""
    most = [0]

    def look(*_):
        most[0] = max(most[0], sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters()))

    for module in model.modules():
        module.register_forward_hook(look)
    return most


def shard_by_fsdp2(path, trainer, mixed_precision):
    """
    The teacher as under an FSDP launch. On CPU, accelerate 1.15 runs such a launch as plain data parallelism, without
    a word, so its state is given the plugin by hand; the sharding itself is real.
    """
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=True
    )
    if mixed_precision == "bf16":
        trainer.accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
    teacher = FSDPTeacher(path, trainer.args, trainer.accelerator)
    if trainer.teacher_scorer.teachers[""].is_frozen:
        return teacher
    own = OwnTeacher(lambda: teacher.model, teacher.tokenizer, trainer.accelerator)
    own.is_sharded = True
    return own


def train_and_keep_batches(trainer, output_dir):
    kept = tiny.watch_batches(trainer)
    trainer.train()
    torch.save(kept, Path(output_dir, f"batches_{trainer.accelerator.process_index}.pt"))


def main(
    student,
    output_dir,
    teacher=None,
    lora=False,  # train an adapter
    fsdp=None,  # shard the teacher by FSDP2, in this mixed precision
    kill_after=None,  # die after this step
    resume=None,  # from the last checkpoint
    hang=None,  # this rank never comes back from its teacher
    fail=None,  # in this rank the teacher raises
    absent=None,  # this rank never comes to the scoring
    lost=None,  # this rank doesn't find the teacher
    of_rank_1=None,  # its own settings
    reward=None,  # its name in `tiny`, of one that isn't watched
    teachers=None,  # paths of several by name, for rows in turn
    **kwargs,
):
    torch.set_num_threads(1)
    if lost is not None and lost == int(os.environ["RANK"]):
        teacher = f"/no/such/{Path(teacher).name}"  # another name would be noticed before
    if of_rank_1 and os.environ["RANK"] == "1":
        kwargs |= of_rank_1
    config = tiny.make_config(output_dir, **{"max_steps": 3, "teacher_tokens_per_batch": 50, **kwargs})
    dataset = tiny.make_dataset()
    if teachers:
        names = [*teachers, *config.teacher_servers]
        names = [names[i % len(names)] for i in range(len(dataset))]
        prompts = ["w9 w8 w7" if i % 4 == 0 else None for i in range(len(dataset))]
        dataset = dataset.add_column("teacher_id", names).add_column("teacher_prompt", prompts)
    is_own = lora or teacher == "self"
    if teacher == "self":
        dataset = dataset.add_column("teacher_prompt", [f"w1 w2 {row['prompt']}" for row in dataset])
    reward = getattr(tiny, reward) if reward else twin.Watcher()
    trainer = RLADTrainer(
        student,
        reward,
        config,
        dataset,
        teacher_model=teachers or teacher,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=2) if lora else None,
        callbacks=[KillAfter(kill_after)] if kill_after else None,
    )
    if fsdp:
        trainer.teacher_scorer.scorers[""].teacher = shard_by_fsdp2(
            student if teacher == "self" else teacher, trainer, fsdp
        )
    if teachers:  # in the middle of training, whose batches say what each row was
        return train_and_keep_batches(trainer, output_dir)
    rank, teacher = trainer.accelerator.process_index, trainer.teacher_scorer.teachers[""]
    result = {"teacher": type(teacher).__name__, "folder": output_dir}
    if hang == rank:
        teacher.score = lambda *_: signal.pause()
    if fail == rank:
        teacher.score = partial(fail_as, rank)
    if absent == rank:
        signal.pause()
    if fsdp or teacher.is_sharded and not is_own:
        most = watch_parameters(teacher.model)
    if fsdp or not is_own:  # under ZeRO and FSDP the student is only prepared by training
        batch, tokens = make_ragged_batch(rank), count_scored_tokens(teacher)
        prompts = None
        if trainer.teacher_scorer.by_text(None, 1)[0]:
            parts = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
            prompts = [trainer.tokenizer.decode(ids[mask]) for ids, mask in parts]
        scores = trainer.teacher_scorer.score(batch, batch["completion_mask"], config.objective.top_k, prompts)
        result |= {"scores": scores["teacher_per_token_logps"].tolist(), "tokens": sum(tokens)}
        if "teacher_top_ids" in scores:
            torch.save(scores, Path(output_dir, f"scores_{rank}.pt"))
    trainer.train(resume_from_checkpoint=resume)
    result["logs"] = [log for log in trainer.state.log_history if "loss" in log]
    result["losses"] = {log["step"]: log["loss"] for log in result["logs"]}
    result["rows"] = getattr(reward, "calls", None)
    result["files"] = sorted(path.name for path in Path(output_dir).rglob("*") if path.is_file())
    if fsdp or teacher.is_sharded and not is_own:
        result["most_parameters"] = most[0]
    Path(output_dir, f"result_{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    tiny.leave()
