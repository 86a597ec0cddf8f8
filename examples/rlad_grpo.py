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

or the same in a file: `--config FILE.yaml`. Those of the paper's runs are in `examples/recipes/`. `--alpha 1.0
--teacher_kl_coef 0` is the GRPO baseline, and `--teacher_kl_coef 0` the paper's form of RLAD.
"""

import json
import sys
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
from accelerate import PartialState
from datasets import Dataset
from math_task import load_math
from mini import knights_knaves
from reasoning_tasks import load_task
from sampling import add_teacher_weight
from transformers import ProgressCallback, TrainerCallback, TrainingArguments
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_rlad import RLADConfig, RLADTrainer
from trl_rlad.checkpoints import last_checkpoint


MINI = Path(__file__).parent / "mini"


@dataclass
class ScriptArguments:
    """
    Arguments of this script.

    Args:
        task (`str`, *optional*, defaults to `"mini"`):
            `"mini"`, knights and knaves in miniature; `"math"`, see [`~math_task.load_math`]; or the name of a task of
            reasoning-gym, such as `"knights_knaves"`.
        task_kwargs (`str` or `dict`, *optional*):
            Settings of the task.
        train_size (`int`, *optional*, defaults to `10000`):
            Number of training puzzles.
        eval_size (`int`, *optional*, defaults to `384`):
            Number of held-out puzzles, on which the accuracy is measured before and after training.
        report_steps (`int`, *optional*):
            Measure the accuracy every so many steps of training too, into the log.
        teacher_model_name_or_path (`str`, *optional*):
            Name or path of the teacher. Not needed with `teacher_server_urls`, or with `alpha=1.0` and no `teacher_kl_coef`
            or `distillation_fraction`.
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
            "help": "Number of times that the teacher answers each training puzzle first, to have a say only where it is "
            "right. 0 believes it everywhere."
        },
    )

    def __post_init__(self):
        self.task_kwargs = parse_task_kwargs(self.task_kwargs)
        require(self, 1, "train_size", "eval_size", "report_steps")
        require(self, 0, "teacher_samples")


def require(args, least: int, *names: str):
    """Raises a `ValueError` if one of these arguments is given and less than `least`."""
    for name in names:
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"`--{name}` must be at least {least}, but is {value}.")


def parse_task_kwargs(task_kwargs: dict | str | None) -> dict:
    """The settings of a task, from JSON or YAML."""
    try:
        parsed = json.loads(task_kwargs) if isinstance(task_kwargs, str) else task_kwargs or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"`--task_kwargs` must be JSON, but is {task_kwargs!r}: {error}.") from error
    if not isinstance(parsed, dict):
        raise ValueError(
            f"`--task_kwargs` must be settings with names, as in '{{\"n_people\": [3, 4]}}', not {parsed!r}."
        )
    return parsed


def find_checkpoint(args: TrainingArguments) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` names, by its path or as `true`, the last one in the output folder.

    Raises a `ValueError` if there is none, or if there are some and training was not to go on from them.
    """
    last = last_checkpoint(args.output_dir)
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        if last is not None:
            raise ValueError(
                f"`--output_dir {args.output_dir}` has the checkpoints of another run, which this one would replace. Go on from "
                "the last of them with `--resume_from_checkpoint true`, or choose another folder."
            )
        return None
    checkpoint = last if str(wanted).lower() == "true" else wanted
    if checkpoint is None or not Path(checkpoint).is_dir():
        where = args.output_dir if checkpoint is None else checkpoint
        raise ValueError(f"`--resume_from_checkpoint {wanted}`: there is no checkpoint in {where}.")
    return checkpoint


class RewardBar(ProgressCallback):
    """The Trainer's progress bar, with the reward beside it instead of thirty metrics below. They are in the log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.2f}")

    def on_prediction_step(self, *args, **kwargs):
        pass


def load_data(args: ScriptArguments, seed: int):
    """Returns training set, held-out set, reward function and the reward of a right answer."""
    if args.task == "mini":
        n_people = args.task_kwargs.get("n_people", [2, 3, 4])
        if (
            args.task_kwargs.keys() - {"n_people"}
            or not isinstance(n_people, list)
            or not {2, 3, 4} >= set(n_people) > set()
        ):
            raise ValueError(
                "`--task_kwargs` of the mini task are one, `n_people`, a list of some of 2, 3 and 4, and not "
                f"{json.dumps(args.task_kwargs)}."
            )
        sets = [
            knights_knaves.make_dataset(n_people, size, seed, held_out)
            for size, held_out in ((args.train_size, False), (args.eval_size, True))
        ]
        return *sets, knights_knaves.correctness_reward, 1.0
    if args.task == "math":
        tokenizer = args.teacher_model_name_or_path  # the student's is the same
        return *load_math(args.train_size, args.eval_size, seed, tokenizer, **args.task_kwargs), 1.0
    best = 3.0 if args.task == "knights_knaves" else 1.0
    return *load_task(args.task, args.train_size, args.eval_size, seed, args.task_kwargs), best


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
    plt.figure(figsize=(6, 3.5), layout="tight")
    plt.plot(steps, rewards)
    plt.xlabel("step")
    plt.ylabel("mean reward of the rollouts")
    plt.grid(alpha=0.3)
    plt.savefig(path, dpi=150)


def main():
    parser = TrlParser((ScriptArguments, RLADConfig, ModelConfig))
    arguments = sys.argv[1:]
    named = {argument.split("=")[0].replace("-", "_") for argument in arguments}
    if not named & {"__config", "__task", "__model_name_or_path", "__help", "_h"}:
        arguments = ["--config", str(MINI / "config.yaml"), *arguments]
    script_args, args, model_args = parser.parse_args_and_config(arguments)
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
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset, reward, best = load_data(script_args, args.seed)

    if script_args.teacher_samples > 0 and args.needs_teacher:
        with PartialState().main_process_first():
            train_dataset = add_teacher_weight(
                train_dataset,
                teacher,
                reward,
                best,
                script_args.teacher_samples,
                Path(args.output_dir, "teacher_weight.json"),
                max_new_tokens=args.max_completion_length,
                seed=args.seed,
            )

    def accuracy(**columns):
        return [None if value is None else float(value == best) for value in reward(**columns)]

    args.reward_weights = [1.0, 0.0]  # the accuracy is only logged
    trainer = RLADTrainer(
        model=student,
        teacher_model=teacher if args.needs_teacher else None,
        reward_funcs=[reward, accuracy],
        args=args,
        train_dataset=train_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(RewardBar)

    report = AccuracyReport(trainer, eval_dataset, script_args.report_steps)
    trainer.add_callback(report)
    trainer.train(resume_from_checkpoint=checkpoint)
    after = measure(trainer, eval_dataset)
    if trainer.is_world_process_zero():
        print(f"Accuracy on {len(eval_dataset)} held-out puzzles:")
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
