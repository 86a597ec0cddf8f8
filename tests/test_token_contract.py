import pytest
import tiny

from trl_rlad.teachers.contract import find_nameable_ids, find_unknown_ids


def test_same_tokenizer():
    assert find_unknown_ids(tiny.make_tokenizer(), tiny.make_tokenizer(), [1, 2]) == []


def test_a_teacher_that_knows_more_is_fine():
    assert find_unknown_ids(tiny.make_tokenizer(), tiny.make_tokenizer([*tiny.WORDS, "more"])) == []


def test_tokens_only_the_student_knows():
    assert find_unknown_ids(tiny.make_tokenizer([*tiny.WORDS, "more", "most"]), tiny.make_tokenizer()) == [32, 33]


def test_different_ends_of_turn():
    base, instruct = tiny.make_tokenizer(eos_token="<eos>"), tiny.make_tokenizer(eos_token="<end>")
    # <eos> is 1 and <end> is 2. Where the teacher would end with <end>, its probability of <eos> says nothing
    assert find_unknown_ids(base, instruct, [1]) == [1]
    # a base student that was told to stop at <end> too: there the teacher is at home
    assert find_unknown_ids(base, instruct, [1, 2]) == [1]
    assert find_unknown_ids(instruct, base, [2]) == [2]


def test_an_id_with_two_meanings_is_refused():
    other = tiny.make_tokenizer(["w1", "w0", *tiny.WORDS[2:]])
    with pytest.raises(ValueError, match=r"2 ids stand for different tokens .* - 4: 'w0' / 'w1', 5: 'w1' / 'w0'\)"):
        find_unknown_ids(tiny.make_tokenizer(), other)


def test_renamed_special_tokens_are_not_refused():
    student, teacher = tiny.make_tokenizer(), tiny.make_tokenizer()
    student.add_special_tokens({"additional_special_tokens": ["<reserved>"]})
    teacher.add_special_tokens({"additional_special_tokens": ["<renamed>"]})
    assert find_unknown_ids(student, teacher) == [32]


def test_a_teacher_that_knows_next_to_nothing_is_refused():
    # as transformers makes one up for a directory that has none
    with pytest.raises(ValueError, match="saved beside its weights"):
        find_unknown_ids(tiny.make_tokenizer(), tiny.make_tokenizer([]))


def test_what_the_teacher_may_name():
    student = tiny.make_tokenizer()
    assert find_nameable_ids(student, tiny.make_tokenizer([*tiny.WORDS, "more"]), [], [1]) == list(range(32))
    assert find_nameable_ids(student, student, [5, 7], [1]) == [i for i in range(32) if i not in (5, 7)]
    # The end of a turn that isn't one for the student
    instruct = tiny.make_tokenizer(eos_token="<end>")
    assert find_nameable_ids(student, instruct, [1], [1]) == [0, *range(3, 32)]
    assert find_nameable_ids(student, instruct, [1], [1, 2]) == [0, *range(2, 32)]
