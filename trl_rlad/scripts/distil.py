r"""
The offline baseline: a teacher answers the training puzzles, and the student imitates its right answers.

Without arguments: chains of operators, offline, with the two small models that come along.

    trl-rlad distil

Any of reasoning-gym's tasks, with any student and teacher, in one process:

    trl-rlad distil --task knights_knaves --task_kwargs '{"n_people": [3, 4, 5, 6]}' \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-8B --backend vllm \
        --max_completion_length 2048 --output_dir outputs/qwen3-0.6b-offline

What the teacher wrote is counted in `teacher_samples.json`, to compare with what other methods have it read, and kept
beside it, so that another run with the same settings doesn't ask again. The share of right answers to each puzzle is
in `teacher_weight.json`: in the output folder of `trl-rlad train`, it spares `--teacher_samples` the sampling.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from ..config import with_help
from ..trainer import check_writable
from .arguments import (
    MINI,
    MINIATURES,
    Parser,
    find_checkpoint,
    get_init_kwargs,
    how_to_go_on,
    own_fields,
    parse_arguments,
    parse_task_kwargs,
    require,
)
from .sampling import encode_prompts, evaluate, grade, sample, store_teacher_weight
from .tasks import Task, load_task


@with_help
@dataclass
class ScriptArguments:
    """
    Arguments of this script.

    Args:
        task (`str`, *optional*, defaults to `"chains"`):
            Task: `"chains"`, `"mini"`, `"math"`, or the name of one of reasoning-gym, as in `trl-rlad train`.
        task_kwargs (`str` or `dict`, *optional*):
            Settings of the task, as JSON.
        eval_size (`int`, *optional*, defaults to `384`):
            Number of held-out puzzles, on which the accuracy is measured before and after training.
        teacher_model_name_or_path (`str`, *optional*):
            Name or path of the teacher. `None` takes that of a task in miniature.
        num_prompts (`int`, *optional*, defaults to `1200`):
            Number of training puzzles that the teacher answers.
        samples_per_prompt (`int`, *optional*, defaults to `8`):
            Number of times that it answers each.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the teacher's answers.
        max_completion_length (`int`, *optional*, defaults to `2048`):
            Answers that don't end within this number of tokens are wrong.
        backend (`str`, *optional*, defaults to `"transformers"`):
            What samples, `"transformers"` or `"vllm"`.
        batch_size (`int`, *optional*, defaults to `128`):
            Number of answers to sample at once. vLLM finds its own.
    """

    task: str = "chains"
    task_kwargs: dict | str | None = None
    eval_size: int = 384
    teacher_model_name_or_path: str | None = None
    num_prompts: int = 1200
    samples_per_prompt: int = 8
    temperature: float = 1.0
    max_completion_length: int = 2048
    backend: str = "transformers"
    batch_size: int = 128

    def __post_init__(self):
        require(self, 1, "eval_size", "num_prompts", "samples_per_prompt", "max_completion_length", "batch_size")
        self.task_kwargs = parse_task_kwargs(self.task_kwargs)
        if self.task in MINIATURES:
            # Relative, as the path goes into `teacher_samples.json`
            teacher = os.path.relpath(MINIATURES[self.task][1])
            self.teacher_model_name_or_path = self.teacher_model_name_or_path or teacher


def collect(
    teacher: str,
    task: Task,
    samples_per_prompt: int = 8,
    max_new_tokens: int = 2048,
    path: Path | None = None,
    **sampling,
) -> tuple[Dataset, dict[str, int]]:
    """
    Samples a teacher's answers to the training puzzles of a task and keeps the right ones.

    Args:
        teacher (`str`):
            Name or path of the teacher.
        task ([`~tasks.Task`]):
            The task.
        samples_per_prompt (`int`, *optional*, defaults to `8`):
            Number of answers to each prompt. The same one may come up, and be kept, more than once.
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Answers that don't end within this number of tokens are wrong: nobody should learn to stop where they do.
        path (`Path`, *optional*):
            JSON file for the share of right answers to each prompt, see [`~sampling.store_teacher_weight`].
        sampling:
            Further arguments of [`~sampling.sample`].

    Returns:
        `tuple[Dataset, dict[str, int]]`:
            The right answers, with the columns `prompt` and `completion` (text), and the number of `prompts`, of
            `solved_prompts` (with a right answer), of `samples`, of `kept_samples`, and of tokens in both, `tokens`
            and `kept_tokens`, the end-of-sequence token included.
    """
    prompts = list(task.train_dataset["prompt"])
    completions = sample(teacher, prompts, samples_per_prompt, max_new_tokens=max_new_tokens, **sampling)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    kept = []
    counts = {
        "prompts": len(prompts),
        "solved_prompts": 0,
        "samples": 0,
        "kept_samples": 0,
        "tokens": 0,
        "kept_tokens": 0,
    }
    all_marks = grade(task, task.train_dataset, completions)
    if path is not None:
        store_teacher_weight(path, teacher, prompts, all_marks)
    for prompt, texts, marks in zip(prompts, completions, all_marks, strict=True):
        lengths = [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        right = [i for i, mark in enumerate(marks) if mark and lengths[i] <= max_new_tokens]
        kept += [{"prompt": prompt, "completion": texts[i]} for i in right]
        counts["solved_prompts"] += bool(right)
        counts["samples"] += len(texts)
        counts["kept_samples"] += len(right)
        counts["tokens"] += sum(min(length, max_new_tokens) for length in lengths)
        counts["kept_tokens"] += sum(lengths[i] for i in right)
    if not kept:
        raise ValueError(
            f"None of the {counts['samples']} answers of the teacher is right, so there is nothing to imitate. Take a "
            "stronger teacher or easier puzzles, or raise `samples_per_prompt` or `max_completion_length`."
        )
    return Dataset.from_list(kept), counts


def save_samples(output_dir: str, settings: dict, dataset: Dataset, counts: dict[str, int]):
    """Keeps what [`collect`] returned, and what it was asked."""
    dataset.save_to_disk(Path(output_dir, "teacher_samples"))
    text = json.dumps({"settings": settings, "counts": counts}, indent=2) + "\n"
    Path(output_dir, "teacher_samples.json").write_text(text)


def load_samples(output_dir: str, settings: dict) -> tuple[Dataset | None, dict[str, int] | None]:
    """What [`save_samples`] kept, if anything. Raises a `ValueError` if it is the answer to other settings."""
    path = Path(output_dir, "teacher_samples.json")
    if not path.exists():
        return None, None
    known = json.loads(path.read_text())
    if known["settings"] != settings:
        raise ValueError(
            f"{path} is of a teacher that was asked otherwise, {known['settings']}, not {settings}. Choose another "
            "`--output_dir`, or delete it."
        )
    return load_from_disk(Path(output_dir, "teacher_samples")), known["counts"]


def make_trainer(student: str | PreTrainedModel, dataset: Dataset, args: SFTConfig, **kwargs) -> SFTTrainer:
    """
    Makes a trainer that has a student imitate the answers of [`collect`], and stop after them.

    Args:
        student (`str` or [`~transformers.PreTrainedModel`]):
            Name or path of the student, or one that was loaded from where its tokenizer is.
        dataset (`Dataset`):
            Answers, with the columns `prompt` and `completion`.
        args ([`~trl.SFTConfig`]):
            Settings. Mind `max_length`, which cuts longer answers.
        kwargs:
            Further arguments of the [`~trl.SFTTrainer`].

    Returns:
        [`~trl.SFTTrainer`]
    """
    path = student if isinstance(student, str) else student.name_or_path
    tokenizer, processing_class = AutoTokenizer.from_pretrained(path), AutoProcessor.from_pretrained(path)
    eos_token_id = tokenizer.convert_tokens_to_ids(args.eos_token or tokenizer.eos_token)

    def tokenize(rows):
        # Not TRL's way, which joins the texts and so merges tokens of word-level tokenizers, and which has some chat
        # templates (of the DeepSeek-R1 distillations, for instance) drop the reasoning from the answer
        prompts = encode_prompts(tokenizer, rows["prompt"])
        completions = tokenizer(rows["completion"], add_special_tokens=False)["input_ids"]
        pairs = [(prompt, [*ids, eos_token_id]) for prompt, ids in zip(prompts, completions, strict=True)]
        return {
            "input_ids": [prompt + completion for prompt, completion in pairs],
            "completion_mask": [[0] * len(prompt) + [1] * len(completion) for prompt, completion in pairs],
        }

    dataset = dataset.map(tokenize, batched=True)
    return SFTTrainer(model=student, args=args, train_dataset=dataset, processing_class=processing_class, **kwargs)


OFTEN = (
    "model_name_or_path output_dir max_steps num_train_epochs learning_rate per_device_train_batch_size use_peft bf16 "
    "logging_steps save_steps resume_from_checkpoint push_to_hub report_to"
).split()


def make_parser() -> Parser:
    groups = {"the teacher's answers": own_fields(ScriptArguments), "TRL's, often set": OFTEN}
    parser = Parser("trl-rlad distil", __doc__ or "", (ScriptArguments, SFTConfig, ModelConfig), groups)
    parser.set_defaults(max_length=None)  # or TRL cuts the answers at 1,024 tokens
    return parser


def prepare(arguments: list[str] | None = None) -> tuple:
    """From the command line to the arguments of [`run`], with all checks."""
    script_args, args, model_args = parse_arguments(make_parser(), MINI / "offline_distillation.yaml", arguments)
    if args.world_size > 1:
        raise ValueError("Run this in one process: the teacher samples in one.")
    student, teacher = model_args.model_name_or_path, script_args.teacher_model_name_or_path
    if script_args.task in MINIATURES:
        student = model_args.model_name_or_path = student or str(MINIATURES[script_args.task][0])
    if student is None or teacher is None:
        raise ValueError(
            f"`--task {script_args.task}` needs a student and a teacher: name them with `--model_name_or_path` and "
            "`--teacher_model_name_or_path`."
        )
    args.model_init_kwargs = get_init_kwargs(args, model_args)
    checkpoint = find_checkpoint(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    check_writable(args.output_dir)
    sizes = script_args.num_prompts, script_args.eval_size
    task = load_task(script_args.task, *sizes, args.seed, script_args.task_kwargs, tokenizer=teacher)
    return script_args, args, model_args, task, checkpoint


def run(script_args: ScriptArguments, args: Any, model_args: ModelConfig, task: Task, checkpoint: str | None):
    """Sample the teacher, train the student, measure before and after, and save what came out."""
    student: Any = model_args.model_name_or_path
    teacher: Any = script_args.teacher_model_name_or_path
    sampling: dict[str, Any] = {
        "max_new_tokens": script_args.max_completion_length,
        "batch_size": script_args.batch_size,
        "seed": args.seed,
        "backend": script_args.backend,
    }
    # First, as a student that can't be loaded is found thereby
    before = evaluate(student, task, num_samples=1, **sampling)
    settings = asdict(script_args) | {"seed": args.seed}
    dataset: Any
    counts: Any
    dataset, counts = load_samples(args.output_dir, settings)
    if dataset is None:
        dataset, counts = collect(
            teacher,
            task,
            script_args.samples_per_prompt,
            path=Path(args.output_dir, "teacher_weight.json"),
            temperature=script_args.temperature,
            **sampling,
        )
        save_samples(args.output_dir, settings, dataset, counts)
    print(
        f"The teacher answered {counts['prompts']:,} prompts {script_args.samples_per_prompt} times with "
        f"{counts['tokens']:,} tokens. Kept: {counts['kept_samples']:,} of {counts['samples']:,} answers, "
        f"{counts['kept_tokens']:,} tokens, for {counts['solved_prompts']:,} prompts."
    )

    trainer = make_trainer(
        student,
        dataset,
        args,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        print(f"\n{how_to_go_on(args.output_dir)}", flush=True)
        raise SystemExit(130) from None
    model: Any = trainer.model
    after = evaluate(model, task, num_samples=1, **sampling)
    print(f"Accuracy on {len(task.eval_dataset)} held-out puzzles:")
    for difficulty, scores in before.items():
        print(f"  {difficulty:>8}  {scores['mean@1']:6.1%} -> {after[difficulty]['mean@1']:6.1%}", flush=True)
    trainer.save_model()
    print(f"Saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()


def main(arguments: list[str] | None = None):
    """Distil in this process."""
    run(*prepare(arguments))
