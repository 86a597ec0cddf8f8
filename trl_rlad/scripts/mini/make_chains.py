"""
Make the models of the chains of operators (see `trl_rlad/scripts/tasks/chains.py`), from scratch and offline.

    python examples/mini/make_chains.py --output_dir somewhere

Of two architectures, a GPT with learned positions (GPT-2) and Qwen3. The teachers: *strong*; *flawed*, which has
learnt another permutation for three of the operators; *soft*, which writes each digit in figures or letters, as it
likes. The students, of a third of the teachers' size: *half* and *soft_half*, stopped in the middle of what their
teacher was taught; *far*, which has never seen a quarter of the operators.

When a student is stopped is decided by its own accuracy alone, at temperature 1: half-learned at the first look above
`HALF`. A model takes ten to sixty seconds on one CPU thread. Two of them come along, those of the main job: the
GPT's strong teacher and its half-learned student.
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from trl_rlad.scripts.mini.make_models import make_model
from trl_rlad.scripts.tasks.chains import (
    EOS,
    LENGTH,
    MAX_COMPLETION_LENGTH,
    OPERATORS,
    WORDS,
    correctness_reward,
    draw_prompt,
    make_dataset,
    make_operators,
    make_tokenizer,
    solve,
)


STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP = 700, 128, 2e-3, 50
HALF = 0.15  # of a half-learned student; the look after it must not be above twice that
FAR_STEPS = 500
FLAW = "bin"  # operators that the flawed teacher has wrong
SEEN = "".join(OPERATORS)[:15]  # operators that the far student has seen

SIZES = {  # width, layers
    "teacher": (96, 3),
    "student": (64, 2),
}


def make(architecture: str, size: tuple[int, int], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Make a model of an architecture, `"gpt"` or `"qwen3"`, with random weights."""
    width, layers = size
    if architecture == "qwen3":
        shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
        return make_model(shape | {"num_attention_heads": width // 16}, tokenizer)
    config = GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=width // 16,
        n_positions=32,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one kernel
        vocab_size=len(tokenizer),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def draw_batch(rng: random.Random, tokenizer: PreTrainedTokenizerBase, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the token ids and the labels of a batch of solutions, of the kind that a model learns from."""
    operators = OPERATORS | (make_operators(FLAW, seed=1) if kind == "flawed" else {})
    texts = []
    for _ in range(BATCH_SIZE):
        prompt = draw_prompt(rng, SEEN if kind == "far" else "".join(OPERATORS))
        words = [rng.choice((str(v), WORDS[v])) if "soft" in kind else str(v) for v in solve(prompt, operators)]
        texts.append(" ".join([prompt, *words, EOS]))
    input_ids = tokenizer(texts, return_tensors="pt").input_ids
    labels = input_ids.clone()
    labels[:, : LENGTH + 1] = -100
    return input_ids, labels


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: int = 1000) -> float:
    """Share of `size` fresh puzzles that a model solves at temperature 1."""
    puzzles = make_dataset(size, seed=0, held_out=True)
    inputs = tokenizer(list(puzzles["prompt"]), return_tensors="pt", return_token_type_ids=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=MAX_COMPLETION_LENGTH)
    completions = tokenizer.batch_decode(ids[:, LENGTH + 1 :], skip_special_tokens=True)
    return sum(correctness_reward(completions, puzzles["solution"])) / size


@torch.no_grad()
def mean_entropy(model: PreTrainedModel, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Mean entropy, in nats, of what a model says at each token of right solutions."""
    input_ids, labels = batch
    logps = model(input_ids).logits.log_softmax(-1)[:, :-1]
    return -(logps.exp() * logps).sum(-1)[labels[:, 1:] >= 0].mean().item()


def make_chains_model(architecture: str, kind: str, path: Path, seed: int = 0) -> None:
    """Train a model of a kind, and save it with its tokenizer."""
    tokenizer, rng = make_tokenizer(), random.Random(seed)
    torch.manual_seed(seed)
    is_half = kind.endswith("half")
    model = make(architecture, SIZES["student" if is_half or kind == "far" else "teacher"], tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    for step in range(1, 1 + (FAR_STEPS if kind == "far" else STEPS)):
        input_ids, labels = draw_batch(rng, tokenizer, kind)
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if is_half and step >= 100 and step % 5 == 0 and accuracy(model, tokenizer) > HALF:
            break
    share = accuracy(model, tokenizer)
    if is_half and not HALF < share < 0.35:
        raise RuntimeError(f"The student went past the half: {share:.1%}.")
    entropy = mean_entropy(model, draw_batch(rng, tokenizer, kind))
    size = f"{model.num_parameters():,} parameters"
    print(f"{architecture}, {kind}: {size}, {step} steps, {share:.1%}, {entropy:.2f} nats", flush=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


KINDS = ("strong", "flawed", "soft", "half", "soft_half", "far")


def main() -> None:
    """Make all models that aren't there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where to save them")
    parser.add_argument("--architectures", nargs="+", default=["gpt", "qwen3"], help="of these")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="these only")
    args = parser.parse_args()
    for architecture in args.architectures:
        for kind in args.kinds:
            if not (path := args.output_dir / f"chains_{architecture}_{kind}").exists():
                make_chains_model(architecture, kind, path)


if __name__ == "__main__":
    main()
