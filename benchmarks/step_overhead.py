"""
Time a training step: TRL's GRPO, ours without a teacher, and ours with teachers of several sizes, on the same
rollouts.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --lengths exponential --micro_batches 8 --json results.json

All ways take turns in one process; medians are printed, in times of GRPO's step. A step is everything but the
optimizer's update: rewards, the teacher's scoring, and the student's passes forward and backward. Rollouts are given,
with random tokens; what it takes to generate them, which is the same for all, is timed by itself. Student and teachers
are random. A teacher's floor is one forward pass over as many tokens, without padding.
"""

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from teacher_scoring import peak_memory, time_ways
from transformers import LogitsProcessor, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_rlad import RLADConfig, RLADTrainer


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny  # noqa: E402


ROLLOUTS, GROUP, VOCABULARY = 64, 8, 512
SIZES = {  # hidden size and layers: one, four and eight times the student's parameters in the layers
    "1x": (128, 2),
    "4x": (256, 2),
    "8x": (256, 4),
}
LENGTHS = {  # of completions; prompts have 40 to 120 tokens
    "exponential": lambda generator: [
        int(min(max(-100 * draw, 8), 512)) for draw in torch.rand(ROLLOUTS, generator=generator).log().tolist()
    ],
    "uniform": lambda generator: torch.randint(8, 513, (ROLLOUTS,), generator=generator).tolist(),
    "equal": lambda generator: [128] * ROLLOUTS,
    "tiny": lambda generator: [4] * ROLLOUTS,  # shows that it runs
}


def save(path: Path, hidden_size: int, layers: int) -> str:
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(layers)
    config = Qwen3Config(
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        head_dim=32,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_rollouts(lengths: str, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts, eight rollouts to each, and of completions."""
    generator = torch.Generator().manual_seed(seed)
    completions = LENGTHS[lengths](generator)
    # With completions of one length, prompts too have one, so that there is no padding at all
    prompts = {"equal": [80] * ROLLOUTS, "tiny": [4] * ROLLOUTS}.get(
        lengths, torch.randint(40, 121, (ROLLOUTS,), generator=generator).tolist()
    )

    def draw(length):
        return torch.randint(4, 32, (length,), generator=generator).tolist()

    by_group = [draw(length) for length in prompts[::GROUP]]
    return [by_group[row // GROUP] for row in range(ROLLOUTS)], [draw(length) for length in completions]


def reward(completion_ids, **kwargs):
    """No two rewards of a group are alike, so every row is scored."""
    return [float(row % GROUP) for row in range(len(completion_ids))]


def make_step(
    student: str, teacher: str | None, ours: bool, rows: int, rollouts, folder: str, reward=reward, **kwargs
):
    """A function that runs a step with micro-batches of `rows`. What is left over are settings of ours."""
    prompts, completions = rollouts
    settings = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": ROLLOUTS // rows,
        "num_generations": GROUP,
        "max_completion_length": 512,  # of all of `LENGTHS`, and so the same on all ranks
        "loss_type": "grpo",
        "report_to": "none",
    }

    def roll_out(given, trainer):
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": None}

    dataset = Dataset.from_dict({"prompt": ["w1"]})
    if ours:
        args = RLADConfig(folder, alpha=0.5 if teacher else 1.0, **settings, **kwargs)
        trainer = RLADTrainer(student, reward, args, dataset, teacher_model=teacher, rollout_func=roll_out)
    else:
        trainer = GRPOTrainer(student, reward, GRPOConfig(folder, **settings), dataset, rollout_func=roll_out)
    trainer.model.to(trainer.accelerator.device)
    trainer.current_gradient_accumulation_steps = ROLLOUTS // rows
    inputs = [{"prompt": "w1"}] * ROLLOUTS

    def step():
        trainer.model.zero_grad()
        for _ in range(ROLLOUTS // rows):
            trainer.training_step(trainer.model, inputs, None)

    return step


def make_floor(teacher: str, rollouts, device):
    """A function that runs a teacher over as many tokens, without padding, and its LM head over the completions'."""
    model = Qwen3ForCausalLM.from_pretrained(teacher).eval().to(device)
    scored, tokens = sum(map(len, rollouts[1])), sum(map(len, rollouts[0] + rollouts[1]))
    width = tokens // ROLLOUTS
    ids = torch.randint(4, 32, (ROLLOUTS, width), device=device)
    rows_at_once = max(1, (1024 if device.type == "cpu" else 16384) // width)  # as the teacher by itself

    @torch.no_grad()
    def floor():
        for chunk in ids.split(rows_at_once):
            states = model.base_model(input_ids=chunk, use_cache=False).last_hidden_state.flatten(0, 1)
            model.lm_head(states[: len(states) * scored // tokens]).log_softmax(-1)

    return floor


class EndAt(LogitsProcessor):
    """Ends each completion at its given length, and not before."""

    def __init__(self, prompt_width: int, lengths: list[int], eos_token_id: int):
        self.prompt_width, self.lengths, self.eos = prompt_width, torch.tensor(lengths), eos_token_id

    def __call__(self, input_ids, scores):
        ends = input_ids.size(1) - self.prompt_width + 1 >= self.lengths.to(scores.device)
        scores[:, self.eos] = -float("inf")
        scores[ends] = -float("inf")
        scores[ends, self.eos] = 0.0
        return scores


def make_generation(student: str, rollouts, device):
    """A function that generates completions of these lengths."""
    model, tokenizer = Qwen3ForCausalLM.from_pretrained(student).eval().to(device), tiny.make_tokenizer()
    prompts, completions = rollouts
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)
    lengths = [len(ids) for ids in completions]
    end = LogitsProcessorList([EndAt(batch["input_ids"].size(1), lengths, tokenizer.eos_token_id)])

    def generate():
        model.generate(**batch, max_new_tokens=max(lengths), do_sample=True, logits_processor=end)

    return generate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=["exponential", "uniform", "equal"])
    parser.add_argument("--micro_batches", nargs="+", type=int, default=[4, 8, 32], help="rows of a micro-batch")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, after one to warm up")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        student = save(Path(folder, "student"), *SIZES["1x"])
        teachers = {size: save(Path(folder, size), *shape) for size, shape in SIZES.items()}
        for lengths in options.lengths:
            rollouts = make_rollouts(lengths)
            tokens = sum(map(len, rollouts[0] + rollouts[1]))
            padded = ROLLOUTS * sum(max(map(len, part)) for part in rollouts)
            print(f"\n{lengths}: {tokens:,} tokens, {padded:,} with TRL's padding")
            device = Accelerator(cpu=not torch.cuda.is_available()).device
            # What doesn't depend on the micro-batch takes turns with the ways of the first size alone
            others = {f"floor of {size}": make_floor(path, rollouts, device) for size, path in teachers.items()}
            seconds = time_ways({"generation": make_generation(student, rollouts, device)}, 2, device)
            for rows in options.micro_batches:
                ways = {"GRPO": make_step(student, None, False, rows, rollouts, folder)}
                ways["alpha 1"] = make_step(student, None, True, rows, rollouts, folder)
                for size, path in teachers.items():
                    ways[size] = make_step(student, path, True, rows, rollouts, folder)
                seconds |= time_ways(
                    ways if rows != options.micro_batches[0] else ways | others, options.repeats, device
                )
                peaks = {way: peak_memory(run, device) for way, run in ways.items()}
                results.append({"lengths": lengths, "rows": rows, "tokens": tokens, "padded": padded})
                results[-1] |= {"seconds": dict(seconds), "peak_mib": peaks}
                grpo, generation = seconds["GRPO"], seconds["generation"]
                print(f"\nMicro-batches of {rows}: GRPO's step {grpo:.2f} s and {generation:.2f} s of generation\n")
                print("| way | step over GRPO | with generation | 1 + floor of the teacher | peak memory, MiB |")
                print("|---|---|---|---|---|")
                for way in ways:
                    floor = 1 + seconds.get(f"floor of {way}", 0) / grpo
                    whole = (seconds[way] + generation) / (grpo + generation)
                    print(f"| {way} | {seconds[way] / grpo:.2f} | {whole:.2f} | {floor:.2f} | {peaks[way]:.0f} |")
    if options.json:
        versions = {package: version(package) for package in ("torch", "transformers", "trl", "trl-rlad")}
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        figures = {"machine": machine, "versions": versions, "results": results}
        Path(options.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
