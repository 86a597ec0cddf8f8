"""
Training with a teacher that has another tokenizer, against plain passes of it over the text.

`renamed` is a teacher whose words have other ids, and its rows with them: chunks are single tokens, and all must be as
with the teacher that it was made of. Others read bytes where the student has words, or the other way round.
"""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from teacher_server import TeacherServer
from test_alignment import make_tokenizer
from test_loss import make_batch, make_logps, reference_loss
from test_routing import assert_scores, make_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rlad import RLADTrainer
from trl_rlad.alignment import Pieces
from trl_rlad.teachers import LocalTeacher, by_text


PLAIN = {"generation_kwargs": {"suppress_tokens": [0, 3]}}  # <pad> and <unk> are no text


@pytest.fixture(scope="module")
def renamed(teacher_path, tmp_path_factory):
    return tiny.save_renamed(tmp_path_factory.mktemp("renamed"), teacher_path)


def train(student, teacher, folder, dataset=None, reward=tiny.reward, **kwargs):
    args = tiny.make_config(folder, **{"per_device_train_batch_size": 8, "max_steps": 2} | kwargs)
    trainer = RLADTrainer(student, reward, args, dataset or tiny.make_dataset(), teacher_model=teacher)
    trainer.seen = tiny.watch_batches(trainer)
    trainer.train()
    trainer.logs = [log for log in trainer.state.log_history if "loss" in log]
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2},
        {"teacher_kl_coef": 0.3, "teacher_kl_on": "all"},
        {"teacher_offload": "cpu", "importance_sampling_level": "sequence"},
        {"teacher_credit": True, "teacher_tokens_per_batch": 20},
    ],
)
def test_with_one_token_for_one_all_is_as_with_shared_ids(settings, student_path, teacher_path, renamed, tmp_path):
    expected = train(student_path, teacher_path, tmp_path, **PLAIN, **settings)
    found = train(student_path, renamed, tmp_path, **PLAIN, **settings)
    assert "teacher_first" not in expected.seen[0][0] and "teacher_first" in found.seen[0][0]
    for log, other in zip(expected.logs, found.logs, strict=True):
        names = [name for name in log if name.startswith(("teacher/", "clip_ratio", "loss", "grad"))]
        for name in (name for name in names if not name.endswith("time")):
            assert other[name] == pytest.approx(log[name], rel=1e-4, abs=1e-5, nan_ok=True), name
    assert found.logs[0]["teacher/unaligned"] == 0.0


def test_special_tokens_are_left_out_and_counted(student_path, renamed, tmp_path):
    trainer = train(student_path, renamed, tmp_path)
    for (batch, _), log in zip(trainer.seen, trainer.logs, strict=True):
        rows = batch["teacher_mask"].any(1)  # that were wanted
        is_token = batch["completion_mask"][rows].bool()
        is_special = torch.isin(batch["completion_ids"][rows], torch.tensor([0, 3])) & is_token
        assert torch.equal(batch["teacher_mask"][rows], is_token & ~is_special) and is_special.any()
        assert not batch["teacher_per_token_logps"][rows][is_special].any()
        assert log["teacher/unaligned"] == pytest.approx((is_special.sum() / is_token.sum()).item())


@pytest.mark.parametrize("reward", [tiny.reward, tiny.async_reward])
def test_teachers_of_different_tokenizers_score_one_batch(reward, student_path, teacher_path, renamed, tmp_path):
    wide = tiny.save_model(tmp_path / "wide", seed=2, hidden_size=32)
    teachers, same = {"renamed": renamed, "wide": wide}, {"renamed": teacher_path, "wide": wide}
    data = make_dataset(["renamed", "wide"], ["w9 w8 w7", "w1", None])
    named = {"teacher_kl": "forward", "teacher_kl_coef": 1.0, "teacher_top_k": 3}
    trainer = train(student_path, teachers, tmp_path / "out", data, reward, **named)
    for batch, _ in trainer.seen:  # as the ids of both are the student's again
        places = torch.arange(batch["teacher_first"].size(1)).expand_as(batch["teacher_first"])
        assert (batch["teacher_first"] == places)[batch["teacher_mask"]].all()
        del batch["teacher_top_ids"]  # <pad> and <unk> are named by one of the two alone
    asked = assert_scores(
        trainer, lambda row: same[row["teacher_id"]], lambda row: row["teacher_prompt"] or row["prompt"]
    )
    assert asked == set(same.values())


def test_a_served_teacher_is_sent_its_own_ids(student_path, teacher_path, renamed, tmp_path):
    with TeacherServer(renamed) as server:
        trainer = train(student_path, None, tmp_path, **PLAIN, teacher_server_urls=server.url)
        sent = server.requests
    assert_scores(trainer, lambda row: teacher_path)
    tokenizer = AutoTokenizer.from_pretrained(renamed)
    prompts = {row["prompt"] for _, rows in trainer.seen for row in rows}
    assert sent and all(tokenizer.decode(body["prompt"]).startswith(tuple(prompts)) for body in sent)


def test_an_adapter_on_another_base(student_path, teacher_path, renamed, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(renamed), config).save_pretrained(tmp_path / "adapter")
    same = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(teacher_path), tmp_path / "adapter")
    same.merge_and_unload().save_pretrained(tmp_path / "same")
    trainer = train(student_path, str(tmp_path / "adapter"), tmp_path / "out", **PLAIN)
    assert assert_scores(trainer, lambda row: tmp_path / "same")


@torch.no_grad()
def plain_log_probs(model, prompt, completion):
    """Those of the whole vocabulary at each token of a completion, `(T, V)`, in float64."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


TEACHERS_CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{{ '[bot]' if add_generation_prompt }}"
)


def test_scores_of_bytes_for_words(student_path, tmp_path, monkeypatch):
    shared, run_on_cache = [], LocalTeacher._run_on_cache
    monkeypatch.setattr(
        LocalTeacher, "_run_on_cache", lambda self, *args: shared.append(1) or run_on_cache(self, *args)
    )
    tokenizer = tiny.make_chat_tokenizer()
    teacher = tiny.save_model(tmp_path / "bytes", 3, tokenizer, vocab_size=len(tokenizer), scale=0.1)
    data = Dataset.from_list([{"prompt": " ".join(["w1 w2 w3"] * (6 + i % 2))} for i in range(16)])
    made = len(shared)
    trainer = train(student_path, teacher, tmp_path / "out", data, max_completion_length=3, **PLAIN)
    assert len(shared) > made  # completions of one prompt run on one copy of it
    model, words = AutoModelForCausalLM.from_pretrained(teacher).double(), tiny.make_tokenizer()
    seen = 0
    for batch, rows in trainer.seen:
        for i, row in enumerate(rows):
            mask = batch["teacher_mask"][i]
            ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
            if not mask.any():
                continue
            texts = ["" if id == 1 else f" {words.convert_ids_to_tokens(id)}" for id in ids]
            own = [tokenizer(text)["input_ids"] if text else [tokenizer.eos_token_id] for text in texts]
            logps = plain_log_probs(model, tokenizer(row["prompt"])["input_ids"], sum(own, []))
            logps = logps.gather(1, torch.tensor(sum(own, []))[:, None])[:, 0]
            expected = torch.stack([part.sum() for part in logps.split(list(map(len, own)))])
            assert mask[: len(ids)].all()
            found = batch["teacher_per_token_logps"][i, : len(ids)]
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
            seen += len(ids)
    assert seen > 20


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A student of bytes and a teacher that has merged them, each with its own chat format and end of turn."""
    folder = tmp_path_factory.mktemp("letters")
    student, teacher = tiny.make_chat_tokenizer(), make_tokenizer("bytes")
    teacher.chat_template = TEACHERS_CHAT
    paths = [
        tiny.save_model(folder / str(seed), seed, each, vocab_size=len(each) + 3, scale=0.1)
        for seed, each in enumerate((student, teacher))
    ]
    teacher.chat_template = None
    allowed = {student.convert_tokens_to_ids(each) for each in [*"eoatnr", "Ġ", "<|im_end|>"]}
    return *paths, sorted(set(range(len(student) + 3)) - allowed)


def test_scores_of_chunks_that_are_several_tokens_of_the_student(letters, tmp_path):
    student, teacher, suppressed = letters
    prompt = [{"role": "user", "content": "2+2?"}]
    data = Dataset.from_list([{"prompt": prompt}] * 8)
    named = {"teacher_kl": "forward", "teacher_kl_coef": 1.0, "teacher_top_k": 400, "num_iterations": 2}
    trainer = train(student, teacher, tmp_path, data, generation_kwargs={"suppress_tokens": suppressed}, **named)
    tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher).double()
    mine = AutoTokenizer.from_pretrained(student)
    own_prompt = tokenizer("[user] 2+2?\n[bot]")["input_ids"]
    (batch, _), merged = trainer.seen[0], 0
    for i in range(8):
        ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
        has_end = ids[-1] == mine.eos_token_id
        own = tokenizer(mine.decode(ids[:-1] if has_end else ids))["input_ids"]
        own += [tokenizer.eos_token_id] * has_end
        log_probs, place = plain_log_probs(model, own_prompt, own), 0
        for number, id in enumerate(
            own
        ):  # each of the student's tokens is a byte, so each of the teacher's is a chunk
            length = 1 if id == tokenizer.eos_token_id else len(tokenizer.decode([id]))
            chunk = slice(place, place + length)
            found = batch["teacher_per_token_logps"][i, chunk]
            assert found.tolist() == pytest.approx([log_probs[number, id].item() / length] * length, abs=1e-5)
            assert (batch["teacher_first"][i, chunk] == place).all()
            names, logps = (batch[f"teacher_top_{each}"][i][chunk] for each in ("ids", "logps"))
            given = logps[0].isfinite()
            texts = [mine.convert_ids_to_tokens(id) for id in names[0][given].tolist()]
            ends = {mine.eos_token: tokenizer.eos_token}
            expected = tokenizer.convert_tokens_to_ids([ends.get(text, text) for text in texts])
            assert given.sum() > 100 and not logps[1:].isfinite().any()
            torch.testing.assert_close(logps[0][given].double(), log_probs[number, expected], rtol=0, atol=1e-4)
            place, merged = place + length, merged + (length > 1)
        assert place == len(ids)
    assert merged > 3
    assert trainer.logs[0]["teacher/unaligned"] == 0.0 and 0.05 < trainer.logs[0]["teacher/named_mass"] < 0.9


def test_a_batch_of_which_the_teacher_can_score_too_little_ends_training(letters, tmp_path):
    student, teacher, _ = letters
    no_utf8 = {id for id, piece in enumerate(Pieces(tiny.make_chat_tokenizer()).by_id) if piece in (b"\x80", b"\x81")}
    bad = {"generation_kwargs": {"suppress_tokens": sorted(set(range(265)) - no_utf8)}}
    data = Dataset.from_list([{"prompt": "The teacher"}] * 8)
    with pytest.raises(ValueError, match="no score for 100% of the student's tokens in a generation batch"):
        train(student, teacher, tmp_path, data, **bad, teacher_kl_coef=1.0, teacher_kl_on="all")
    assert by_text.MAX_UNALIGNED == 0.5


def test_images_are_not_for_a_teacher_with_another_tokenizer(teacher_path, tmp_path):
    student = tiny.save_vision_model(tmp_path / "student", 0)
    args = tiny.make_config(tmp_path / "out")
    with pytest.raises(ValueError, match="can't read the images of this data: its tokenizer isn't the student's"):
        RLADTrainer(student, tiny.reward, args, tiny.make_image_dataset([1]), teacher_model=teacher_path)


CHUNKS = torch.tensor(
    [[0, 0, 2, 2, 2, 5, 6], [0] * 7, [0] * 7, [0, 1, 1, 3, 4, 5, 6], [0, 1, 2, 3, 3, 3, 6], [0, 0, 2, 3, 4, 5, 6]]
)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_loss_and_its_gradient_are_those_of_the_definition(level, make_trainer):
    batch = make_batch(teacher_first=CHUNKS, rollout=torch.arange(6))
    batch["teacher_mask"][0, 6] = False
    logps, old, defined = make_logps(batch), batch["old_per_token_logps"].double(), {**batch}
    defined["teacher_per_token_logps"] = means = batch["teacher_per_token_logps"].double()
    first = batch["teacher_per_token_logps"].clone()
    for i in range(len(means)):
        members = {}
        for t in range(7):
            if batch["teacher_mask"][i, t]:
                members.setdefault(CHUNKS[i, t].item(), []).append(t)
        for places in members.values():
            total = first[i, places[0]].double() * len(places)  # of the chunk
            batch["teacher_per_token_logps"][i, places] = first[i, places[0]]
            gap = (total - sum(old[i, t] for t in places)) / len(places)
            for t in places:
                means[i, t] = old[i, t] + gap
    trainer = make_trainer(logps, alpha=0.5, importance_sampling_level=level)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    expected, gradient = reference_loss(logps, defined, 0.5, 1.0, level=level)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(logps.grad.double(), gradient, rtol=0, atol=1e-6)
