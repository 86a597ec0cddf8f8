"""
How much memory a teacher's weights take on each rank, by its size and set-up.

    python benchmarks/teacher_memory.py              # worked out from the shapes of Qwen3
    python benchmarks/teacher_memory.py --measure    # measured, with a random model: two processes on CPU, or one GPU
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM


GIB = 2**30
CONFIGS = Path(__file__).parent.parent / "examples" / "accelerate_configs"
SHAPES = {  # hidden size, intermediate size, layers, heads
    "Qwen3-8B": (4096, 12288, 36, 32),
    "Qwen3-14B": (5120, 17408, 40, 40),
    "Qwen3-32B": (5120, 25600, 64, 64),
}


def qwen3_config(hidden_size: int, intermediate_size: int, layers: int, heads: int, vocab_size: int = 151_936):
    return Qwen3Config(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=vocab_size,
        tie_word_embeddings=False,
    )


def work_out(ranks: int):
    """Print a Markdown table of GiB of weights on the device of each rank."""
    columns = ["whole, bf16", "whole, 4 bit", f"ZeRO-3 over {ranks}", "its extra while scoring"]
    print(f"| teacher | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = Qwen3ForCausalLM(qwen3_config(*shape))
        total = model.num_parameters()
        ends = 2 * model.get_input_embeddings().weight.numel()  # embedding and LM head stay bf16 under bitsandbytes
        # nf4: half a byte, and a float32 scale for each block of 64
        four_bit = (total - ends) * (0.5 + 4 / 64) + 2 * ends
        # what DeepSpeed may hold besides the shards: layers fetched ahead, and the matrix that runs
        extra = 2 * (32 * shape[0] ** 2 + ends // 2)
        cells = [2 * total, four_bit, 2 * total / ranks, extra]
        print(f"| {name} | {' | '.join(f'{cell / GIB:.1f}' for cell in cells)} |")


def worker(student: str, teacher: str, output_dir: str, **kwargs):
    """Of one process: build the trainer, and report what its teacher holds and its highest memory so far."""
    from datasets import Dataset

    from trl_rlad import RLADConfig, RLADTrainer

    on_gpu = torch.cuda.is_available()
    args = RLADConfig(output_dir, use_cpu=not on_gpu, bf16=False, report_to="none", max_completion_length=8, **kwargs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = RLADTrainer(
        student, lambda completions, **_: [0.0] * len(completions), args, Dataset.from_dict({"prompt": ["a"] * 8}),
        teacher_model=teacher,
    )  # fmt: skip
    model = trainer.teacher_scorer.teachers[""].model
    held = sum(
        getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p).nbytes for p in model.parameters()
    )
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if on_gpu:
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    rank = trainer.accelerator.process_index
    Path(output_dir, f"{rank}.json").write_text(json.dumps({"held": held, "peak": peak}))


def measure(save):
    """Print a Markdown table of MiB held by each of two processes, for a random teacher of about 300M parameters."""
    ranks = 1 if torch.cuda.is_available() else 2
    with tempfile.TemporaryDirectory() as folder:
        student = save(f"{folder}/student", qwen3_config(64, 128, 2, 8, 1024))
        teacher = save(f"{folder}/teacher", qwen3_config(1024, 4096, 16, 8, 1024))
        size = Path(teacher, "model.safetensors").stat().st_size
        print(f"float32 teacher of {size / 2**20:.0f} MiB, {ranks} processes:\n")
        print("| set-up | weights held by each rank | highest memory above start |\n|---|---|---|")
        for name, config, kwargs in [
            ("ZeRO-2 student, whole teacher", "zero2", {}),
            ("ZeRO-2 student, sharded teacher", "zero2", {"teacher_zero_stage": 3}),
            ("ZeRO-3 student, sharded teacher", "zero3", {}),
            ("the same, offloaded", "zero3", {"teacher_offload": "cpu"}),
        ]:
            settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
            settings |= {"num_processes": ranks, "use_cpu": ranks == 2, "mixed_precision": "no"}
            Path(folder, "config.yaml").write_text(yaml.dump(settings))
            options = {"student": student, "teacher": teacher, "output_dir": folder, **kwargs}
            command = ["-m", "accelerate.commands.launch", "--config_file", f"{folder}/config.yaml"]
            command += ["--main_process_port", "0", __file__, "--worker", json.dumps(options)]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *command], env=env, check=True, capture_output=True)
            reports = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
            cells = [" / ".join(f"{rank[key] / 2**20:.0f}" for rank in reports) for key in ("held", "peak")]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def save(path: str, config) -> str:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import tiny

    tokenizer = tiny.make_tokenizer()
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 1, 0, None
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure on CPU instead of working out")
    parser.add_argument("--ranks", type=int, default=8, help="processes that share a sharded teacher")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(**options.worker)
    elif options.measure:
        measure(save)
    else:
        work_out(options.ranks)
