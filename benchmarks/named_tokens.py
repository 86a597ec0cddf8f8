"""
Time what named tokens add to a step at a vocabulary of 150,000: the divergence from the teacher by k2 and by
"forward".

    python benchmarks/named_tokens.py

A step is the teacher's scoring and the student's passes forward and backward, on the same rollouts; the ways take
turns in one process, and medians are printed, with the peak of memory. Student and teacher are random.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from teacher_scoring import peak_memory, time_ways
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_rlad import RLADConfig, RLADTrainer


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny  # noqa: E402


VOCABULARY, ROLLOUTS, PROMPT, COMPLETION = 151_936, 16, 40, 64
WAYS = {
    "k2": {},
    "forward, k = 8": {"teacher_kl": "forward", "teacher_top_k": 8},
}


def save(path, layers):
    tokenizer = tiny.make_tokenizer()
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_step(student, teacher, settings, folder):
    generator = torch.Generator().manual_seed(0)
    draw = lambda length: torch.randint(4, 32, (ROLLOUTS, length), generator=generator).tolist()  # noqa: E731
    rollouts = {"prompt_ids": draw(PROMPT), "completion_ids": draw(COMPLETION), "logprobs": None}
    args = RLADConfig(
        folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        per_device_train_batch_size=ROLLOUTS,
        max_completion_length=COMPLETION,
        teacher_kl_coef=1.0,
        report_to="none",
        **settings,
    )
    trainer = RLADTrainer(
        student,
        lambda completion_ids, **kwargs: [float(row % 8) for row in range(len(completion_ids))],
        args,
        Dataset.from_dict({"prompt": ["w1"]}),
        teacher_model=teacher,
        rollout_func=lambda given, trainer: rollouts,
    )
    trainer.model.to(trainer.accelerator.device)
    trainer.current_gradient_accumulation_steps = 1

    def step():
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, [{"prompt": "w1"}] * ROLLOUTS, None)

    return step, trainer.accelerator.device


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds, after one to warm up")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = save(Path(folder, "student"), 4), save(Path(folder, "teacher"), 8)
        steps = {name: make_step(student, teacher, settings, folder) for name, settings in WAYS.items()}
        device = steps["k2"][1]
        steps = {name: step for name, (step, _) in steps.items()}
        seconds = time_ways(steps, options.repeats, device)
        print(f"\n{ROLLOUTS} rollouts of {PROMPT} + {COMPLETION} tokens, vocabulary of {VOCABULARY:,}\n")
        print("| divergence | step, s | over k2 | peak memory, MiB |\n|---|---|---|---|")
        for name, step in steps.items():
            over, peak = seconds[name] / seconds["k2"], peak_memory(step, device)
            print(f"| {name} | {seconds[name]:.2f} | {over:.3f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
