"""
Train a student with reinforcement learning while a teacher guides it.

Without arguments: knights and knaves in miniature, offline, with the two small models in `examples/mini/`. It takes a
few minutes on two CPU cores.

    accelerate launch examples/rlad_grpo.py

Any of reasoning-gym's tasks, with any student and teacher:

    accelerate launch examples/rlad_grpo.py \
        --task knights_knaves --task_kwargs '{"n_people": [3, 4, 5, 6]}' \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-8B \
        --max_completion_length 2048 --output_dir outputs/qwen3-0.6b-rlad

or the same in a file: `--config FILE.yaml`. Those of the paper's runs are in `examples/recipes/`, and those of the
methods, for any run, in `examples/methods/`: `--config examples/methods/grpo.yaml` is the GRPO baseline, and
`rlad.yaml` the paper's form of RLAD.
"""

from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import ProgressCallback, TrainerCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ..config import RLADConfig
from ..trainer import RLADTrainer
from .arguments import MINI, find_checkpoint, get_init_kwargs, parse_arguments, parse_task_kwargs, require
from .sampling import add_teacher_weight
from .tasks import load_task


@dataclass
class ScriptArguments:
    """
    Arguments of this script.

    Args:
        task (`str`, *optional*, defaults to `"mini"`):
            `"mini"`, knights and knaves in miniature; `"math"`, see [`~tasks.mathematics.load_math`]; or the name of a
            task of reasoning-gym, such as `"knights_knaves"`.
        task_kwargs (`str` or `dict`, *optional*):
            Settings of the task.
        train_size (`int`, *optional*, defaults to `10000`):
            Number of training puzzles.
        eval_size (`int`, *optional*, defaults to `384`):
            Number of held-out puzzles, on which the accuracy is measured before and after training.
        report_steps (`int`, *optional*):
            Measure the accuracy every so many steps of training too, into the log.
        teacher_model_name_or_path (`str`, *optional*):
            Name or path of the teacher. Not needed with `teacher_server_urls`, or with `alpha=1.0` and no
            `teacher_kl_coef` or `distillation_fraction`.
        teacher_samples (`int`, *optional*, defaults to `0`):
            Number of times that the teacher answers each training puzzle first, so that it has a say only where it is
            right, and as much as it is right: see [`~sampling.add_teacher_weight`]. The main process samples, into
            `teacher_weight.json` in the output folder, from which the next run takes it.
    """

    task: str = field(default="mini", metadata={"help": "'mini', 'math' or the name of a task of reasoning-gym."})
    task_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Settings of the task as JSON, such as '{\"n_people\": [3, 4, 5]}'."}
    )
    train_size: int = field(default=10_000, metadata={"help": "Number of training puzzles."})
    eval_size: int = field(default=384, metadata={"help": "Number of held-out puzzles."})
    report_steps: int | None = field(
        default=None, metadata={"help": "Measure the held-out accuracy every so many steps of training too."}
    )
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Name or path of the teacher."})
    teacher_samples: int = field(
        default=0,
        metadata={
            "help": "Number of times that the teacher answers each training puzzle first, to be believed only where "
            "it is right. 0 believes it everywhere."
        },
    )

    def __post_init__(self):
        self.task_kwargs = parse_task_kwargs(self.task_kwargs)
        require(self, 1, "train_size", "eval_size", "report_steps")
        require(self, 0, "teacher_samples")


class RewardBar(ProgressCallback):
    """The Trainer's progress bar, with the reward beside it instead of thirty metrics below. They are in the log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.2f}")

    def on_prediction_step(self, *args, **kwargs):
        pass


class AccuracyReport(TrainerCallback):
    """Measures the accuracy on held-out puzzles when training begins, and logs it every so many steps."""

    def __init__(self, trainer: RLADTrainer, eval_dataset: Dataset, steps: int | None):
        self.trainer, self.eval_dataset, self.steps = trainer, eval_dataset, steps

    def on_train_begin(self, args, state, control, **kwargs):
        # Not before: under DeepSpeed, a trainer that has evaluated can't train
        self.before = measure(self.trainer, self.eval_dataset)

    def on_step_end(self, args, state, control, **kwargs):
        if self.steps is not None and state.global_step % self.steps == 0:
            plan = copy(control)  # an evaluation takes what was to be done after this step for done
            scores = measure(self.trainer, self.eval_dataset)
            self.trainer.log({f"accuracy/{difficulty}": values for difficulty, values in scores.items()})
            self.trainer.model.train()  # or the log of this step would be taken for an evaluation's
            return plan


def measure(trainer: RLADTrainer, eval_dataset: Dataset) -> dict[str, dict[str, float]]:
    """Mean@k and Pass@k, of k = `num_generations_eval` samples as the paper draws them, on each difficulty."""
    # `generation_config` is what TRL hands to `generate`; vLLM keeps the temperature of training
    trainer.generation_config.update(temperature=0.6, top_p=0.95)
    scores, k = {}, trainer.num_generations_eval
    for difficulty in sorted(set(eval_dataset["difficulty"])):
        rows = [i for i, other in enumerate(eval_dataset["difficulty"]) if other == difficulty]
        prefix = f"eval_{difficulty}".rstrip("_")  # the model card has a row for each
        metrics = trainer.evaluate(eval_dataset.select(rows), metric_key_prefix=prefix)
        scores[difficulty] = {f"mean@{k}": metrics["eval_rewards/accuracy/mean"]}
        if k > 1:
            scores[difficulty][f"pass@{k}"] = metrics.get(f"eval_rewards/accuracy/pass@{k}", float("nan"))
    trainer.generation_config.update(temperature=trainer.temperature, top_p=trainer.top_p)
    return scores


def plot_rewards(steps: list[int], rewards: list[float], path: Path):
    """Draw the mean reward of the rollouts over the steps of training."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"No {path.name}: it is drawn by matplotlib, which isn't installed.")
        return
    plt.figure(figsize=(6, 3.5), layout="tight")
    plt.plot(steps, rewards)
    plt.xlabel("step")
    plt.ylabel("mean reward of the rollouts")
    plt.grid(alpha=0.3)
    plt.savefig(path, dpi=150)


def main():
    parser = TrlParser((ScriptArguments, RLADConfig, ModelConfig))
    script_args, args, model_args = parse_arguments(parser, base=MINI / "config.yaml")
    student, teacher = model_args.model_name_or_path, script_args.teacher_model_name_or_path
    if script_args.task == "mini":
        student, teacher = student or str(MINI / "student"), teacher or str(MINI / "teacher")
    if student is None:
        raise ValueError(f"`--task {script_args.task}` needs a student: name it with `--model_name_or_path`.")
    if args.reward_weights is not None:
        raise ValueError("`--reward_weights` has no meaning here: the reward is the task's own, and there is one.")
    if script_args.teacher_samples > 0 and args.needs_teacher and teacher is None:
        raise ValueError(
            "`--teacher_samples` samples the teacher here: name it with `--teacher_model_name_or_path` too."
        )
    checkpoint = find_checkpoint(args)
    args.model_init_kwargs = get_init_kwargs(args, model_args)
    sizes = script_args.train_size, script_args.eval_size
    # The teacher's tokenizer is the student's
    task = load_task(script_args.task, *sizes, args.seed, script_args.task_kwargs, tokenizer=teacher)

    train_dataset = task.train_dataset
    if script_args.teacher_samples > 0 and args.needs_teacher:
        with PartialState().main_process_first():
            train_dataset = add_teacher_weight(
                task,
                teacher,
                script_args.teacher_samples,
                Path(args.output_dir, "teacher_weight.json"),
                max_new_tokens=args.max_completion_length,
                seed=args.seed,
            )

    args.reward_weights = [1.0, 0.0]  # the accuracy is only logged
    trainer = RLADTrainer(
        model=student,
        teacher_model=teacher if args.needs_teacher else None,
        reward_funcs=[task.reward, task.accuracy],
        args=args,
        train_dataset=train_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(RewardBar)

    report = AccuracyReport(trainer, task.eval_dataset, script_args.report_steps)
    trainer.add_callback(report)
    trainer.train(resume_from_checkpoint=checkpoint)
    after = measure(trainer, task.eval_dataset)
    if trainer.is_world_process_zero():
        print(f"Accuracy on {len(task.eval_dataset)} held-out puzzles:")
        for difficulty, scores in report.before.items():
            for name, score in scores.items():
                print(f"  {difficulty or script_args.task:>8}  {name}  {score:6.1%} -> {after[difficulty][name]:6.1%}")
        logs = [log for log in trainer.state.log_history if "reward" in log]
        if logs:
            rewards = [log["reward"] for log in logs]
            print(f"Mean reward of the rollouts: {rewards[0]:.2f} -> {rewards[-1]:.2f}", flush=True)
    trainer.save_model()
    trainer.save_state()  # the log, as `trainer_state.json`
    if trainer.is_world_process_zero():
        if logs:
            plot_rewards([log["step"] for log in logs], rewards, Path(args.output_dir, "reward.png"))
        trainer.create_model_card()
        print(f"Saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
