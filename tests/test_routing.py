"""Several teachers, each for its own rows, and prompts that only the teacher sees."""

import json

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_teacher_scorer import naive_log_probs
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from trl_rlad import RLADTrainer


MODES = [{"alpha": 0.5}, {"alpha": 1.0, "teacher_kl_coef": 0.5, "teacher_kl": "forward", "teacher_top_k": 3}]


@pytest.fixture(scope="module")
def teachers(teacher_path, tmp_path_factory):
    return {"small": teacher_path, "wide": tiny.save_model(tmp_path_factory.mktemp("wide"), seed=2, hidden_size=32)}


def make_dataset(names=None, prompts=None):
    dataset = tiny.make_dataset()
    if names is not None:
        dataset = dataset.add_column("teacher_id", [names[i % len(names)] for i in range(len(dataset))])
    if prompts is not None:
        dataset = dataset.add_column("teacher_prompt", [prompts[i % len(prompts)] for i in range(len(dataset))])
    return dataset


def train(student, teachers, dataset, folder, reward=tiny.reward, **kwargs):
    # Two groups in a batch
    settings = {"per_device_train_batch_size": 8, "max_steps": 3} | kwargs
    args = tiny.make_config(folder, **settings)
    trainer = RLADTrainer(student, reward, args, dataset, teacher_model=teachers)
    trainer.seen = tiny.watch_batches(trainer)
    trainer.train()
    return trainer


def assert_scores(trainer, path_of, prompt_of=lambda row: row["prompt"]):
    """Each row has the scores of a plain pass of its own teacher over its own prompt."""
    tokenize, asked = trainer.processing_class, set()
    for batch, rows in trainer.seen:
        prompts = [torch.tensor(tokenize(prompt_of(row))["input_ids"]) for row in rows]
        plain = batch | {
            "prompt_ids": pad_sequence(prompts, batch_first=True),
            "prompt_mask": pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True),
        }
        log_probs = {path: naive_log_probs(path, plain, trainer.temperature) for path in set(map(path_of, rows))}
        for i, row in enumerate(rows):
            mask, expected = batch["teacher_mask"][i], log_probs[path_of(row)][i]
            asked |= {path_of(row)} if mask.any() else set()
            scores = expected.gather(1, batch["completion_ids"][i].unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(batch["teacher_per_token_logps"][i][mask], scores[mask], rtol=0, atol=1e-5)
            if "teacher_top_ids" in batch:
                ids, logps = batch["teacher_top_ids"][i], batch["teacher_top_logps"][i]
                assert len(ids) == mask.sum()
                given, expected = logps.isfinite(), expected[mask]  # not all of the teacher's tokens are shared
                for theirs in (expected.gather(1, ids.long()), expected.topk(3).values):
                    torch.testing.assert_close(logps[given], theirs[given], rtol=0, atol=1e-5)
    return asked


@pytest.mark.parametrize("reward", [tiny.reward, tiny.async_reward])
@pytest.mark.parametrize("mode", MODES, ids=["trrd", "named"])
def test_each_row_has_its_own_teacher(mode, reward, student_path, teachers, tmp_path):
    trainer = train(student_path, teachers, make_dataset(["small", "wide", "wide"]), tmp_path, reward, **mode)
    assert assert_scores(trainer, lambda row: teachers[row["teacher_id"]]) == set(teachers.values())


def test_what_is_logged_of_each(student_path, teachers, tmp_path):
    trainer = train(student_path, teachers, make_dataset(["small", "wide"]), tmp_path, max_steps=8)
    logs, both = [log for log in trainer.state.log_history if "loss" in log], 0
    for log in logs:
        names = [name for name in teachers if log.get(f"teacher/{name}/log_ratio") is not None]
        shares = {name: log[f"teacher/{name}/tokens"] for name in teachers if f"teacher/{name}/tokens" in log}
        if shares:
            assert sum(shares.values()) == pytest.approx(1.0) and names == [n for n in teachers if shares[n] > 0]
            mean = sum(shares[name] * log[f"teacher/{name}/log_ratio"] for name in names)
            assert mean == pytest.approx(log["teacher/log_ratio"], rel=1e-5)
        seconds = [log[f"teacher/{name}/scoring_time"] for name in teachers]
        assert sum(seconds) == pytest.approx(log["teacher/scoring_time"])
        both += len(names) == 2
    assert both > 0


def test_two_names_of_one_teacher_change_nothing(student_path, teacher_path, tmp_path):
    one = train(student_path, teacher_path, make_dataset(), tmp_path)
    two = train(student_path, {"a": teacher_path, "b": teacher_path}, make_dataset(["a", "b"]), tmp_path)
    for left, right in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "There are several teachers by name.*column `teacher_id`"),
        (["small", "other"], "column `teacher_id` has 'other' in row 1, which is no teacher. .* 'small', 'wide'"),
        (["small", None], "column `teacher_id` has None"),
    ],
)
def test_rows_without_a_teacher_are_refused(names, message, student_path, teachers, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(student_path, teachers, make_dataset(names), tmp_path, max_steps=0)


def test_an_evaluation_set_without_names_is_refused(student_path, teachers, tmp_path):
    args = tiny.make_config(tmp_path)
    for eval_dataset in (tiny.make_dataset(), {"one": tiny.make_dataset()}):
        with pytest.raises(ValueError, match="column `teacher_id`"):
            RLADTrainer(student_path, tiny.reward, args, make_dataset(["small"]), eval_dataset, teacher_model=teachers)


def test_an_unknown_name_in_a_stream(student_path, teachers, tmp_path):
    with pytest.raises(ValueError, match="column `teacher_id` has 'other'"):
        train(student_path, teachers, make_dataset(["other"]).to_iterable_dataset(), tmp_path)


def test_a_teacher_that_does_not_fit_is_named(student_path, teachers, tmp_path):
    foreign = tiny.save_model(tmp_path / "foreign", 0, vocab_size=20)
    with pytest.raises(ValueError, match="Teacher 'odd': .*goes up to token id 31"):
        train(student_path, teachers | {"odd": foreign}, make_dataset(["odd"]), tmp_path)


def test_names_for_a_single_teacher_are_not_read(student_path, teacher_path, tmp_path, caplog):
    train(student_path, teacher_path, make_dataset(["anything"]), tmp_path, max_steps=1)
    assert "column `teacher_id` isn't read" in caplog.text


def test_all_of_them_are_in_the_checkpoint(student_path, teachers, tmp_path):
    kwargs = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(student_path, teachers, make_dataset(["small", "wide"]), tmp_path, **kwargs)
    record = json.loads((tmp_path / "checkpoint-2" / "rlad.json").read_text())
    assert record["teachers"].keys() == teachers.keys()
    swapped = dict(zip(teachers, reversed(teachers.values()), strict=True))
    args = tiny.make_config(tmp_path, **kwargs | {"max_steps": 3})
    trainer = RLADTrainer(student_path, tiny.reward, args, make_dataset(["small"]), teacher_model=swapped)
    with pytest.raises(ValueError, match="another teacher"):
        trainer.train(resume_from_checkpoint=True)


# Prompts that only the teacher sees


@pytest.mark.parametrize("reward", [tiny.reward, tiny.async_reward])
@pytest.mark.parametrize("mode", MODES, ids=["trrd", "named"])
def test_the_teacher_reads_its_own_prompt(mode, reward, student_path, teachers, tmp_path):
    dataset = make_dataset(["small", "wide"], ["w9 w8 w7 w6 w5 w4", None, "w1"])
    trainer = train(student_path, teachers, dataset, tmp_path, reward, **mode)
    assert_scores(trainer, lambda row: teachers[row["teacher_id"]], lambda row: row["teacher_prompt"] or row["prompt"])
    with pytest.raises(AssertionError):  # it would be noticed if it had read the student's
        assert_scores(trainer, lambda row: teachers[row["teacher_id"]])


def test_the_student_does_not_read_it(student_path, teacher_path, tmp_path):
    trainer = train(student_path, teacher_path, make_dataset(prompts=["w9 w8 w7 w6 w5 w4"]), tmp_path)
    plain = train(student_path, teacher_path, make_dataset(), tmp_path)
    assert torch.equal(trainer.seen[0][0]["prompt_ids"], plain.seen[0][0]["prompt_ids"])
    assert torch.equal(trainer.seen[0][0]["completion_ids"], plain.seen[0][0]["completion_ids"])


def test_chat_prompts(tmp_path):
    tokenizer = tiny.make_chat_tokenizer()
    student, teacher = (
        tiny.save_model(tmp_path / str(seed), seed, tokenizer, vocab_size=len(tokenizer)) for seed in (0, 1)
    )
    prompt = [{"role": "user", "content": "2+2?"}]
    with_answer = [{"role": "system", "content": "It is 4."}, *prompt]
    dataset = Dataset.from_list([{"prompt": prompt, "teacher_prompt": with_answer}] * 8)
    trainer = train(student, teacher, dataset, tmp_path / "out", max_steps=1)
    batch, _ = trainer.seen[0]
    ids = tokenizer.apply_chat_template(with_answer, add_generation_prompt=True, return_dict=True)["input_ids"]
    plain = batch | {"prompt_ids": torch.tensor([ids] * 8), "prompt_mask": torch.ones(8, len(ids), dtype=torch.long)}
    expected = naive_log_probs(teacher, plain, 1.0).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    mask = batch["teacher_mask"]
    assert mask.any()
    torch.testing.assert_close(batch["teacher_per_token_logps"][mask], expected[mask], rtol=0, atol=1e-5)


def test_a_teacher_prompt_that_is_too_long_is_refused(student_path, tmp_path):
    teacher = tiny.save_model(tmp_path / "teacher", seed=1, positions=40)
    dataset = make_dataset(prompts=[" ".join(["w1"] * 33)])
    with pytest.raises(ValueError, match="Prompts of 33 tokens .* 40 positions"):
        train(student_path, teacher, dataset, tmp_path)


@pytest.mark.parametrize("reward", [tiny.reward, tiny.async_reward])
def test_without_a_teacher_prompt_the_teacher_reads_what_the_student_has_read(reward, student_path, tmp_path):
    # which a rollout function or an environment may have made, and not the dataset
    def roll_out(prompts, trainer):
        completions = [[5, 6, 10 + i, 1] for i in range(len(prompts))]
        return {"prompt_ids": [[7, 8, 9]] * len(prompts), "completion_ids": completions, "logprobs": None}

    dataset = make_dataset(prompts=["w9 w8", None])
    args = tiny.make_config(tmp_path, per_device_train_batch_size=8, max_steps=1, shuffle_dataset=False)
    trainer = RLADTrainer(student_path, reward, args, dataset, teacher_model=student_path, rollout_func=roll_out)
    trainer.seen = tiny.watch_batches(trainer)
    trainer.train()
    ((batch, rows),) = trainer.seen
    ids = [trainer.processing_class(row["teacher_prompt"] or "w3 w4 w5")["input_ids"] for row in rows]
    prompts = pad_sequence(list(map(torch.tensor, ids)), batch_first=True)
    plain = batch | {"prompt_ids": prompts, "prompt_mask": (prompts != 0).long()}
    expected = naive_log_probs(student_path, plain, 1.0).gather(2, batch["completion_ids"][..., None])[..., 0]
    mask = batch["teacher_mask"]
    assert len({len(each) for each in ids}) == 2 and mask.any(1).sum() > 4
    torch.testing.assert_close(batch["teacher_per_token_logps"][mask], expected[mask], rtol=0, atol=1e-5)


def test_images_belong_to_the_prompt(tmp_path):
    student, teacher = (tiny.save_vision_model(tmp_path / str(seed), seed) for seed in (0, 1))
    dataset = tiny.make_image_dataset([1])
    dataset = dataset.add_column("teacher_prompt", dataset["prompt"][:])
    with pytest.raises(ValueError, match="images can't have a `teacher_prompt`"):
        train(student, teacher, dataset, tmp_path / "out", max_completion_length=4)


LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}


def save_adapters(base, folder):
    """Two adapters of one base and one that changes its LM head too; and each merged into a model of its own."""
    adapters, merged = {}, {}
    for name, extra in {"one.a": [], "one_a": [], "head": ["lm_head"]}.items():
        config = LoraConfig(**LORA | {"target_modules": LORA["target_modules"] + extra})
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        adapted.save_pretrained(folder / name)
        adapted.merge_and_unload().save_pretrained(folder / f"{name}_merged")
        adapters[name], merged[name] = str(folder / name), str(folder / f"{name}_merged")
    return adapters, merged


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("reward", [tiny.reward, tiny.async_reward])
def test_adapters_of_one_base_share_it(reward, offload, student_path, teacher_path, tmp_path):
    adapters, merged = save_adapters(teacher_path, tmp_path)
    dataset = make_dataset([*adapters, "small"])
    teachers = {**adapters, "small": teacher_path}
    trainer = train(student_path, teachers, dataset, tmp_path / "out", reward, teacher_offload=offload, max_steps=4)
    paths = {**merged, "small": teacher_path}
    assert assert_scores(trainer, lambda row: paths[row["teacher_id"]]) == set(paths.values())
    bases = trainer.teacher_scorer.teachers["one.a"].bases
    assert not bases, "when training has ended, nobody holds the base any more"

    scorers = trainer.teacher_scorer.scorers
    for _ in range(2):  # as after an evaluation that has had it loaded again
        for scorer in scorers.values():
            with scorer.teacher.placed():
                assert not any(parameter.requires_grad for parameter in scorer.teacher.model.parameters())
        models = [scorers[name].teacher.model for name in paths]
        assert models[0] is models[1] and len(set(map(id, models))) == 3
        assert len(bases) == 1
        trainer.teacher_scorer.release()
