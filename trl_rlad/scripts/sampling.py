"""Draw completions from a model, with transformers or vLLM, and see which are right."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..evaluation import pass_at_k
from .tasks import Task


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str] | list[list[dict]]) -> list[list[int]]:
    """Token ids of prompts, which are strings or chat messages, as TRL makes them."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts)["input_ids"]
    return tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]


def sample(
    model: str | PreTrainedModel,
    prompts: list[str] | list[list[dict]],
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 2048,
    batch_size: int = 128,
    seed: int = 0,
    backend: str = "transformers",
) -> list[list[str]]:
    """
    Draws completions of each prompt.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Name or path of a model or, for transformers only, a model that was loaded from where its tokenizer is.
        prompts (`list[str]` or `list[list[dict]]`):
            Texts, or chat messages to which the chat template is applied.
        num_samples (`int`, *optional*, defaults to `1`):
            Number of completions of each prompt.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass of the tokens to draw from.
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Completions are cut at this length.
        batch_size (`int`, *optional*, defaults to `128`):
            Number of completions to draw at once. vLLM finds its own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
        backend (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"` or `"vllm"`.

    Returns:
        `list[list[str]]`:
            The `num_samples` completions of each prompt, without special tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.name_or_path)
    prompt_ids = encode_prompts(tokenizer, prompts)

    if backend == "vllm":
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError('`backend="vllm"` needs vLLM: `pip install "trl[vllm]"`.') from error
        params = SamplingParams(n=num_samples, temperature=temperature, top_p=top_p, max_tokens=max_new_tokens)
        # The seed is the engine's: one in `params` would give all prompts the same random numbers
        outputs = LLM(model, seed=seed).generate([{"prompt_token_ids": ids} for ids in prompt_ids], params)
        return [[completion.text for completion in output.outputs] for output in outputs]
    if backend != "transformers":
        raise ValueError(f"`backend` must be 'transformers' or 'vllm', but is {backend!r}.")

    if isinstance(model, str):
        try:
            model = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", device_map="auto")
        except ValueError:  # it knows text alone
            model = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto")
    model.eval()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    completions = [[] for _ in prompts]
    # Prompts of like length need little padding; the longest come first, so that memory runs out at once or never
    order = sorted(range(len(prompts)), key=lambda index: -len(prompt_ids[index]))
    rows = [index for index in order for _ in range(num_samples)]
    torch.manual_seed(seed)
    with tqdm(total=len(rows), desc="Sampling") as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            inputs = tokenizer.pad({"input_ids": [prompt_ids[index] for index in batch]}, return_tensors="pt")
            output = model.generate(
                **inputs.to(model.device),
                do_sample=True,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                # Not those of the model's own generation config, and the cache that gradient checkpointing turns off
                top_k=0,
                repetition_penalty=1.0,
                use_cache=True,
            )
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                completions[index].append(text)
            bar.update(len(batch))
    return completions


def grade(task: Task, puzzles: Dataset, completions: list[list[str]]) -> list[list[bool | None]]:
    """Whether each completion of each of a task's `puzzles` is right; `None` where the reward can't tell."""
    columns = {name: list(puzzles[name]) for name in puzzles.column_names if name != "prompt"}
    is_chat = not isinstance(puzzles[0]["prompt"], str)
    scores = []
    for texts in zip(*completions, strict=True):  # the first completion of every prompt, then the second
        texts = [[{"role": "assistant", "content": text}] for text in texts] if is_chat else list(texts)
        scores.append(task.reward(prompts=list(puzzles["prompt"]), completions=texts, **columns))
    return [list(map(task.is_right, of_prompt)) for of_prompt in zip(*scores, strict=True)]


def evaluate(
    model: str | PreTrainedModel,
    task: Task,
    num_samples: int = 8,
    k: list[int] | None = None,
    temperature: float = 0.6,
    top_p: float = 0.95,
    **sampling,
) -> dict[str, dict[str, float]]:
    """
    Measures a model on the held-out puzzles of a task, by their difficulty.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model, see [`sample`].
        task ([`~tasks.Task`]):
            The task.
        num_samples (`int`, *optional*, defaults to `8`):
            Number of samples per puzzle.
        k (`list[int]`, *optional*):
            The k of Pass@k. `None` takes 1 and `num_samples`.
        temperature (`float`, *optional*, defaults to `0.6`):
            Temperature.
        top_p (`float`, *optional*, defaults to `0.95`):
            Probability mass of the tokens to draw from.
        sampling:
            Further arguments of [`sample`].

    Returns:
        `dict[str, dict[str, float]]`:
            For each difficulty that has a name, and for `"overall"`: the number of `puzzles`, the number of `samples`
            in all, `mean@{num_samples}`, and `pass@{k}` for each k. Puzzles that the reward can't judge are left out.
    """
    k = k or sorted({1, num_samples})
    for each in k:
        pass_at_k(num_samples, 0, each)  # refuses a bad k before anything is sampled
    puzzles = task.eval_dataset
    completions = sample(model, list(puzzles["prompt"]), num_samples, temperature, top_p, **sampling)
    groups = {}
    for difficulty, marks in zip(puzzles["difficulty"], grade(task, puzzles, completions), strict=True):
        if None in marks:  # the reward can't judge this puzzle
            continue
        for name in {str(difficulty), "overall"} - {""}:
            groups.setdefault(name, []).append(sum(marks))
    if not groups:
        raise ValueError("The reward function can judge none of the puzzles.")
    return {
        name: {
            "puzzles": len(counts),
            "samples": len(counts) * num_samples,
            f"mean@{num_samples}": sum(counts) / len(counts) / num_samples,
            **{f"pass@{each}": sum(pass_at_k(num_samples, c, each) for c in counts) / len(counts) for each in k},
        }
        for name, counts in sorted(groups.items())
    }


def prompt_key(prompt: str | list[dict]) -> str:
    """What stands for a prompt in a JSON file."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


def store_teacher_weight(
    path: Path, teacher: str, prompts: list, marks: list[list[bool | None]], known: dict[str, float] | None = None
) -> dict[str, float]:
    """
    Writes down what share of a teacher's answers to each prompt is right, for [`add_teacher_weight`] to read.

    Args:
        path (`Path`):
            JSON file.
        teacher (`str`):
            Name or path of the teacher.
        prompts (`list`):
            Prompts, texts or chat messages.
        marks (`list[list[bool | None]]`):
            Whether each answer to each prompt is right. One that can't be judged isn't to be believed.
        known (`dict[str, float]`, *optional*):
            Shares of further prompts.

    Returns:
        `dict[str, float]`: the shares, those that were known included.
    """
    shares = {
        prompt_key(prompt): sum(map(bool, right)) / len(right) for prompt, right in zip(prompts, marks, strict=True)
    }
    shares = (known or {}) | shares
    settings = {"teacher": teacher, "num_samples": len(marks[0])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "teacher_weight": shares}) + "\n")
    return shares


def add_teacher_weight(task: Task, teacher: str, num_samples: int, path: Path, **sampling) -> Dataset:
    """
    Adds the column `teacher_weight`, by which the `RLADTrainer` lets a teacher have its say where it can be believed:
    the share of its answers to each prompt that are right.

    Args:
        task ([`~tasks.Task`]):
            The task.
        teacher (`str`):
            Name or path of the teacher.
        num_samples (`int`):
            Number of answers to each prompt.
        path (`Path`):
            JSON file with the number of answers and the shares, by prompt. What it has isn't sampled again.
        sampling:
            Further arguments of [`sample`].

    Returns:
        `Dataset`: the training set with the column.
    """
    puzzles = task.train_dataset
    keys = [prompt_key(prompt) for prompt in puzzles["prompt"]]
    settings = {"teacher": teacher, "num_samples": num_samples}
    known = json.loads(path.read_text()) if path.exists() else {"settings": settings, "teacher_weight": {}}
    if known["settings"] != settings:
        raise ValueError(
            f"{path} holds the answers of another teacher or another number of them, {known['settings']}, not "
            f"{settings}. Move it away, or choose another `--output_dir`."
        )
    weights = known["teacher_weight"]
    missing = list({key: row for row, key in enumerate(keys) if key not in weights}.values())
    if missing:
        asked = puzzles.select(missing)
        completions = sample(teacher, list(asked["prompt"]), num_samples, **sampling)
        marks = grade(task, asked, completions)
        weights = store_teacher_weight(path, teacher, asked["prompt"], marks, weights)
    return puzzles.add_column("teacher_weight", [weights[key] for key in keys])
