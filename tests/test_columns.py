"""What of a row its teacher reads, and which one: by the columns of the data, environments and rollout functions."""

import os

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from trl_rlad import RLADTrainer
from trl_rlad.columns import check_prompts, number_teachers, read_weights


NAN = float("nan")


def user(text):
    return [{"role": "user", "content": text}]


# What is refused, with the row


@pytest.mark.parametrize("value", ["0.5", "high", [0.5], {}, -0.1, 1.5, NAN, float("inf")])
def test_a_weight_that_is_none_is_refused_with_its_row(value):
    with pytest.raises(ValueError, match="column `teacher_weight` must be in") as error:
        read_weights([1.0, None, value, 7])
    assert f"row 2 has {value!r}." in str(error.value)
    with pytest.raises(ValueError, match="row 0 of a generation batch has"):
        read_weights([value], " of a generation batch")


def test_weights_are_numbers_of_any_kind():
    assert read_weights([None, 0, True, torch.tensor(0.25)]).tolist() == [1.0, 0.0, 1.0, 0.25]


@pytest.mark.parametrize("value", [3, 0.5, "", "  ", [], ["text"], [[1, 2]], {"role": "user"}])
def test_a_prompt_that_is_none_is_refused_with_its_row(value):
    with pytest.raises(ValueError, match="column `teacher_prompt` must be text or messages, or `None`") as error:
        check_prompts([None, "w1", value])
    assert f"row 2 has {value!r}." in str(error.value)


def test_prompts_are_all_text_or_all_messages():
    check_prompts([None, None])
    check_prompts(["w1", None, "w2"])
    check_prompts([user("w1"), None, user("")])
    with pytest.raises(ValueError, match="has text in row 2, and messages in row 0. Choose one"):
        check_prompts([user("w1"), None, "w2"])


def test_a_name_of_no_teacher_is_refused_with_its_row():
    assert number_teachers(["b", "a", "b"], ["a", "b"]).tolist() == [1, 0, 1]
    for value in ("c", None, ["a"]):
        with pytest.raises(ValueError, match=r"`teacher_id` has .* in row 1, which is no teacher. They are 'a', 'b'."):
            number_teachers(["b", value], ["a", "b"])
    with pytest.raises(ValueError, match="has 1 in row 0, .* Cast the column from `ClassLabel` to strings"):
        number_teachers([1], ["a", "b"])


# What is read


class Silent:
    """An environment that adds nothing to the prompt."""

    def reset(self, **kwargs):
        return None


class Observing:
    """One that adds what there is to see, another thing in each row."""

    def reset(self, key, **kwargs):
        return f" See {key}!"


def roll_out(prompts, trainer):
    ids = [trainer.tokenizer(f"<{prompt}>"[-9:])["input_ids"] for prompt in prompts]
    completions = [[40 + i, 41, trainer.tokenizer.eos_token_id] for i in range(len(prompts))]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def reward(completion_ids, **kwargs):  # with an advantage in each row
    return [float(i % 2) for i in range(len(completion_ids))]


async def async_reward(completion_ids, **kwargs):
    return reward(completion_ids)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student, and the teachers "a" and "b", with a tokenizer of bytes."""
    tokenizer = tiny.make_chat_tokenizer()
    folders = [tmp_path_factory.mktemp(name) for name in ("student", "a", "b")]
    paths = [tiny.save_model(folder, seed, tokenizer, vocab_size=272) for seed, folder in enumerate(folders)]
    student, *teachers = map(AutoModelForCausalLM.from_pretrained, paths)
    return student, dict(zip("ab", paths[1:], strict=True)), dict(zip("ab", teachers, strict=True))


KEYS = range(4)  # rows of the dataset, of which a batch has two, each twice
CASES = st.fixed_dictionaries(
    {
        "chat": st.booleans(),
        "environment": st.sampled_from([None, None, Silent, Observing]),
        "rollout_func": st.sampled_from([None, None, roll_out]),
        "has_prompt": st.booleans(),  # without one, the environment owns it
        "teacher_prompt": st.none() | st.lists(st.sampled_from([None, "1 + 1", "So: 2"]), min_size=4, max_size=4),
        "teacher_chat": st.booleans(),
        "teacher_weight": st.none() | st.lists(st.sampled_from([None, 0.0, 0.5, 1.0]), min_size=4, max_size=4),
        "teacher_id": st.none() | st.lists(st.sampled_from("ab"), min_size=4, max_size=4),
        "remove_unused_columns": st.booleans(),
        "streams": st.booleans(),
        "evaluates": st.booleans(),
        "reward": st.sampled_from([reward, async_reward]),
    }
)


def make_rows(case):
    """The rows of the dataset."""
    columns = {"key": list(map(str, KEYS))}
    if case["has_prompt"]:
        prompts = [f"What is {key}?" for key in KEYS]
        columns["prompt"] = list(map(user, prompts)) if case["chat"] else prompts
    for name in ("teacher_prompt", "teacher_weight", "teacher_id"):
        if case[name] is not None:
            columns[name] = case[name]
    if case["teacher_chat"] and case["teacher_prompt"] is not None:
        columns["teacher_prompt"] = [prompt and user(prompt) for prompt in columns["teacher_prompt"]]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@settings(
    max_examples=int(os.environ.get("FUZZ_CASES", 15)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(CASES)
def test_a_row_is_read_by_its_own_teacher_on_its_own_prompt(models, tmp_path, case):
    student, paths, teachers = models
    if case["environment"] is None:
        case |= {"has_prompt": True}
    else:  # TRL's ask for messages, and for the columns that their `reset` is given
        case |= {"chat": True, "remove_unused_columns": False}
    rows = make_rows(case)
    data = IterableDataset.from_generator(lambda: iter(rows)) if case["streams"] else Dataset.from_list(rows)
    args = tiny.make_config(
        tmp_path,
        num_generations=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_completion_length=3,
        max_steps=1,
        remove_unused_columns=case["remove_unused_columns"],
    )
    trainer = RLADTrainer(
        student,
        case["reward"],
        args,
        data,
        data,
        teacher_model=paths["a"] if case["teacher_id"] is None else paths,
        rollout_func=case["rollout_func"],
        environment_factory=case["environment"],
    )
    trainer.model.train(not case["evaluates"])
    loader = trainer.get_eval_dataloader() if case["evaluates"] else trainer.get_train_dataloader()
    given_rows = next(iter(loader))
    batch = trainer._generate_and_score_completions(given_rows)

    by_prompt = {str(row.get("prompt")): row for row in rows}
    weights = []
    for i, given_row in enumerate(given_rows):
        # As it is in the dataset, whatever has become of it
        row = by_prompt[str(given_row["prompt"])] if case["has_prompt"] else rows[int(given_row["key"])]
        weights.append(1.0 if row.get("teacher_weight") is None else row["teacher_weight"])
        own, tokenizer = row.get("teacher_prompt"), trainer.tokenizer
        if own is None:  # what the student has read
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        elif isinstance(own, str):
            prompt = tokenizer(own)["input_ids"]
        else:
            prompt = tokenizer.apply_chat_template(own, add_generation_prompt=True, return_dict=True)["input_ids"]
        mask = batch["completion_mask"][i].bool()
        assert torch.equal(batch["teacher_mask"][i], mask & (weights[-1] > 0.0))
        completion = batch["completion_ids"][i][mask]
        with torch.no_grad():
            logits = teachers[row.get("teacher_id", "a")](torch.tensor([[*prompt, *completion]])).logits
        expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, completion[:, None])[:, 0]
        scores = batch["teacher_per_token_logps"][i][mask]
        torch.testing.assert_close(scores, expected * (weights[-1] > 0.0), rtol=0, atol=1e-5)
    assert batch.get("teacher_weight", torch.ones(len(weights))).tolist() == weights
    if case["environment"] is Observing and case["rollout_func"] is None:
        read = trainer.tokenizer.batch_decode(batch["prompt_ids"])
        assert all("See" in text for text in read)


# What is said at the start


def make_trainer(models, folder, rows, teacher="a", **kwargs):
    student, paths, _ = models
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    args = tiny.make_config(folder, max_steps=1, max_completion_length=3)
    return RLADTrainer(student, reward, args, data, teacher_model=paths[teacher], **kwargs)


@pytest.mark.parametrize("maker", [{"rollout_func": roll_out}, {"environment_factory": Observing}, {}])
def test_that_a_teacher_prompt_is_read_as_it_stands_is_said(maker, models, tmp_path, caplog):
    rows = [{"prompt": user("?"), "key": "1", "teacher_prompt": user("!")}] * 4
    make_trainer(models, tmp_path, rows, **maker)
    assert ("read that as it stands" in caplog.text) == bool(maker)


def test_a_prompt_without_tokens_is_refused(models, tmp_path):
    trainer = make_trainer(models, tmp_path, [{"prompt": "?"}] * 4, rollout_func=lambda prompts, _: {
        "prompt_ids": [[]] * len(prompts), "completion_ids": [[41, 42]] * len(prompts), "logprobs": None
    })  # fmt: skip
    with pytest.raises(ValueError, match="The prompt of a row, or its `teacher_prompt`, has no tokens"):
        trainer._generate_and_score_completions([{"prompt": "?"}] * 4)


def test_texts_and_messages_of_a_stream_are_refused_when_they_come(models, tmp_path):
    trainer = make_trainer(models, tmp_path, [{"prompt": "?"}] * 4)
    rows = [{"prompt": "?", "teacher_prompt": prompt} for prompt in ("!", "!", user("!"), None)]
    with pytest.raises(ValueError, match="has text in row 0 of a generation batch, and messages in row 2"):
        trainer._generate_and_score_completions(rows)


def test_class_labels_are_refused(models, tmp_path):
    features = Features({"prompt": Value("string"), "teacher_id": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_list([{"prompt": "?", "teacher_id": 1}] * 4, features=features)
    student, paths, _ = models
    with pytest.raises(ValueError, match="has 1 in row 0, which is no teacher. .* Cast the column from `ClassLabel`"):
        RLADTrainer(student, reward, tiny.make_config(tmp_path), rows, teacher_model=paths)
