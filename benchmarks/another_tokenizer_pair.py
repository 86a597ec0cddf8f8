"""
What another tokenizer costs a step, and whether its scores are right, with models of the size of SmolLM2-135M.

    python benchmarks/another_tokenizer_pair.py

The weights are random, as the hub can't be reached from where this was written; the tokenizers are trained here, on
the pages and the code of this repository. Both teachers have the same weights: one has the student's tokenizer
(byte-level BPE), the other SentencePiece's kind with byte fallback. Times are of the processor, two steps each.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_rlad import RLADConfig, RLADTrainer


ROOT = Path(__file__).parents[1]
VOCABULARY, BYTES = 49152, [f"<0x{byte:02X}>" for byte in range(256)]


def make_tokenizer(is_byte_level: bool) -> PreTrainedTokenizerFast:
    """Train a tokenizer of one of the two kinds."""
    texts = [path.read_text() for path in sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("trl_rlad/**/*.py")])]
    tokenizer = Tokenizer(models.BPE() if is_byte_level else models.BPE(unk_token="<unk>", byte_fallback=True))
    kwargs = {"special_tokens": ["<unk>", "<pad>", "<eos>"] + ([] if is_byte_level else BYTES), "vocab_size": 4000}
    if is_byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        kwargs["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**kwargs))
    state = json.loads(tokenizer.to_str())  # where the bytes are ordinary tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """Make a model of the size of SmolLM2-135M, with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=1,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def reward(completion_ids, **kwargs) -> list[float]:
    """Share of even ids, which no two completions have in common."""
    return [sum(id % 2 == 0 for id in ids) / len(ids) for ids in completion_ids]


def run(student: Path, teacher: Path, output_dir: Path):
    """Two steps. Returns the batches, seconds of the processor for each step, and those of scoring."""
    args = RLADConfig(
        str(output_dir),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=64,
        generation_kwargs={"suppress_tokens": [0, 1, *range(4000, VOCABULARY)]},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    text = (ROOT / "docs" / "index.md").read_text()
    data = Dataset.from_list([{"prompt": text[300 * i : 300 * (i + 1)]} for i in range(4)])
    trainer = RLADTrainer(str(student), reward, args, data, teacher_model=str(teacher))
    batches, finish, times, score = [], trainer.guide.finish, [], trainer.teacher_scorer.score
    begin = trainer.guide.begin

    def timed(function):
        def call(*args):
            start = time.process_time()
            outputs = function(*args)
            times.append(time.process_time() - start)
            return outputs

        return call

    trainer.guide.finish = lambda *args: batches.append((finish(*args), args[2])) or batches[-1][0]
    trainer.teacher_scorer.score, trainer.guide.begin = timed(score), timed(begin)
    start = time.process_time()
    trainer.train()
    return batches, (time.process_time() - start) / 2, sum(times) / 2


@torch.no_grad()
def check(batches, student: Path, teacher: Path) -> float:
    """The largest difference of a chunk's log-probability from a plain pass of the teacher over the text, in nats."""
    mine = PreTrainedTokenizerFast.from_pretrained(student)
    theirs, model = PreTrainedTokenizerFast.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    worst = 0.0
    for batch, rows in batches:
        for i, row in enumerate(rows):
            ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
            mask, first = batch["teacher_mask"][i][: len(ids)], batch["teacher_first"][i][: len(ids)]
            if not mask.all():  # with bytes that are no UTF-8, of which a plain pass tells less
                continue
            has_end = ids[-1] == mine.eos_token_id
            own = theirs(mine.decode(ids[: len(ids) - has_end]))["input_ids"] + [theirs.eos_token_id] * has_end
            prompt = theirs(row["prompt"])["input_ids"]
            logps = model(torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            total = logps.gather(1, torch.tensor(own)[:, None]).sum().item()
            assert torch.equal(first.unique(), first.unique_consecutive())
            worst = max(worst, abs(batch["teacher_per_token_logps"][i][: len(ids)].sum().item() - total))
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/another_tokenizer_pair"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizers = {"same": make_tokenizer(True), "other": make_tokenizer(False)}
    for name, seed, tokenizer in (("student", 0, "same"), ("same", 1, "same"), ("other", 1, "other")):
        make_model(seed).save_pretrained(args.output_dir / name)
        tokenizers[tokenizer].save_pretrained(args.output_dir / name)
    result: dict = {"machine": platform.machine(), "torch": torch.__version__}
    for name in ("same", "other"):
        parts = args.output_dir / "student", args.output_dir / name
        batches, seconds, scoring = run(*parts, args.output_dir / "run")
        result[name] = {"seconds_per_step": round(seconds, 2), "of_them_scoring": round(scoring, 3)}
        if name == "other":
            batch = batches[0][0]
            result[name]["largest_difference_in_nats"] = check(batches, *parts)
            result[name]["share_scored"] = (batch["teacher_mask"].sum() / batch["completion_mask"].sum()).item()
    path = ROOT / "benchmarks" / "results" / "another_tokenizer_pair.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
