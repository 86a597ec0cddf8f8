import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import GenerationConfig

from trl_rlad.scoring.rows import Row
from trl_rlad.teachers import TokenContract, contract
from trl_rlad.teachers.contract import (
    find_ends,
    find_image_problem,
    find_unfit_ends,
    find_unknown_ids,
    longest_prompt,
)


def test_same_tokenizer():
    assert find_unknown_ids(tiny.make_tokenizer(), tiny.make_tokenizer()) == []


def test_a_teacher_that_knows_more_is_fine():
    assert find_unknown_ids(tiny.make_tokenizer(), tiny.make_tokenizer([*tiny.WORDS, "more"])) == []


def test_tokens_only_the_student_knows():
    assert find_unknown_ids(tiny.make_tokenizer([*tiny.WORDS, "more", "most"]), tiny.make_tokenizer()) == [32, 33]


def test_half_of_the_students_tokens_are_enough():
    more = [f"m{i}" for i in range(32)]
    assert find_unknown_ids(tiny.make_tokenizer([*tiny.WORDS, *more]), tiny.make_tokenizer()) == list(range(32, 64))


# <eos> is 1 and <end> is 2. Where the teacher would end with <end>, its probability of <eos> says nothing
@pytest.mark.parametrize(
    ("student", "teacher", "unfit"),
    [
        ({1}, {1}, set()),
        ({1}, {2}, {1}),
        ({2}, {1}, {2}),
        # a base student and an instruct teacher that lists <eos> beside the <end> that it uses (Gemma, Phi)
        ({1}, {1, 2}, {1}),
        ({1, 2}, {1}, {2}),  # the other way round: a base teacher knows nothing of <end>
        ({1, 2}, {2}, {1}),  # a base student that was told to stop at <end> too: there the teacher is at home
        ({1, 2}, {1, 2}, set()),
        ({1, 2}, {2, 3}, {1, 2}),
        ({1}, {1, 99}, {1}),  # of which the student has never heard
    ],
)
def test_different_ends_of_turn(student, teacher, unfit):
    assert find_unfit_ends(student, teacher) == unfit


def test_ends_are_those_of_the_generation_config_and_the_tokenizer():
    tokenizer = tiny.make_tokenizer()
    assert find_ends(GenerationConfig(eos_token_id=[2, 1]), tokenizer) == {1, 2}
    assert find_ends(GenerationConfig(eos_token_id=2), tokenizer) == {1, 2}
    assert find_ends(GenerationConfig(), tokenizer) == {1}
    assert find_ends(GenerationConfig(), tiny.make_tokenizer(eos_token=None)) == set()


def test_with_an_id_of_two_meanings_ids_can_not_be_shared():
    other = tiny.make_tokenizer(["w1", "w0", *tiny.WORDS[2:]])
    assert find_unknown_ids(tiny.make_tokenizer(), other) is None
    assert TokenContract.between(tiny.make_tokenizer(), make_teacher(["w1", "w0", *tiny.WORDS[2:]]), [1]) is None


def test_renamed_special_tokens_are_not_refused():
    student, teacher = tiny.make_tokenizer(), tiny.make_tokenizer()
    student.add_special_tokens({"additional_special_tokens": ["<reserved>"]})
    teacher.add_special_tokens({"additional_special_tokens": ["<renamed>"]})
    assert find_unknown_ids(student, teacher) == [32]


def test_with_a_teacher_that_knows_next_to_nothing_ids_can_not_be_shared():
    assert find_unknown_ids(tiny.make_tokenizer(), tiny.make_tokenizer([])) is None


def make_teacher(words=tiny.WORDS, **attributes):
    """All of a teacher that is looked at: it knows 32 ids and 10 positions."""
    defaults = {"name": "Tutor", "tokenizer": tiny.make_tokenizer(words), "vocab_size": 32, "max_length": 10.0}
    defaults["eos_token_ids"] = {1}
    defaults |= {"length_remedy": "wait", "find_image_problem": lambda processor: f"it can't read {processor}"}
    return SimpleNamespace(**defaults | attributes)


def test_what_came_out_of_the_comparison(caplog):
    PartialState()
    student = tiny.make_tokenizer([*tiny.WORDS, "more", "most"])
    made = TokenContract.between(student, make_teacher(vocab_size=34), [1])
    assert made.is_known(torch.tensor([[0, 31], [32, 33]])).tolist() == [[True, True], [False, False]]
    assert made.can_be_named(torch.tensor([[0, 31], [32, 33]])).tolist() == [[True, True], [False, False]]
    assert made.unknown_ids.tolist() == [32, 33] and made.image_problem is None
    (record,) = caplog.records
    assert "doesn't score 2 of the student's tokens" in record.message
    assert "(such as 'more', 'most')" in record.message
    caplog.clear()
    with_images = TokenContract.between(tiny.make_tokenizer(), make_teacher(), [1], "films")
    assert with_images.image_problem == "it can't read films" and not caplog.records


@pytest.mark.parametrize(
    ("student", "teacher", "known", "named"),
    [
        ([1], {2}, [True, False, True, True], [True, False, False, True]),
        ([1], {1, 2}, [True, False, True, True], [True, False, False, True]),
        ([1, 2], {2}, [True, False, True, True], [True, False, True, True]),
        ([1, 2], {1}, [True, True, False, True], [True, True, False, True]),
        ([1, 2], {1, 2}, [True] * 4, [True] * 4),
    ],
)
def test_what_ends_a_turn_is_known_and_named_by_both_only_if_it_ends_it_for_both(student, teacher, known, named):
    made = TokenContract.between(tiny.make_tokenizer(), make_teacher(eos_token_ids=teacher), student)
    assert made.is_known(torch.arange(4)).tolist() == known
    assert made.can_be_named(torch.arange(4)).tolist() == named


def test_an_end_on_which_the_student_does_not_stop_is_said(caplog):
    PartialState()
    TokenContract.between(tiny.make_tokenizer(), make_teacher(eos_token_ids={1, 2}), [1])
    scored, ends = (record.message for record in caplog.records)
    assert "doesn't score 1 of the student's tokens" in scored and "'<eos>'" in scored
    assert "end its turn with '<end>'" in ends and "`generation_config.eos_token_id` of the student" in ends
    caplog.clear()
    TokenContract.between(tiny.make_tokenizer(), make_teacher(eos_token_ids={1}), [1, 2])
    assert "'<end>'" in caplog.text and "may end its turn" not in caplog.text


def test_five_of_the_unknown_tokens_are_named(caplog):
    PartialState()
    more = [f"m{i}" for i in range(7)]
    TokenContract.between(tiny.make_tokenizer([*tiny.WORDS, *more]), make_teacher(vocab_size=39), [1])
    assert "'m4')" in caplog.text and "'m5'" not in caplog.text


def test_a_student_beyond_the_teachers_rows_is_refused():
    message = "The student's tokenizer goes up to token id 31, but the teacher's vocabulary has only 31 rows. Choose"
    with pytest.raises(ValueError, match=message):
        TokenContract.between(tiny.make_tokenizer(), make_teacher(vocab_size=31), [1])
    assert TokenContract.between(tiny.make_tokenizer(), make_teacher(vocab_size=32), [1])


def make_row(prompt, completion, images=()):
    return Row(torch.tensor(prompt), torch.tensor(completion), dict(images))


def test_rollouts_that_the_teacher_can_read():
    made = TokenContract(make_teacher())
    assert made.unknown_ids.tolist() == [] and made.unknown_ids.dtype == torch.long
    assert made.can_be_named(torch.arange(32)).dtype == torch.bool and not made.can_be_named(torch.arange(32)).any()
    made.check([])
    made.check([make_row([31] * 5, [31] * 5), make_row([1], [2], {"pixel_values": torch.ones(1)})])
    TokenContract(make_teacher(), image_problem="it is blind").check([make_row([1], [2])])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([make_row([1] * 5, [1] * 6), make_row([1], [1])], "A rollout has 11 tokens with its prompt, but the teacher "
         "Tutor knows only 10 positions. Lower `max_completion_length`.* or wait."),
        ([make_row([32], [1]), make_row([1], [1])], "A rollout has the token id 32, but .* only 32 rows"),
        ([make_row([1], [1]), make_row([1], [1, 35, 3])], "has the token id 35, .* `generation_kwargs="),
        ([make_row([1], [1]), make_row([1], [2], {"pixel_values": torch.ones(1)})], "The teacher Tutor can't read the "
         "images of this data: it is blind. Choose"),
    ],
)  # fmt: skip
def test_rollouts_that_it_cannot_read(rows, message):
    with pytest.raises(ValueError, match=message):
        TokenContract(make_teacher(), image_problem="it is blind").check(rows)


def check(columns, completion=4, **attributes):
    made = TokenContract(make_teacher(**attributes), image_problem="it is blind")
    made.check_dataset(Dataset.from_dict(columns), tiny.make_tokenizer(), completion)


@pytest.mark.parametrize("column", ["prompt", "teacher_prompt"])
def test_data_is_as_long_as_its_longest_prompt_and_a_completion(column):
    columns = {column: ["w1 w2 w3 w4 w5 w6", "w1", None], "another": ["w1 " * 99] * 3}
    check(columns)
    message = (
        r"Prompts of 6 tokens and completions of up to 5 are too long for the teacher Tutor, which knows 10 pos.*wait"
    )
    with pytest.raises(ValueError, match=message):
        check(columns, 5)
    check(columns, None, max_length=6.0)
    with pytest.raises(ValueError, match="Prompts of 6 tokens and completions of up to None"):
        check(columns, None, max_length=5.0)


def test_a_stream_is_not_looked_at():
    stream = Dataset.from_dict({"prompt": ["w1 " * 20]}).to_iterable_dataset()
    TokenContract(make_teacher()).check_dataset(stream, tiny.make_tokenizer(), 4)
    TokenContract(make_teacher()).check_dataset(None, tiny.make_tokenizer(), 4)


def test_of_long_data_the_first_prompts_are_measured(monkeypatch):
    assert contract.PROMPTS_TO_MEASURE == 10_000
    monkeypatch.setattr(contract, "PROMPTS_TO_MEASURE", 2)
    check({"prompt": ["w1", "w1 w2", "w1 " * 20]})
    with pytest.raises(ValueError, match="Prompts of 20 tokens"):
        check({"prompt": ["w1", "w1 " * 20]})


@pytest.mark.parametrize("column", ["image", "images"])
def test_data_with_images_for_a_teacher_that_is_blind(column):
    with pytest.raises(ValueError, match="can't read the images of this data: it is blind"):
        check({"prompt": ["w1"], column: ["a picture"]})
    check({"prompt": ["w1"], column: ["a picture"], "teacher_weight": [0.0]})
    TokenContract(make_teacher()).check_dataset(Dataset.from_dict({column: ["?"]}), tiny.make_tokenizer(), 4)


def test_the_longest_prompt():
    tokenizer = tiny.make_tokenizer()
    assert longest_prompt([], tokenizer) == 0
    # By the characters: of nine, the one with the fewest is not counted
    words = ["w1 w1 w1", *["a" * 20] * 8]
    assert longest_prompt(words, tokenizer) == 1 and longest_prompt(words[:8], tokenizer) == 3
    parts = [{"type": "image"}, {"type": "text", "text": "w1 w2"}, {"type": "text", "text": None}]
    chat = [{"role": "user", "content": parts}, {"role": "user", "content": "w3"}, {"role": "user", "content": None}]
    assert longest_prompt([chat, "w1 w2"], tokenizer) == 3


def test_processors_that_make_the_same_of_an_image_and_not():
    assert find_image_problem(tiny.make_processor(), tiny.make_processor()) is None
    problem = find_image_problem(tiny.make_processor(), tiny.make_processor(patch_size=8))
    differ = "attention_mask, image_grid_thw, input_ids, mm_token_type_ids, pixel_values"
    assert (
        re.fullmatch(r"its processor makes something else of an image than the student's \((.*) differ\)", problem)[1]
        == differ
    )


def test_what_processors_are_asked_and_what_they_leave_out():
    def processor(chat_template, **tensors):
        def apply_chat_template(messages, chat_template, **kwargs):
            ((message,),) = messages
            assert chat_template == "the student's" and message["content"][1] == {"type": "text", "text": "?"}
            return tensors

        return SimpleNamespace(chat_template=chat_template, apply_chat_template=apply_chat_template)

    same = torch.ones(2)
    student, teacher = processor("the student's", ids=same, mask=same), processor("the teacher's", ids=same)
    assert find_image_problem(student, processor("the teacher's", ids=same, mask=same)) is None
    assert "(mask differ)" in find_image_problem(student, teacher)
    assert "(mask differ)" in find_image_problem(
        processor("the student's", ids=same), processor("", ids=same, mask=same)
    )
