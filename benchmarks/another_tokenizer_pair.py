"""
What another tokenizer costs a step of a real model, and whether its scores are right.

    pip install gguf && python benchmarks/another_tokenizer_pair.py     # about ten minutes on one CPU thread

The student is SmolLM2-135M-Instruct, as in `language_model.py`. One teacher is the same checkpoint with the student's
tokenizer. The other has a tokenizer of SentencePiece's kind with byte fallback, trained here on the pages and the code
of this repository, a chat format of its own, and an embedding, tied to its LM head, that was retrained for it: each
row begins as the mean of the old ones of the token's text. It is padded to the size of the old one, so that both cost
the same by token.

The two cases run alternately in one process, two steps at a time, at a learning rate of 0, so that both write the same
completions. Times are of the processor. Each round adds a line to `rounds.jsonl` in the output folder, from which the
measurement goes on if it is interrupted. The check knows nothing of `trl_rlad/alignment.py`.
"""

import argparse
import json
import platform
import time
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
import transformers
from datasets import Dataset
from language_model import fetch_checkpoint
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trl_rlad import RLADConfig, RLADTrainer


ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "another_tokenizer_pair.json"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
)
QUESTIONS = ("What is a teacher?", "Name three fruits.", "Why is the sky blue? Keep it short.", "2 + 3 * 4 = ?")
ROUNDS, STEPS, COMPLETIONS, LENGTH = 3, 2, 4, 64
TRAINING = {"steps": 12, "rows": 4, "length": 128, "rate": 2e-3}  # of the embedding


def read_texts() -> list[str]:
    return [path.read_text() for path in sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("trl_rlad/**/*.py")])]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer of SentencePiece's kind with byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<pad>", "<eos>", *BYTES]
    tokenizer.train_from_iterator(read_texts(), trainers.BpeTrainer(vocab_size=8000, special_tokens=special))
    state = json.loads(tokenizer.to_str())  # where the bytes are ordinary tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )


def make_teacher(student: Path, path: Path):
    """Put a checkpoint under another tokenizer: its embedding by the old one's means, and some steps."""
    old, tokenizer = AutoTokenizer.from_pretrained(student), make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    weight = model.get_input_embeddings().weight
    rows = weight.detach().clone()
    for id, text in enumerate(tokenizer.batch_decode([[id] for id in range(len(tokenizer))])):
        is_end = id == tokenizer.eos_token_id
        ids = [old.eos_token_id] if is_end else old(text, add_special_tokens=False)["input_ids"]
        rows[id] = weight[ids].mean(0) if ids else weight.mean(0)
    with torch.no_grad():
        weight.copy_(rows)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.requires_grad_(False)
    weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=TRAINING["rate"])
    ids = torch.tensor(tokenizer("".join(read_texts()), verbose=False)["input_ids"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRAINING["steps"]):
        starts = torch.randint(len(ids) - TRAINING["length"], (TRAINING["rows"], 1), generator=generator)
        batch = ids[starts + torch.arange(TRAINING["length"])]
        loss = model(batch, labels=batch).loss
        loss.backward()
        print(f"embedding: {loss.item():.2f} nats per token", flush=True)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def reward(completion_ids, **kwargs) -> list[float]:
    """Share of even ids, which no two completions have in common."""
    return [sum(id % 2 == 0 for id in ids) / len(ids) for ids in completion_ids]


class Clock(TrainerCallback):
    """Keeps the seconds of the processor that each step takes."""

    def __init__(self):
        self.steps, self.scoring = [], []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.process_time()
        self.scoring.append(0.0)

    def on_step_end(self, *args, **kwargs):
        self.steps.append(time.process_time() - self.start)

    def time(self, function):
        """A function whose time counts as scoring."""

        def call(*args):
            start = time.process_time()
            outputs = function(*args)
            self.scoring[-1] += time.process_time() - start
            return outputs

        return call


def run(student: Path, teacher: Path, output_dir: Path) -> tuple[list, Clock]:
    """Two steps. Returns the batches with their rows, and the times."""
    args = RLADConfig(
        str(output_dir),
        max_steps=STEPS,
        learning_rate=0.0,
        per_device_train_batch_size=COMPLETIONS,
        num_generations=COMPLETIONS,
        max_completion_length=LENGTH,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS])
    clock = Clock()
    trainer = RLADTrainer(str(student), reward, args, data, teacher_model=str(teacher), callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    guide, scorer, batches = trainer.guide, trainer.teacher_scorer, []
    finish = guide.finish
    guide.finish = lambda *args: batches.append((finish(*args), args[2])) or batches[-1][0]
    guide.begin, scorer.score = clock.time(guide.begin), clock.time(scorer.score)
    trainer.train()
    return batches, clock


def to_bytes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[bytes]:
    """The text of each token, as its kind of tokenizer spells it."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if tokenizer.eos_token == "<eos>":
        return [
            bytes([BYTES.index(token)]) if token in BYTES else token.replace("▁", " ").encode() for token in tokens
        ]
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    return [bytes(byte_of[char] for char in token) for token in tokens]


@torch.no_grad()
def check(batches, student: Path, teacher: Path) -> dict:
    """The largest difference of a chunk's log-probability from plain passes of the teacher over its own text."""
    mine, theirs = AutoTokenizer.from_pretrained(student), AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    differences, sizes, rows_checked = [], [], 0
    for batch, rows in batches:
        for i, row in enumerate(rows):
            ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
            found, mask = (batch[name][i][: len(ids)] for name in ("teacher_per_token_logps", "teacher_mask"))
            if not mask.any():  # without an advantage
                continue
            assert mask.all()
            has_end = ids[-1] == mine.eos_token_id
            pieces = to_bytes(mine, ids[: len(ids) - has_end])
            own = theirs(b"".join(pieces).decode(), add_special_tokens=False)["input_ids"]
            ends, own_ends = (list(accumulate(map(len, each))) for each in (pieces, to_bytes(theirs, own)))
            assert ends[-1] == own_ends[-1]
            if has_end:  # of the turn, which is one of both
                ends, own_ends, own = [*ends, ends[-1] + 1], [*own_ends, ends[-1] + 1], [*own, theirs.eos_token_id]
            prompt = theirs(f"[user] {row['prompt'][0]['content']}\n", add_special_tokens=False)["input_ids"]
            logps = model(torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logps = logps.gather(1, torch.tensor(own)[:, None])[:, 0].tolist()
            start = own_start = 0
            for end in sorted(set(ends) & set(own_ends)):
                stop, own_stop = ends.index(end) + 1, own_ends.index(end) + 1
                differences.append(abs(found[start:stop].double().sum().item() - sum(logps[own_start:own_stop])))
                sizes.append((stop - start, own_stop - own_start))
                start, own_start = stop, own_stop
            assert (start, own_start) == (len(ids), len(own))
            rows_checked += 1
    return {
        "rows_checked": rows_checked,
        "chunks": len(sizes),
        "single_tokens_of_both": sum(size == (1, 1) for size in sizes),
        "teacher_tokens_per_student_token": round(sum(b for _, b in sizes) / sum(a for a, _ in sizes), 3),
        "largest_difference_in_nats": max(differences),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "another_tokenizer_pair")
    folder = parser.parse_args().output_dir
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"same": fetch_checkpoint(folder / "student"), "other": folder / "teacher"}
    if not paths["other"].exists():
        make_teacher(paths["same"], paths["other"])
    log = folder / "rounds.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    while len(lines) < 2 * ROUNDS:
        name = ("other", "same")[len(lines) % 2]
        batches, clock = run(paths["same"], paths[name], folder / "run")
        tokens = [int(batch["completion_mask"].sum()) for batch, _ in batches]
        lines.append({"teacher": name, "steps": clock.steps, "scoring": clock.scoring, "tokens": tokens})
        if name == "other":
            lines[-1]["check"] = check(batches, paths["same"], paths["other"])
        with log.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    assert all(line["tokens"] == lines[0]["tokens"] for line in lines)
    result: dict = {"machine": platform.machine(), "torch": torch.__version__, "completion_tokens": lines[0]["tokens"]}
    for name in ("same", "other"):
        mine = [line for line in lines if line["teacher"] == name]
        for key in ("steps", "scoring"):
            values = [seconds for line in mine for seconds in line[key]]
            result.setdefault(name, {})[f"{key}_in_seconds"] = [round(each, 2) for each in values]
            result[name][f"median_of_{key}"] = round(median(values), 2)
    steps = [result[name]["steps_in_seconds"] for name in ("other", "same")]
    ratios = [other / same for other, same in zip(*steps, strict=True)]
    result["more_time_by_step"] = round(median(ratios) - 1, 3)
    result["check"] = lines[0]["check"]
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
