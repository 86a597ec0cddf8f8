"""
Two tokenizers on one text: five kinds of them, trained here on this repository's own pages, on text of any kind.

What is expected is worked out with sets and sums of Python's own.
"""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import PartialState
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trl_rlad.alignment import Alignment, Pieces, align, join_pieces, spread
from trl_rlad.scoring.rows import make_row
from trl_rlad.teachers import TextContract, TokenScores


SPECIAL = ["<unk>", "<pad>", "<eos>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SP_DECODERS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


@cache
def make_tokenizer(kind):
    """
    A tokenizer of a kind, and its end of turn:

    - `bytes`: byte-level BPE, as GPT-2's, Llama 3's and Qwen's
    - `spm`: BPE on characters with byte fallback, and a space before each text, as Llama 2's and Mistral's
    - `gemma`: the same without that space
    - `unigram`: SentencePiece's other kind, without byte fallback: what it doesn't know is `<unk>`
    - `wordpiece`: in lower case, as BERT's
    - `characters`
    - `nfc`: as `bytes`, of text whose combining marks it joins with their letters first, as Qwen's
    - `runs`: as `gemma`, with runs of spaces that are added tokens, as Gemma's own
    """
    if kind == "nfc":
        return edit_tokenizer("bytes", "<|im_end|>", lambda state: state.update(normalizer={"type": "NFC"}))
    if kind == "runs":
        return edit_tokenizer("gemma", "<|im_end|>", add_runs)
    pages = [path.read_text() for path in sorted((Path(__file__).parents[1] / "docs").glob("t*.md"))]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind in ("spm", "gemma"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        replace = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if kind == "spm" else replace
        tokenizer.decoder = decoders.Sequence(SP_DECODERS[: 4 if kind == "spm" else 3])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=[^▁])(?=▁)"), "isolated")
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *BYTES])
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>")
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("(?m)."), "isolated"), decoders.Fuse()
        trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL)
    tokenizer.train_from_iterator(pages, trainer)
    state = json.loads(tokenizer.to_str())  # where the bytes are ordinary tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    end = SPECIAL[3] if kind in ("bytes", "gemma") else SPECIAL[2]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token=end)


def edit_tokenizer(kind, end, edit):
    state = json.loads(make_tokenizer(kind).backend_tokenizer.to_str())
    edit(state)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token=end)


def add_runs(state):
    vocabulary, added = state["model"]["vocab"], state["added_tokens"]
    for run in ("▁▁", "▁▁▁"):
        state_of_token = dict(added[0], id=vocabulary.setdefault(run, len(vocabulary)), content=run, special=False)
        added.append(state_of_token)


KINDS = ["bytes", "spm", "gemma", "unigram", "wordpiece", "characters", "nfc", "runs"]
LOSSLESS = {"bytes", "spm", "gemma", "runs"}


@cache
def make_contract(student, teacher):
    PartialState()
    student, teacher = make_tokenizer(student), make_tokenizer(teacher)
    ends = {teacher.eos_token_id}
    model = SimpleNamespace(name="Tutor", tokenizer=teacher, eos_token_ids=ends, vocab_size=len(teacher))
    return TextContract(student, model, [student.eos_token_id])


WORDS = [
    "the teacher", " teacher", "The", "  ", "\n\n", "\t", " 3.14", "1234", "def f(x):\n    return x", "naïve", "é",
    "e\u0301", "日本語", "한국", "🙂", "👩‍👩‍👧", "ß", "½", "<|im_end|>", "<eos>", "\u200b", "\r\n", "don't",
    "'s", "▁", "\0",
]  # fmt: skip
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=8).map("".join)
pairs = st.sampled_from([(student, teacher) for student in KINDS for teacher in KINDS if student != teacher])


@st.composite
def completions(draw):
    """The kinds of two tokenizers, and tokens of the first: those of a text, some of them any others, and an end."""
    student, teacher = draw(pairs)
    tokenizer = make_tokenizer(student)
    ids = tokenizer(draw(texts), add_special_tokens=False)["input_ids"]
    for place in draw(st.lists(st.integers(0, len(ids)), max_size=3)):
        ids.insert(place, draw(st.integers(0, len(tokenizer) - 1)))  # a student may write what no text is encoded as
    ids += [tokenizer.eos_token_id] * draw(st.integers(not ids, 1))
    return student, teacher, ids, draw(st.booleans())


def chunks_of(numbers, size):
    return [[place for place, number in enumerate(numbers.tolist()) if number == chunk] for chunk in range(size)]


@settings(max_examples=150, deadline=None)
@given(completions())
def test_chunks_are_the_smallest_pieces_of_the_same_text(case):
    student, teacher, ids, is_chat = case
    contract = make_contract(student, teacher)
    own, alignment = contract.align(ids, is_chat)
    assert len(alignment.student) == len(ids) and len(alignment.teacher) == len(own)
    own_chunks = chunks_of(alignment.teacher, alignment.size)
    first_is_a_space = False
    for mine, theirs in zip(chunks_of(alignment.student, alignment.size), own_chunks, strict=True):
        # Neither is empty, and each is a stretch of tokens, but for those that are no text
        assert theirs == list(range(theirs[0], theirs[-1] + 1))
        assert mine == [place for place in range(mine[0], mine[-1] + 1) if alignment.known[place]]
        pieces = [contract.student.by_id[ids[place]] for place in mine]
        others = [contract.pieces.by_id[own[place]] for place in theirs]
        assert not {ids[place] for place in mine} & contract.student.special_ids - {
            make_tokenizer(student).eos_token_id
        }
        if mine[-1] == len(ids) - 1 and ids[-1] == make_tokenizer(student).eos_token_id:
            assert own[theirs[-1]] == make_tokenizer(teacher).eos_token_id
            pieces, others = pieces[:-1], others[:-1]
        text, other = b"".join(pieces), b"".join(others)
        if mine[0] == 0 and is_chat:  # a space that is one of the chat format's
            text = text.removeprefix(b" ") if contract.student.adds_space else text
            other = other.removeprefix(b" ") if contract.pieces.adds_space else other
            first_is_a_space = True
        assert text == other
        # No two of its tokens end at the same place of the text before its end
        ends = [{len(b"".join(part[: n + 1])) for n in range(len(part) - 1)} for part in (pieces, others)]
        if not (mine[0] == 0 and first_is_a_space):
            assert not (ends[0] & ends[1]) - {0, len(text)}
    assert alignment.known.tolist() == [number < alignment.size for number in alignment.student.tolist()]


@settings(max_examples=100, deadline=None)
@given(st.permutations(sorted(LOSSLESS)), texts, st.booleans())
def test_of_text_that_both_keep_nothing_is_left_out(pair, text, is_chat):
    student, teacher, *_ = pair
    if any(each in text for each in [*SPECIAL, "▁"]):
        return
    tokenizer = make_tokenizer(student)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    _, alignment = make_contract(student, teacher).align([*ids, tokenizer.eos_token_id], is_chat)
    left_out = alignment.known.logical_not().nonzero().flatten().tolist()
    if teacher == "spm" != student and not (is_chat or text.startswith(" ")):
        assert left_out == list(range(len(left_out)))  # before which this teacher reads a space
        assert len(left_out) >= (len(ids) > 0)
    else:
        assert not left_out


def boundaries(tokenizer, ids):
    """Where tokens end in what the tokenizer itself decodes them to, in bytes; `None` within a character."""
    texts = [tokenizer.decode(ids[: n + 1], clean_up_tokenization_spaces=False) for n in range(len(ids))]
    return [None if "\ufffd" in text else len(text.encode()) for text in texts]


@settings(max_examples=100, deadline=None)
@given(st.permutations(["bytes", "gemma", "runs", "nfc"]), texts, st.data())
def test_chunks_end_where_the_texts_that_both_tokenizers_decode_are_equally_long(pair, text, data):
    # A reference that knows of tokenizers only what they decode: not of pieces, offsets or characters cut in two
    student, teacher = (make_tokenizer(kind) for kind in pair[:2])
    ids = student(text, add_special_tokens=False)["input_ids"]
    if "runs" in pair[0] and data.draw(st.booleans()):
        ids.insert(data.draw(st.integers(0, len(ids))), student.convert_tokens_to_ids("▁▁"))
    text = student.decode(ids)
    own = teacher(text, add_special_tokens=False)["input_ids"]
    if any(each in text for each in [*SPECIAL, "\ufffd"]) or teacher.decode(own) != text:
        return
    read, alignment = make_contract(*pair[:2]).align(ids, True)
    assert read.tolist() == own and alignment.known.all()
    ends, own_ends = boundaries(student, ids), boundaries(teacher, own)
    for end in {*ends} & {*own_ends} - {None}:
        # Behind the last token of both that ends there, and nowhere before
        places = [len(each) - each[::-1].index(end) - 1 for each in (ends, own_ends)]
        numbers = [n[place].item() for n, place in zip((alignment.student, alignment.teacher), places, strict=True)]
        assert numbers[0] == numbers[1]
        for found, place in zip((alignment.student, alignment.teacher), places, strict=True):
            assert place == len(found) - 1 or found[place + 1] == numbers[0] + 1
    common = {*ends} & {*own_ends} - {None}
    for number in range(alignment.size):  # a chunk ends at one of them, or within a character
        last = (alignment.student == number).nonzero().max()
        assert ends[last] in common or ends[last] is None


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(LOSSLESS)), texts, st.integers(0, 99))
def test_with_a_tokenizer_of_the_same_kind_scores_are_the_teachers_to_the_last_bit(kind, text, seed):
    ids = make_tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
    if any(each in text for each in [*SPECIAL, "▁"]):
        return
    own, alignment = make_contract(kind, kind).align([*ids, make_tokenizer(kind).eos_token_id], True)
    places = list(range(len(ids) + 1))
    assert own.tolist() == [*ids, own[-1]] and alignment.student.tolist() == alignment.teacher.tolist() == places
    logps, old = (-9 * torch.rand(2, len(places), generator=torch.Generator().manual_seed(seed))).unbind()
    parts = alignment.to_student(logps), old, alignment.first, alignment.known
    assert torch.equal(spread(*(part[None] for part in parts))[0], logps)


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("teacher", KINDS[1:])
def test_no_tokens_have_no_chunk_and_an_end_alone_is_one(teacher, is_chat):
    contract = make_contract("bytes", teacher)
    own, alignment = contract.align([], is_chat)
    assert len(own) == len(alignment.student) == len(alignment.teacher) == alignment.size == 0
    own, alignment = contract.align([make_tokenizer("bytes").eos_token_id], is_chat)
    assert own.tolist() == [make_tokenizer(teacher).eos_token_id] and alignment.known.tolist() == [True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_is_what_its_token_adds_to_a_text(kind):
    tokenizer = make_tokenizer(kind)
    pieces = Pieces(tokenizer)
    for text in ("the teacher scores 12 tokens", " a word", "it is so"):
        ids, _ = pieces.encode(text)
        joined = b"".join(pieces.read(ids)[0]).decode()
        assert joined.lstrip() == text.lstrip()
    assert pieces.adds_space == (kind in ("spm", "unigram", "wordpiece"))
    assert pieces.read([10**6]) == ([b""], [False]) and pieces.read([2]) == ([b"<eos>"], [False])


def test_a_character_that_both_split_alike_is_split():
    # Two byte-level tokenizers, one of which has merged the first two bytes of three
    contract = make_contract("bytes", "spm")
    ids = make_tokenizer("bytes")("語", add_special_tokens=False)["input_ids"]
    own, alignment = contract.align(ids, True)
    assert [contract.pieces.by_id[id] for id in own] == [b" ", b"\xe8", b"\xaa", b"\x9e"]
    assert len(ids) == 3 and alignment.student.tolist() == [0, 1, 2] and alignment.teacher.tolist() == [0, 0, 1, 2]


def test_what_is_no_utf_8_is_left_out_and_spoils_nothing_beside_it():
    contract, tokenizer = make_contract("bytes", "characters"), make_tokenizer("bytes")
    ids = [*tokenizer("so", add_special_tokens=False)["input_ids"], *tokenizer("語")["input_ids"][:-1]]
    _, alignment = contract.align(ids, True)
    assert alignment.known.tolist() == [True] * (len(ids) - 2) + [False] * 2


def test_the_space_before_a_text_is_the_chat_formats_and_part_of_a_text_prompts_answer():
    contract, tokenizer, teacher = make_contract("spm", "bytes"), make_tokenizer("spm"), make_tokenizer("bytes")
    ids = tokenizer("The teacher")["input_ids"]
    for is_chat, text in ((True, "The teacher"), (False, " The teacher")):
        own, alignment = contract.align(ids, is_chat)
        assert teacher.decode(own) == text and alignment.known.all()


def test_a_space_with_which_a_chat_answer_begins_is_more_than_the_one_that_a_tokenizer_adds():
    contract, tokenizer, teacher = make_contract("bytes", "spm"), make_tokenizer("bytes"), make_tokenizer("spm")
    for is_chat, text in ((True, " the"), (False, "the")):
        own, alignment = contract.align(tokenizer(" the")["input_ids"], is_chat)
        assert own.tolist() == teacher(text)["input_ids"] and alignment.known.all()
    assert len(teacher(" the")["input_ids"]) == len(teacher("the")["input_ids"]) + 1


def test_behind_what_a_tokenizer_changes_chunks_go_on():
    contract, tokenizer = make_contract("bytes", "wordpiece"), make_tokenizer("bytes")
    # It writes without accents, in lower case, and one space for two
    ids = tokenizer("ññ The teacher  is The teacher")["input_ids"]
    words = [
        tokenizer.decode(each) for each, known in zip(ids, contract.align(ids, True)[1].known, strict=True) if known
    ]
    assert "".join(words) == " teacher teacher"
    # Of the spaces at the end it reads nothing, so its end of the turn isn't one behind them
    ids = [*tokenizer("so  ")["input_ids"], tokenizer.eos_token_id]
    own, alignment = contract.align(ids, True)
    assert own[-1] == make_tokenizer("wordpiece").eos_token_id and len(own) == 2
    assert not alignment.known[-1] and tokenizer.decode(torch.tensor(ids)[alignment.known]) == "so"


def test_ends_of_turn_are_each_others():
    contract = make_contract("bytes", "unigram")
    student, teacher = make_tokenizer("bytes"), make_tokenizer("unigram")
    assert (student.eos_token, teacher.eos_token) == ("<|im_end|>", "<eos>")
    ids = student("to")["input_ids"]
    own, alignment = contract.align([*ids, student.eos_token_id], True)
    assert own[-1] == teacher.eos_token_id and alignment.known.all()
    # In the middle of a completion, or written out, it is none
    own, alignment = contract.align([student.eos_token_id, *ids], True)
    assert teacher.eos_token_id not in own.tolist() and not alignment.known[0]
    own, alignment = contract.align([*ids, student.convert_tokens_to_ids("<eos>")], True)
    assert own[-1] == teacher.eos_token_id and not alignment.known[-1]
    assert contract.student_ids[teacher.eos_token_id] == student.eos_token_id


@pytest.mark.parametrize(
    ("template", "end"), [(None, "<eos>"), ("<eos>{{ messages[1].content }}<|im_end|><pad>", "<|im_end|>")]
)
def test_the_end_of_turn_is_that_of_the_chat_template(template, end):
    teacher = make_tokenizer("unigram")
    ids = {teacher.convert_tokens_to_ids(each) for each in ("<eos>", "<|im_end|>")}
    model = SimpleNamespace(name="Tutor", tokenizer=teacher, eos_token_ids=ids, vocab_size=len(teacher))
    teacher.chat_template = template
    try:
        assert TextContract(make_tokenizer("bytes"), model, [2]).end == teacher.convert_tokens_to_ids(end)
    finally:
        teacher.chat_template = None


CHAT = (
    "{% for tool in tools or [] %}({{ tool.function.name }}){% endfor %}{{ mood }}{{ messages[0].content }}"
    "{{ '>' if add_generation_prompt }}"
)


def test_a_prompt_is_read_as_the_teachers_own_tokenizer_and_chat_template_have_it():
    def add(a: int):
        """
        Add.

        Args:
            a: A number.
        """

    teacher = edit_tokenizer("characters", "<eos>", lambda state: None)
    begin = [("<pad>", teacher.pad_token_id)]
    teacher.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=begin)
    teacher.chat_template = CHAT
    model = SimpleNamespace(name="Tutor", tokenizer=teacher, eos_token_ids={2}, vocab_size=len(teacher))
    contract = TextContract(make_tokenizer("bytes"), model, [3], [add], {"mood": "-"})
    assert teacher.decode(contract.read_prompt("a b")) == "<pad>a b"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert teacher.decode(contract.read_prompt([{"role": "user", "content": parts}])) == "(add)-a b>"


def test_a_student_may_have_several_ends_of_turn():
    model = SimpleNamespace(name="Tutor", tokenizer=make_tokenizer("unigram"), eos_token_ids={2}, vocab_size=500)
    contract, ids = TextContract(make_tokenizer("bytes"), model, [2, 3]), make_tokenizer("bytes")("to")["input_ids"]
    for end in (2, 3):
        own, alignment = contract.align([*ids, end], True)
        assert own[-1] == 2 and alignment.known.all()


@pytest.mark.parametrize(
    ("teacher", "columns", "message"),
    [
        (
            "wordpiece",
            {"prompt": ["THE TEACHER IS"]},
            "no score for 100% of the student's tokens in the dataset's prompts",
        ),
        ("wordpiece", {"prompt": ["so"], "teacher_prompt": ["THE TEACHER IS"]}, "in the dataset's prompts"),
        (
            "characters",
            {"prompt": ["a"], "teacher_prompt": [[{"role": "user", "content": "a"}]]},
            "template can't render",
        ),
        ("characters", {"prompt": ["the teacher"]}, "Prompts of 11 tokens and completions of up to 10 are too long"),
    ],
)
def test_what_the_teacher_cannot_read_of_a_dataset_is_refused(teacher, columns, message):
    own, student = make_tokenizer(teacher), make_tokenizer("bytes")
    parts = {"name": "Tutor", "tokenizer": own, "eos_token_ids": {2}, "vocab_size": len(own)}
    contract = TextContract(student, SimpleNamespace(**parts, max_length=20, length_remedy="wait"), [3])
    contract.check_dataset(Dataset.from_dict({"prompt": ["to", "THE"], "teacher_prompt": [None, "so"]}), student, 10)
    with pytest.raises(ValueError, match=message):
        contract.check_dataset(Dataset.from_dict(columns), student, 10)


numbers = st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(completions(), st.integers(0, 99))
def test_the_students_tokens_share_what_the_teachers_make_of_a_chunk(case, seed):
    student, teacher, ids, is_chat = case
    contract = make_contract(student, teacher)
    own, alignment = contract.align(ids, is_chat)
    generator = torch.Generator().manual_seed(seed)
    logps = -9 * torch.rand(len(own), generator=generator)
    old = -9 * torch.rand(len(ids), generator=generator)
    means = alignment.to_student(logps)
    scores = spread(means[None], old[None], alignment.first[None], alignment.known[None])[0]
    assert (means[~alignment.known] == 0).all() and (scores[~alignment.known] == 0).all()
    for mine, theirs in zip(
        chunks_of(alignment.student, alignment.size), chunks_of(alignment.teacher, alignment.size), strict=True
    ):
        total = sum(logps[theirs].tolist())
        assert sum(scores[mine].tolist()) == pytest.approx(total, abs=1e-4)
        gap = (total - sum(old[mine].tolist())) / len(mine)
        assert (scores - old)[mine].tolist() == pytest.approx([gap] * len(mine), abs=1e-5)
        assert (alignment.first[mine] == mine[0]).all()
        if len(mine) == len(theirs) == 1:  # to the last bit
            assert scores[mine] == logps[theirs]


def test_the_last_tokens_of_the_teacher_may_be_missing():
    alignment = Alignment(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2]), 2)
    assert alignment.to_student(torch.tensor([-1.0, -2.0, -3.0])).tolist() == [-0.5, -0.5, -5.0, 0.0]
    assert alignment.to_student(torch.tensor([-1.0, -2.0, -3.0, -4.0])).tolist() == [-0.5, -0.5, -5.0, 0.0]


def test_a_chunk_with_a_token_that_is_not_wanted_is_none():
    alignment = Alignment(torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0, 1, 1, 2, 3]), 3)
    restricted = alignment.without(torch.tensor([0, 3]))
    assert restricted.size == 2
    assert restricted.student.tolist() == [2, 2, 0, 1, 2] and restricted.teacher.tolist() == [2, 0, 0, 1, 2]


def test_what_a_tool_has_written_has_no_scores_and_no_teacher_reads_behind_the_last_score():
    contract, tokenizer = make_contract("bytes", "characters"), make_tokenizer("bytes")
    ids = torch.tensor(tokenizer("so it is")["input_ids"])
    wanted = torch.ones(len(ids), dtype=torch.bool)
    wanted[-2:] = False
    prompt, own, is_needed, alignment = contract.read("a b", ids, wanted)
    characters = make_tokenizer("characters")
    assert characters.convert_ids_to_tokens(prompt.tolist()) == list("a b")
    assert characters.convert_ids_to_tokens(own.tolist()) == list("so it is")
    assert torch.equal(alignment.known, wanted) and is_needed.sum() == len(tokenizer.decode(ids[:-2]))
    row = make_row(contract, "a b", ids, wanted)
    assert len(row.completion) == is_needed.sum() and row.alignment is not None
    assert make_row(contract, "a b", ids, wanted & False) is None
    assert make_row(contract, "a b", ids[:0].new_tensor([0]), torch.tensor([True])) is None  # <unk> alone


def test_named_tokens_are_those_that_are_one_token_of_the_student_where_the_chunk_is_one_of_the_teacher():
    contract = make_contract("bytes", "characters")
    student, teacher = make_tokenizer("bytes"), make_tokenizer("characters")
    # " the" is a token of the student and four of the teacher, which goes on behind the space that it may name; a
    # space by itself and the end are one of both
    ids = [student.convert_tokens_to_ids(each) for each in ("Ġthe", "Ġ", "<|im_end|>")]
    own, alignment = contract.align(ids, True)
    assert teacher.convert_ids_to_tokens(own.tolist()) == [" ", "t", "h", "e", " ", "<eos>"]
    named = torch.tensor([teacher.convert_tokens_to_ids(["t", "<pad>", "<eos>"])] * 6)
    logps = torch.arange(-18.0, 0.0).view(6, 3)
    scores = contract.to_student(TokenScores(torch.zeros(6), named, logps), alignment)
    nothing = -float("inf")
    assert scores.top_logps.tolist() == [[nothing] * 3, [-6, nothing, -4], [-3, nothing, -1]]
    t = student.convert_tokens_to_ids("t")
    assert scores.top_ids[1:].tolist() == [[t, 0, student.eos_token_id]] * 2


def test_at_the_beginning_a_space_is_no_name_where_only_one_of_the_two_begins_with_it():
    contract, tokenizer = make_contract("bytes", "spm"), make_tokenizer("bytes")
    ids = tokenizer("the teacher", add_special_tokens=False)["input_ids"]
    for is_chat, first in ((True, -float("inf")), (False, 0.0)):
        own, alignment = contract.align(tokenizer(" the")["input_ids"] if not is_chat else ids, is_chat)
        named, alignment = own[:, None], alignment.without(alignment.student[:0])
        logps = contract.to_student(TokenScores(torch.zeros(len(own)), named, torch.zeros(len(own), 1)), alignment)
        assert logps.top_logps[0].item() == first


def test_pieces_without_utf_8_are_cut_out_of_the_text():
    text, ends, fits = join_pieces([b"a\xf0", b"\x9f", b"b", b"", b"c"], [True, True, True, False, True])
    assert text == "abc" and ends.tolist() == [1, 1, 2, 2, 3] and fits.tolist() == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("student", "teacher", "fits", "expected"),
    [
        ([1, 3, 5], [2, 3, 5], [True] * 3, ([0, 0, 1], [0, 0, 1], 2)),
        ([1, 3, 5], [1, 3, 4], [True] * 3, ([0, 1, 2], [0, 1, 2], 2)),  # the rest has no end in common
        ([1, 3, 5], [1, 3, 5], [True, False, True], ([0, 2, 1], [0, 2, 1], 2)),
        ([1, 1, 2], [1, 2, 2], [True, False, True], ([0, 2, 1], [0, 1, 1], 2)),  # no text at all
        ([], [], [], ([], [], 0)),
    ],
)
def test_by_hand(student, teacher, fits, expected):
    ends = (torch.tensor(each, dtype=torch.long) for each in (student, teacher))
    found = align(*ends, torch.tensor(fits, dtype=torch.bool), torch.ones(len(teacher), dtype=torch.bool))
    assert (found.student.tolist(), found.teacher.tolist(), found.size) == expected


def test_spread_by_hand():
    means = torch.tensor([[-2.0, -2.0, -1.0, 7.0]])  # of a chunk of two tokens and one of one
    old = torch.tensor([[-1.0, -2.0, -9.0, -5.0]])
    first, mask = torch.tensor([[0, 0, 2, 3]]), torch.tensor([[True, True, True, False]])
    assert spread(means, old, first, mask).tolist() == [[-1.5, -2.5, -1.0, 7.0]]


def test_a_tokenizer_that_does_not_say_what_its_tokens_stand_for_is_refused():
    def end_words(state):  # as GPT-1's, whose `</w>` is a space, but not at the end
        words = state["model"]["vocab"].items()
        state["model"]["vocab"] = {token + "</w>" * (id > 9 and id % 2): id for token, id in words}
        state.update(decoder={"type": "BPEDecoder", "suffix": "</w>"}, added_tokens=[])

    slow, other = SimpleNamespace(is_fast=False), edit_tokenizer("characters", "<eos>", end_words)
    for bad, reason in ((slow, "doesn't say where in a text its tokens end"), (other, "what comes behind them")):
        for whose, pair in (("student", (bad, make_tokenizer("bytes"))), ("teacher", (make_tokenizer("bytes"), bad))):
            model = SimpleNamespace(name="Tutor", tokenizer=pair[1], eos_token_ids={2}, vocab_size=700)
            with pytest.raises(
                ValueError, match=f"The {whose}'s tokenizer, a `\\w+`, .*{reason}.*shares the student's"
            ):
                TextContract(pair[0], model, [2])


def test_an_added_token_stands_for_itself():
    tokenizer = edit_tokenizer("bytes", "<eos>", lambda state: None)
    tokenizer.add_tokens(["éé"])
    assert Pieces(tokenizer).by_id[len(tokenizer) - 1] == "éé".encode()


def test_words_of_a_tokenizer_without_a_decoder():
    pieces = Pieces(tiny.make_tokenizer())
    assert pieces.by_id[4:6] == [b" w0", b" w1"] and pieces.adds_space
