"""
Time the teacher's scoring: TRL's padded way, ours with each part switched on in turn, and the floor.

    python benchmarks/teacher_scoring.py --preset cpu
    python benchmarks/teacher_scoring.py --preset h200 --json results.json

The floor is one dense forward pass, without any padding, over as many tokens as the rows really have, with the LM head
on as many as are scored. All ways take turns in one process; the medians are printed. Weights are random.
"""

import argparse
import ctypes
import json
import math
import platform
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from trl_rlad import RLADConfig, TeacherScorer
from trl_rlad.scoring import RowScorer
from trl_rlad.teachers.local import FusedHead, LocalTeacher, WrappedTeacher


@dataclass
class Preset:
    """Shape of the teacher, number of rollouts, and the length distributions that are worth timing there."""

    shape: dict
    dtype: torch.dtype
    rollouts: int
    trl_batch_size: int
    lengths: tuple[str, ...]


RESULTS = Path(__file__).parent / "results"
QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8192,
}
TINY = SMALL | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 512}
PRESETS = {
    "cpu": Preset(SMALL, torch.float32, 32, 8, ("exponential", "uniform", "prefix", "mini")),
    "h200": Preset(QWEN3_8B, torch.bfloat16, 64, 8, ("exponential-2k", "long-tail-8k", "prefix-2k")),
    "tiny": Preset(TINY, torch.float32, 16, 8, ("exponential",)),  # shows that it runs
}


def draw_lengths(name: str, rollouts: int, group: int = 8) -> list[tuple[int, int]]:
    """Prompt and completion length of each rollout; the `group` rollouts of a prompt share it."""
    if name == "mini":  # a generation batch of `examples/rlad_grpo.py`, recorded
        return [tuple(pair) for pair in json.loads((RESULTS / "mini_lengths.json").read_text())]
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high, n):
        return torch.randint(low, high + 1, (n,), generator=generator).tolist()

    def exponential(mean, low, high):
        draws = -mean * torch.rand(rollouts, generator=generator).log()
        return draws.clamp(low, high).long().tolist()

    prompts, completions = {
        "exponential": lambda: (uniform(40, 120, rollouts // group), exponential(120, 8, 512)),
        "uniform": lambda: (uniform(40, 120, rollouts // group), uniform(8, 512, rollouts)),
        "prefix": lambda: ([512] * (rollouts // group), [64] * rollouts),
        "exponential-2k": lambda: (uniform(128, 512, rollouts // group), exponential(600, 32, 2048)),
        "long-tail-8k": lambda: (uniform(128, 512, rollouts // group), exponential(2000, 64, 8192)),
        "prefix-2k": lambda: ([2048] * (rollouts // group), [256] * rollouts),
    }[name]()
    return [(prompts[i // group], completions[i]) for i in range(rollouts)]


def make_batch(lengths: list[tuple[int, int]], vocab_size: int, device) -> dict[str, torch.Tensor]:
    """A generation batch as TRL pads it, with random tokens and advantages."""
    generator = torch.Generator().manual_seed(1)
    longest_prompt, longest = (max(column) for column in zip(*lengths, strict=True))
    by_prompt = {}
    rows = []
    for i, (prompt, _) in enumerate(lengths):
        ids = by_prompt.setdefault(i // 8, torch.randint(3, vocab_size, (prompt,), generator=generator))
        rows.append(torch.nn.functional.pad(ids, (longest_prompt - prompt, 0)))
    completion_ids = torch.randint(3, vocab_size, (len(lengths), longest), generator=generator)
    prompt_lengths, completion_lengths = (torch.tensor(column)[:, None] for column in zip(*lengths, strict=True))
    batch = {
        "prompt_ids": torch.stack(rows),
        "prompt_mask": (torch.arange(longest_prompt) >= longest_prompt - prompt_lengths).long(),
        "completion_ids": completion_ids,
        "completion_mask": (torch.arange(longest) < completion_lengths).long(),
        "advantages": torch.ones(len(lengths)),
    }
    return {key: value.to(device) for key, value in batch.items()}


def bare_teacher(model: Qwen3ForCausalLM, args: RLADConfig, accelerator: Accelerator) -> LocalTeacher:
    """A teacher without a checkpoint and a tokenizer."""
    teacher = object.__new__(LocalTeacher)
    teacher.args, teacher.accelerator, teacher.vocab_size = args, accelerator, model.config.vocab_size
    teacher.name, teacher.max_length = "random", model.config.max_position_embeddings
    add_fused_lm_head(model.requires_grad_(False).eval())
    teacher.fused_head, teacher.model = FusedHead(model, temperature=1.0), teacher.prepare(model)
    return teacher


def make_ways(
    preset: Preset, teacher: LocalTeacher, accelerator: Accelerator, batch: dict, lengths, shares=()
) -> dict:
    """Each way to score the batch, as a function that returns the log-probabilities."""
    mask = batch["completion_mask"]
    trl = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(report_to=[]))
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], mask], dim=1)
    scored = sum(completion for _, completion in lengths)

    @torch.no_grad()
    def trl_padded():
        score = GRPOTrainer._get_per_token_logps_and_entropies
        return score(trl, teacher.model, input_ids, attention_mask, mask.size(1), preset.trl_batch_size)[0] * mask

    def ours(kind=LocalTeacher, shares_prompts=False, budget=teacher.args.teacher_tokens_per_batch, mask=mask):
        scorer = TeacherScorer({"": RowScorer(teacher, accelerator, budget)})

        def run():
            teacher.shares_prompts = shares_prompts
            teacher._score_by_states = kind._score_by_states.__get__(teacher)
            return scorer.score(batch, mask)["teacher_per_token_logps"]

        return run

    tokens = sum(map(sum, lengths))
    width = math.ceil(tokens / len(lengths))
    dense_ids = torch.randint(3, teacher.vocab_size, (len(lengths), width), device=mask.device)
    rows_at_once = max(1, teacher.args.teacher_tokens_per_batch // width)

    @torch.no_grad()
    def floor():
        for chunk in dense_ids.split(rows_at_once):
            states = teacher.model.base_model(input_ids=chunk, use_cache=False).last_hidden_state.flatten(0, 1)
            share = scored * chunk.numel() // dense_ids.numel()
            teacher.fused_head(states[:share], chunk.flatten()[:share])

    def without_signal(share):
        # Of all choices of that many groups, one that leaves out just about that share of the tokens
        groups = range(len(lengths) // 8)
        sizes = [sum(map(sum, lengths[8 * group : 8 * group + 8])) for group in groups]
        choices = combinations(groups, round(share * len(groups)))
        left_out = min(choices, key=lambda choice: abs(sum(sizes[group] for group in choice) - share * tokens))
        wanted = torch.ones_like(mask).unflatten(0, (len(groups), 8))
        wanted[list(left_out)] = 0
        return ours(shares_prompts=True, mask=mask * wanted.flatten(0, 1))

    return {
        "TRL, padded": trl_padded,
        "no padding": ours(WrappedTeacher),
        "+ head on scored tokens": ours(),
        "+ shared prompts": ours(shares_prompts=True),
        "+ half of the groups without signal": without_signal(0.5),
        "floor": floor,
        **{share: without_signal(share) for share in shares},
    }


def time_ways(ways: dict, repeats: int, device) -> dict[str, float]:
    """
    Median seconds of each way; they take turns. On a CPU those of one core are counted, whatever else runs there.
    """
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    torch.set_num_threads(1)
    seconds = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = clock()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(way, device) -> float:
    """MiB that a way takes at most, above what is taken before it runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def resident(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10

    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier ways have left (Linux, as the next line)
    Path("/proc/self/clear_refs").write_text("5")  # sets the highest to the present
    before = resident("VmRSS")
    way()
    return resident("VmHWM") - before


def plot(preset: Preset, teacher: LocalTeacher, accelerator: Accelerator, options):
    """Draw the scoring time against the mean length of the completions, for shares of groups without signal."""
    import matplotlib.pyplot as plt

    means, shares = (32, 64, 128, 256), (0.0, 0.25, 0.5, 0.75)
    curves = {"TRL, padded": [], **{share: [] for share in shares}}
    for mean in means:
        generator = torch.Generator().manual_seed(mean)
        draws = (-mean * torch.rand(preset.rollouts, generator=generator).log()).clamp(8, 4 * mean).long().tolist()
        lengths = [(80, draw) for draw in draws]
        batch = make_batch(lengths, teacher.vocab_size, accelerator.device)
        ways = make_ways(preset, teacher, accelerator, batch, lengths, shares)
        seconds = time_ways({way: ways[way] for way in curves}, options.repeats, accelerator.device)
        for way, curve in curves.items():
            curve.append(seconds[way])
    plt.figure(figsize=(6, 3.8), layout="tight")
    for way, curve in curves.items():
        label = way if isinstance(way, str) else f"ours, {way:.0%} of the groups without signal"
        plt.plot(means, curve, marker="o", color="0.4" if isinstance(way, str) else plt.cm.viridis(way), label=label)
    plt.xlabel("mean completion length, tokens (exponential, cut at four times the mean)")
    plt.ylabel(f"seconds for {preset.rollouts} rollouts")
    plt.ylim(bottom=0)
    plt.grid(alpha=0.3)
    plt.legend(frameon=False, fontsize=8)
    plt.savefig(options.plot, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="shapes and lengths to time")
    parser.add_argument("--lengths", nargs="+", help="of the preset's lengths, those to time")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one to warm up")
    parser.add_argument("--tokens_per_batch", type=int, help="token budget of a micro-batch")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--plot", help="PNG to draw the time against length and share of groups without signal")
    options = parser.parse_args()

    preset = PRESETS[options.preset]
    torch.manual_seed(0)
    args = RLADConfig(
        "unused", use_cpu=options.preset != "h200", bf16=False, teacher_tokens_per_batch=options.tokens_per_batch
    )
    accelerator = Accelerator(cpu=options.preset != "h200")  # after the config, which resets accelerate
    with torch.device(accelerator.device):
        model = Qwen3ForCausalLM(Qwen3Config(**preset.shape, tie_word_embeddings=False)).to(preset.dtype)
    teacher = bare_teacher(model, args, accelerator)
    results = []
    for name in options.lengths or preset.lengths:
        lengths = draw_lengths(name, preset.rollouts)
        batch = make_batch(lengths, teacher.vocab_size, accelerator.device)
        ways = make_ways(preset, teacher, accelerator, batch, lengths)
        reference = ways["TRL, padded"]()
        error = max((ways[way]() - reference).abs().max().item() for way in list(ways)[1:4])
        seconds = time_ways(ways, options.repeats, accelerator.device)
        tokens, padded = sum(map(sum, lengths)), reference.size(0) * (reference.size(1) + batch["prompt_ids"].size(1))
        print(f"\n{name}: {tokens:,} real tokens of {padded:,} padded; largest difference from TRL {error:.1e}\n")
        peaks = {way: peak_memory(run, accelerator.device) for way, run in ways.items()}
        print("| way | s | tokens/s | over TRL | of the floor | peak memory, MiB |\n|---|---|---|---|---|---|")
        for way, value in seconds.items():
            ratios = f"{seconds['TRL, padded'] / value:.2f}x | {seconds['floor'] / value:.2f}"
            print(f"| {way} | {value:.3f} | {tokens / value:,.0f} | {ratios} | {peaks[way]:.0f} |")
        results.append({"lengths": name, "tokens": tokens, "padded": padded, "error": error})
        results[-1] |= {"seconds": seconds, "peak_mib": peaks}
    if options.plot:
        plot(preset, teacher, accelerator, options)
    if options.json:
        versions = {package: version(package) for package in ("torch", "transformers", "trl", "trl-rlad")}
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        with open(options.json, "w") as file:
            json.dump(
                {"preset": options.preset, "machine": machine, "versions": versions, "results": results},
                file,
                indent=2,
            )


if __name__ == "__main__":
    main()
