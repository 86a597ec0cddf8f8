"""The offline baseline: what is collected from a teacher, and what a student learns from it."""

import json
import sys

import pytest
import tiny
from datasets import Dataset
from test_examples import chat_model, vision_model  # noqa: F401
from transformers import AutoProcessor, AutoTokenizer
from trl import SFTConfig

from trl_rlad.scripts import distil as script
from trl_rlad.scripts.arguments import MINI, MINIATURES
from trl_rlad.scripts.distil import collect, make_trainer
from trl_rlad.scripts.sampling import add_teacher_weight, evaluate, sample
from trl_rlad.scripts.tasks import Task
from trl_rlad.scripts.tasks.chains import load_chains
from trl_rlad.scripts.tasks.mini import correctness_reward, make_dataset, make_tokenizer


STUDENT, TEACHER = str(MINI / "student"), str(MINI / "teacher")


@pytest.fixture(scope="module")
def puzzles():
    return make_dataset([2, 3, 4], 24, seed=0, held_out=False)


def make_task(puzzles, reward=correctness_reward, best=1.0):
    return Task(puzzles, puzzles, reward, best)


def make_config(output_dir, **kwargs):
    defaults = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-2}
    defaults |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return SFTConfig(str(output_dir), **defaults, **kwargs)


@pytest.mark.parametrize("max_new_tokens", [33, 9, 8])  # solutions have an even number of tokens, and the end
def test_only_right_answers_that_end_are_kept(puzzles, max_new_tokens):
    # The student as the teacher, as it is often wrong
    pool, counts = collect(STUDENT, make_task(puzzles), 4, max_new_tokens, seed=3)
    samples = sample(STUDENT, list(puzzles["prompt"]), 4, max_new_tokens=max_new_tokens, seed=3)
    answers = [(row, text, len(text.split())) for row, texts in zip(puzzles, samples, strict=True) for text in texts]
    right = [answer for answer in answers if answer[1] == answer[0]["solution"]]
    ended = [answer for answer in right if answer[2] < max_new_tokens]  # with room for the end-of-sequence token
    assert 0 < len(ended) < len(answers)
    assert (len(ended) < len(right)) == (max_new_tokens == 8)
    assert list(zip(pool["prompt"], pool["completion"], strict=True)) == [
        (row["prompt"], text) for row, text, _ in ended
    ]
    assert counts == {
        "prompts": 24,
        "solved_prompts": len({row["prompt"] for row, _, _ in ended}),
        "samples": 96,
        "kept_samples": len(ended),
        "tokens": sum(min(length + 1, max_new_tokens) for _, _, length in answers),
        "kept_tokens": sum(length + 1 for _, _, length in ended),
    }


def test_the_seed_decides(puzzles):
    pools = [collect(STUDENT, make_task(puzzles), 2, 33, seed=seed)[0].to_list() for seed in (1, 1, 2)]
    assert pools[0] == pools[1] != pools[2]


def test_nothing_right(puzzles):
    with pytest.raises(ValueError, match="None of the 48 answers .* stronger teacher"):
        collect(STUDENT, make_task(puzzles, best=2.0), 2, 33)
    with pytest.raises(ValueError, match="None of the 24 answers"):  # of which none can be judged
        collect(STUDENT, make_task(puzzles, lambda completions, **_: [None] * len(completions)), 1, 4)


def test_the_student_trains_on_answer_and_end_alone(tmp_path):
    pool = Dataset.from_list([{"prompt": "A: A = B B: A = B ?", "completion": "kk ok"}])
    row = make_trainer(STUDENT, pool, make_config(tmp_path)).train_dataset[0]
    decode = make_tokenizer().decode
    assert decode(row["input_ids"]) == "A: A = B B: A = B ? kk ok <eos>"
    assert [label == -100 for label in row["labels"]] == [True] * 9 + [False] * 3
    assert row["labels"][9:] == row["input_ids"][9:]
    row = make_trainer(STUDENT, pool, make_config(tmp_path, eos_token="ok")).train_dataset[0]
    assert decode(row["input_ids"]).endswith("kk ok ok")


def test_chat_prompts(chat_model, tmp_path):  # noqa: F811
    prompt = [{"role": "user", "content": "Hi"}]
    pool = Dataset.from_list([{"prompt": prompt, "completion": "<think>1</think>2"}])
    row = make_trainer(chat_model, pool, make_config(tmp_path)).train_dataset[0]
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    learned = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(learned) == "<think>1</think>2<|im_end|>"
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>1</think>2<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == expected


def test_a_vision_language_model_keeps_its_processor(vision_model, tmp_path):  # noqa: F811
    pool = Dataset.from_list([{"prompt": [{"role": "user", "content": "Hi"}], "completion": "2"}])
    trainer = make_trainer(vision_model, pool, make_config(tmp_path, max_steps=1))
    trainer.train()
    trainer.save_model()
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(AutoProcessor.from_pretrained(vision_model))
    assert len(sample(str(tmp_path), list(pool["prompt"]), max_new_tokens=2)) == 1


def test_a_new_student_learns_the_answers_and_to_stop(puzzles, tmp_path):
    # The reward wants the worked solution and nothing after it
    puzzles = puzzles.select(range(6))
    pool, _ = collect(TEACHER, make_task(puzzles), 4, 33)
    assert len(set(pool["prompt"])) == 6
    tokenizer = make_tokenizer()
    student = tiny.save_model(tmp_path / "student", 0, tokenizer, vocab_size=len(tokenizer), hidden_size=32, scale=0.1)
    trainer = make_trainer(student, pool, make_config(tmp_path, max_steps=60, per_device_train_batch_size=12))

    def accuracy():
        scores = evaluate(trainer.model, make_task(puzzles), 2, temperature=0.1, max_new_tokens=33)
        assert scores["overall"].keys() >= {"pass@1", "pass@2"}
        return scores["overall"]["mean@2"]

    assert accuracy() == 0.0
    trainer.train()
    assert accuracy() == 1.0


def test_the_script(tmp_path, monkeypatch, capsys):
    # A rate that leaves nothing of the student, so that the accuracy before and after can't be the same
    arguments = "--num_prompts 12 --samples_per_prompt 2 --eval_size 24 --max_steps 2 --learning_rate 1 --use_cpu True"
    monkeypatch.setattr(sys, "argv", ["offline_distillation.py", *arguments.split(), "--output_dir", str(tmp_path)])
    max_lengths = []

    def make(student, pool, args, **kwargs):
        max_lengths.append(args.max_length)
        return make_trainer(student, pool, args, **kwargs)

    monkeypatch.setattr(script, "make_trainer", make)
    script.main()
    assert max_lengths == [None]  # not TRL's 1,024, which would cut answers
    stdout = capsys.readouterr().out
    saved = json.loads((tmp_path / "teacher_samples.json").read_text())
    student, teacher, length = MINIATURES["chains"]
    task = load_chains(12, 24, seed=42)
    _, counts = collect(str(teacher), task, 2, length, seed=42)
    assert saved["counts"] == counts
    assert saved["settings"]["samples_per_prompt"] == 2 and saved["settings"]["seed"] == 42
    assert f"{counts['kept_samples']} of 24 answers, {counts['kept_tokens']} tokens" in stdout
    before, after = (
        evaluate(model, task, 1, max_new_tokens=length, seed=42)["overall"]["mean@1"]
        for model in (str(student), str(tmp_path))
    )
    assert before > after
    assert f"  {before:6.1%} -> {after:6.1%}" in stdout


def test_what_the_command_line_says_is_what_is_done(tmp_path, monkeypatch):
    class Done(Exception):
        pass

    seen = {}

    def record(name, result=None):
        def called(*args, **kwargs):
            seen[name] = args, kwargs
            if result is None:
                raise Done
            return result

        monkeypatch.setattr(script, name, called)

    counts = dict.fromkeys(("prompts", "solved_prompts", "samples", "kept_samples", "tokens", "kept_tokens"), 1)
    record("evaluate", {})
    record("collect", (Dataset.from_list([{"prompt": "?", "completion": "k"}]), counts))
    record("make_trainer")
    command = (
        "--num_prompts 3 --eval_size 2 --samples_per_prompt 5 --temperature 0.9 --max_completion_length 40 --seed 7"
    )
    command += " --batch_size 6 --backend vllm --use_peft true --lora_r 3 --load_in_4bit true --dtype float32"
    command += f" --model_revision v1 --model_name_or_path {STUDENT} --teacher_model_name_or_path {TEACHER}"
    command += f" --use_cpu true --bf16 false --output_dir {tmp_path} --task mini --task_kwargs"
    monkeypatch.setattr(sys, "argv", ["offline_distillation.py", *command.split(), '{"n_people": [2]}'])
    with pytest.raises(Done):
        script.main()
    sampling = {"max_new_tokens": 40, "batch_size": 6, "seed": 7, "backend": "vllm"}
    (student, task), kwargs = seen["evaluate"]
    assert student == STUDENT and kwargs == {"num_samples": 1, **sampling}
    assert task.train_dataset["difficulty"][:] == [2] * 3 and len(task.eval_dataset) == 2
    args, kwargs = seen["collect"]
    assert args == (TEACHER, task, 5)
    assert kwargs == {"path": tmp_path / "teacher_weight.json", "temperature": 0.9, **sampling}
    (student, _, args), kwargs = seen["make_trainer"]
    assert (student, args.model_init_kwargs["revision"], args.model_init_kwargs["dtype"]) == (STUDENT, "v1", "float32")
    assert kwargs["peft_config"].r == 3 and kwargs["quantization_config"].load_in_4bit
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    with pytest.raises(ValueError, match="Run this in one process"):
        script.main()


def test_where_a_teacher_is_to_be_believed(puzzles, tmp_path):
    # The student as the teacher, as it is often wrong
    path, asked = tmp_path / "new" / "teacher_weight.json", []

    def reward(**columns):
        asked.append(len(columns["completions"]))
        return correctness_reward(**columns)

    sampling = {"max_new_tokens": 33, "seed": 3}
    weighted = add_teacher_weight(make_task(puzzles.select(range(16)), reward), STUDENT, 4, path, **sampling)
    samples = sample(STUDENT, list(puzzles["prompt"][:16]), 4, **sampling)
    expected = [
        sum(text == row["solution"] for text in texts) / 4 for row, texts in zip(weighted, samples, strict=True)
    ]
    assert weighted["teacher_weight"][:] == expected and 0 < sum(expected) < 16
    # What is known isn't sampled again
    assert asked == [16] * 4
    again = add_teacher_weight(make_task(puzzles, reward), STUDENT, 4, path, **sampling)
    assert again["teacher_weight"][:16] == expected and asked[4:] == [8] * 4
    assert (
        add_teacher_weight(make_task(puzzles, None), STUDENT, 4, path)["teacher_weight"][:]
        == again["teacher_weight"][:]
    )
    for other in ((TEACHER, 4), (STUDENT, 2)):
        with pytest.raises(ValueError, match="answers of another teacher or another number of them"):
            add_teacher_weight(make_task(puzzles, reward), other[0], other[1], path)


def test_collecting_answers_says_where_to_believe_the_teacher(puzzles, tmp_path):
    path = tmp_path / "teacher_weight.json"
    _, counts = collect(STUDENT, make_task(puzzles), 4, 33, path, seed=3)
    weights = add_teacher_weight(make_task(puzzles, None), STUDENT, 4, path)["teacher_weight"]
    assert 4 * sum(weights) == counts["kept_samples"]
