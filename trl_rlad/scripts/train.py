r"""
Train a student with reinforcement learning while a teacher guides it: TRL's `grpo` script, with a teacher.

Without arguments: chains of operators, offline, with the two small models that come along: a student that has half
learned the task, and its teacher. It takes a minute on two CPU cores.

    trl-rlad train

Any dataset, with TRL's arguments and a teacher:

    trl-rlad train --dataset_name trl-lib/DeepMath-103K --reward_funcs accuracy_reward \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-8B

Any of reasoning-gym's tasks, on all GPUs under ZeRO-2:

    trl-rlad train --accelerate_config zero2 --task knights_knaves --task_kwargs '{"n_people": [3, 4, 5, 6]}' \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-8B
"""

from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import ProgressCallback, TrainerCallback
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, get_peft_config, get_quantization_config
from trl.scripts.grpo import GRPOScriptArguments

from .._trl.names import get_config_model_id
from ..config import RLADConfig, with_help
from ..trainer import RLADTrainer
from .arguments import (
    METHOD_NAMES,
    MINI,
    MINIATURES,
    Parser,
    Several,
    find_checkpoint,
    get_init_kwargs,
    how_to_go_on,
    own_fields,
    parse_arguments,
    parse_task_kwargs,
    parse_teachers,
    read_method,
    require,
    run_command,
)
from .sampling import add_teacher_weight
from .source import Source, load_source


@with_help
@dataclass
class ScriptArguments(GRPOScriptArguments):
    """
    Arguments of this script, beside those of TRL's: a dataset and reward functions.

    Args:
        task (`str`, *optional*):
            Task, in the place of a dataset and reward functions: `"chains"`, chains of operators, and `"mini"`,
            knights and knaves in miniature, both with models of their own; `"math"`, see
            [`~tasks.mathematics.load_math`]; or the name of a task of reasoning-gym, such as `"knights_knaves"`.
        task_kwargs (`str` or `dict`, *optional*):
            Settings of the task, as JSON such as '{"n_people": [3, 4, 5]}'.
        train_size (`int`, *optional*, defaults to `10000`):
            Number of training puzzles of the task.
        eval_size (`int`, *optional*, defaults to `384`):
            Number of held-out puzzles of the task, on which the accuracy is measured before and after training.
        report_steps (`int`, *optional*):
            Measure the accuracy every so many steps of training too, into the log.
        method (`str`, *optional*):
            Settings of a method, which other flags override: the name of a file in `trl_rlad/scripts/methods/`, such
            as `"rlad"`, `"rlad_named"`, `"grpo"`, `"kdrl"`, `"opd"` (on-policy distillation) or `"distil_then_grpo"`.
        teacher_model_name_or_path (`list[str]`, *optional*):
            Name or path of the teacher, or "self" or "base", see [`RLADTrainer`]. Of several, given again and again or
            as a JSON object by name, each scores the rows that have its name in the dataset's column `teacher_id`. Not
            needed with `teacher_server_urls`, or with `alpha=1.0` and no `teacher_kl_coef` or `distillation_fraction`.
        teacher_samples (`int`, *optional*, defaults to `0`):
            Number of times that the teacher answers each training prompt first, so that it has a say only where it is
            right, and as much as it is right: see [`~sampling.add_teacher_weight`]. The main process samples, into
            `teacher_weight.json` in the output folder, from which the next run takes it.
    """

    task: str | None = None
    task_kwargs: dict | str | None = None
    train_size: int = 10_000
    eval_size: int = 384
    report_steps: int | None = None
    method: str | None = None
    teacher_model_name_or_path: list[str] | None = field(default=None, metadata={"action": Several})
    teacher_samples: int = 0

    def __post_init__(self):
        self.task_kwargs = parse_task_kwargs(self.task_kwargs)
        self.teacher: Any = parse_teachers(self.teacher_model_name_or_path)
        require(self, 1, "train_size", "eval_size", "report_steps")
        require(self, 0, "teacher_samples")


OFTEN = (
    "model_name_or_path output_dir max_steps learning_rate per_device_train_batch_size gradient_accumulation_steps "
    "num_generations max_completion_length use_vllm vllm_mode use_peft load_in_4bit bf16 logging_steps save_steps "
    "eval_strategy resume_from_checkpoint push_to_hub report_to"
).split()
OF_DATASETS = (
    "dataset_name dataset_config dataset_train_split dataset_test_split reward_funcs reward_model_name_or_path".split()
)
LAUNCH = """
Where several GPUs are, each has a process. Flags of `accelerate launch` set that otherwise, such as `--num_processes`,
and `--accelerate_config NAME` a whole configuration: cpu, multi_gpu, zero1, zero2, zero3, zero3_offload, fsdp2, one of
TRL's, or a file.
"""


def make_parser() -> Parser:
    own = own_fields(ScriptArguments, GRPOScriptArguments)
    groups = {
        "what is trained on": OF_DATASETS + own[: own.index("method")],
        "the teacher": own[own.index("method") :] + own_fields(RLADConfig, GRPOConfig),
        "TRL's, often set": OFTEN,
    }
    types = (ScriptArguments, RLADConfig, ModelConfig, DatasetMixtureConfig)
    return Parser("trl-rlad train", (__doc__ or "") + LAUNCH, types, groups)


class ProgressLine(ProgressCallback):
    """The Trainer's progress bar, with what matters beside it instead of thirty metrics below. They are in the log."""

    SHOWN = {"reward": "reward", "log_ratio": "teacher/log_ratio", "kl": "teacher/kl", "seconds": "step_time"}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "reward" in logs:
            values = {short: logs.get(name) for short, name in self.SHOWN.items()}
            self.training_bar.set_postfix({k: f"{value:.2f}" for k, value in values.items() if value is not None})

    def on_prediction_step(self, *args, **kwargs):
        pass


class AccuracyReport(TrainerCallback):
    """Measures the accuracy on what is held out when training begins, and logs it every so many steps."""

    def __init__(self, trainer: RLADTrainer, source: Source, steps: int | None):
        self.trainer, self.source, self.steps = trainer, source, steps

    def on_train_begin(self, args, state, control, **kwargs):
        # Not before: under DeepSpeed, a trainer that has evaluated can't train
        self.before = measure(self.trainer, self.source)

    def on_step_end(self, args, state, control, **kwargs):
        if self.steps is not None and state.global_step % self.steps == 0:
            plan = copy(control)  # an evaluation takes what was to be done after this step for done
            scores = measure(self.trainer, self.source)
            self.trainer.log({f"accuracy/{difficulty}".rstrip("/"): values for difficulty, values in scores.items()})
            self.trainer.model.train()  # or the log of this step would be taken for an evaluation's
            return plan


def measure(trainer: RLADTrainer, source: Source) -> dict[str, dict[str, float]]:
    """
    Mean@k and, where k > 1, Pass@k, of k = `num_generations_eval` samples: of a task's accuracy on each difficulty, as
    the paper draws them, and of a dataset's reward functions.
    """
    dataset, is_task, k = source.eval_dataset, source.measured is not None, int(trainer.num_generations_eval or 1)
    if dataset is None:
        return {}
    difficulties = dataset["difficulty"] if is_task else []
    if is_task:  # `generation_config` is what TRL hands to `generate`; vLLM keeps the temperature of training
        trainer.generation_config.update(temperature=0.6, top_p=0.95)
    scores: dict[str, dict[str, float]] = {}
    for difficulty in sorted(set(difficulties)) or [""]:
        rows = [i for i, other in enumerate(difficulties) if other == difficulty]
        prefix = f"eval_{difficulty}".rstrip("_")  # the model card has a row for each
        metrics = trainer.evaluate(dataset.select(rows) if is_task else dataset, metric_key_prefix=prefix)
        scores[difficulty] = {}
        for name in source.measured or trainer.reward_func_names:
            label = "" if is_task else f"{name}  "
            scores[difficulty][f"{label}mean@{k}"] = metrics.get(f"eval_rewards/{name}/mean", float("nan"))
            if k > 1:
                scores[difficulty][f"{label}pass@{k}"] = metrics.get(f"eval_rewards/{name}/pass@{k}", float("nan"))
    trainer.generation_config.update(temperature=trainer.temperature, top_p=trainer.top_p)
    return scores


def plot_rewards(steps: list[float], rewards: list[float], path: Path):
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


def name_method(args: RLADConfig) -> str:
    """The method by its name in `methods/`, if it is one of them, and its settings."""
    now = vars(args.objective)
    defaults = {name: RLADConfig.__dataclass_fields__[name].default for name in now}
    names = [name for name in METHOD_NAMES if defaults | read_method(name) == now]
    changes = [f"{name}={value}" for name, value in now.items() if value != defaults[name] or name == "alpha"]
    return f"{', '.join(names) or 'settings of your own'} ({', '.join(changes)})"


def describe(trainer: RLADTrainer, source: Source) -> str:
    """What was found, in five lines."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    kind = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP" if trainer.is_fsdp_enabled else ""
    count = trainer.accelerator.num_processes
    gpu = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device)
    device = [gpu, f"{count} process{'' if count == 1 else 'es'}", kind, "bf16" if args.bf16 else ""]
    teachers = []
    for key, scorer in (trainer.teacher_scorer.scorers if trainer.teacher_scorer else {}).items():
        teacher, urls = scorer.teacher, args.teacher_servers.get(key)
        place = f"at {', '.join(urls)}" if urls else "whole on each process"
        place = "sharded over all processes" if teacher.is_sharded else place
        place += ", on the CPU while it doesn't score" if args.teacher_offload == "cpu" else ""
        teachers.append(f"{key and f'{key}: '}{teacher.name}, {place}, {scorer.tokens_per_batch:,} tokens at once")
    prompts = f"{len(source.train_dataset):,} prompts" if hasattr(source.train_dataset, "__len__") else "a stream"
    rewards = ", ".join(trainer.reward_func_names)
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]  # sharded or not
    name = get_config_model_id(model.config)
    trained = f"trains {sum(n for n, is_trained in sizes if is_trained):,} of {sum(n for n, _ in sizes):,} parameters"
    lines = {
        "device": ", ".join(filter(None, device)),
        "student": f"{Path(name).name if Path(name).is_dir() else name}, {trained}",
        "teacher": "; ".join(teachers) or "none",
        "method": name_method(args),
        "data": f"{prompts} with {trainer.num_generations} completions each; rewards: {rewards}",
    }
    return "\n".join(f"{name:<8} {text}" for name, text in lines.items())


def prepare(arguments: list[str] | None = None, is_launched: bool = False) -> tuple:
    """
    From the command line to a trainer, with all checks.

    Args:
        arguments (`list[str]`, *optional*):
            The command line. `None` takes that of the process.
        is_launched (`bool`, *optional*, defaults to `False`):
            Whether settings of the launcher have been read from the file of `--config` already.

    Returns:
        `tuple`: the arguments of [`run`].
    """
    script_args, args, model_args, dataset_args = parse_arguments(
        make_parser(), MINI / "config.yaml", arguments, ignore_unknown=is_launched
    )
    student, teacher = model_args.model_name_or_path, script_args.teacher
    has_dataset = bool(script_args.dataset_name or dataset_args.datasets)
    script_args.task = script_args.task or (None if has_dataset else "chains")
    if script_args.task in MINIATURES:
        of_student, of_teacher, _ = MINIATURES[script_args.task]
        student, teacher = student or str(of_student), teacher or str(of_teacher)
    check(script_args, args, student, teacher, has_dataset)
    checkpoint = find_checkpoint(args)
    args.model_init_kwargs = get_init_kwargs(args, model_args)
    source = load_source(script_args, args, dataset_args, tokenizer=student)
    train_dataset = source.train_dataset
    if script_args.teacher_samples > 0 and args.needs_teacher:
        if source.task is None:
            raise ValueError(
                "`--teacher_samples` judges the teacher's answers by calling the reward functions, which may be "
                "neither models nor coroutines, on a dataset that isn't a stream."
            )
        with PartialState().main_process_first():
            train_dataset = add_teacher_weight(
                source.task,
                teacher,
                script_args.teacher_samples,
                Path(args.output_dir, "teacher_weight.json"),
                max_new_tokens=args.max_completion_length,
                seed=args.seed,
            )
    if script_args.task is not None:
        args.reward_weights = [1.0, 0.0]  # the accuracy is only logged
    trainer = RLADTrainer(
        model=student,
        teacher_model=teacher if args.needs_teacher else None,
        reward_funcs=source.reward_funcs,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=source.eval_dataset if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLine)
    return trainer, source, script_args, checkpoint


def check(script_args: ScriptArguments, args: RLADConfig, student: str | None, teacher, has_dataset: bool):
    """Raises a `ValueError` if the arguments don't fit together."""
    task = script_args.task
    if student is None:
        what = f"`--task {task}`" if task else "A dataset"
        raise ValueError(f"{what} needs a student: name it with `--model_name_or_path`.")
    if task and (has_dataset or script_args.reward_funcs or script_args.reward_model_name_or_path):
        raise ValueError(
            f"`--task {task}` has prompts and a reward of its own: give it, or a dataset with `--reward_funcs`, not "
            "both."
        )
    if task and args.reward_weights is not None:
        raise ValueError("`--reward_weights` has no meaning here: the reward is the task's own, and there is one.")
    if script_args.teacher_samples > 0 and args.needs_teacher:
        if teacher is None:
            raise ValueError(
                "`--teacher_samples` samples the teacher here: name it with `--teacher_model_name_or_path` too."
            )
        if teacher in ("base", "self"):
            raise ValueError(f"`--teacher_samples` samples another model than the student, and not {teacher!r}.")
        if isinstance(teacher, dict):
            raise ValueError("`--teacher_samples` samples one teacher, and there are several.")


def run(trainer: RLADTrainer, source: Source, script_args: ScriptArguments, checkpoint: str | None):
    """Train, measure before and after, and save what came out."""
    is_main, args, folder = trainer.is_world_process_zero(), trainer.args, str(trainer.args.output_dir)
    if is_main:
        print(describe(trainer, source), flush=True)
    report = AccuracyReport(trainer, source, script_args.report_steps)
    trainer.add_callback(report)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        if is_main:
            print(f"\n{how_to_go_on(folder)}", flush=True)
        raise SystemExit(130) from None
    try:
        after = measure(trainer, source)
    except KeyboardInterrupt:
        after = {}
    logs = [log for log in trainer.state.log_history if "reward" in log]
    rewards = [log["reward"] for log in logs]
    if is_main:
        if after:
            print(f"Accuracy on {len(source.eval_dataset)} held-out puzzles:" if script_args.task else "Held out:")
        for difficulty in after:
            for name, score in report.before[difficulty].items():
                form = "6.1%" if script_args.task else "6.3f"
                change = f"{score:{form}} -> {after[difficulty][name]:{form}}"
                print(f"  {difficulty or script_args.task or '':>8}  {name}  {change}")
        if logs:
            print(f"Mean reward of the rollouts: {rewards[0]:.2f} -> {rewards[-1]:.2f}", flush=True)
    trainer.save_model()
    trainer.save_state()  # the log, as `trainer_state.json`
    if is_main:
        if logs:
            plot_rewards([log["step"] for log in logs], rewards, Path(folder, "reward.png"))
        trainer.create_model_card(dataset_name=script_args.dataset_name)
        print(f"Saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        if is_main:
            print(f"Pushed to {trainer.hub_model_id}")
    # A process that fails at its end takes the others with it, and the first may still be saving
    trainer.accelerator.wait_for_everyone()
    if hasattr(trainer, "end"):  # since transformers 5.18
        trainer.end()


def main(arguments: list[str] | None = None):
    """Train in this process."""
    run(*prepare(arguments))


if __name__ == "__main__":  # by the launcher
    run_command(lambda arguments: prepare(arguments, is_launched=True), run, None)
