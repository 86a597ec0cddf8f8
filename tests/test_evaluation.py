"""Pass@k, the sampling behind it, and the script that prints it."""

import json
import shutil
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_examples import chat_model, vision_model  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rlad.evaluation import pass_at_k
from trl_rlad.scripts import evaluate as script
from trl_rlad.scripts.arguments import MINI
from trl_rlad.scripts.sampling import encode_prompts, evaluate, grade, sample, store_teacher_weight
from trl_rlad.scripts.tasks import Task
from trl_rlad.scripts.tasks.mini import correctness_reward, make_dataset


STUDENT, TEACHER = str(MINI / "student"), str(MINI / "teacher")


@pytest.fixture(scope="module")
def puzzles():
    return make_dataset([2, 3, 4], 20, seed=0, held_out=True)  # 7, 7 and 6 of them


def share_of_subsets(marks, k):
    subsets = list(combinations(marks, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets(num_samples):
    for num_correct in range(num_samples + 1):
        marks = [i < num_correct for i in range(num_samples)]
        for k in range(1, num_samples + 1):
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share_of_subsets(marks, k))


def test_pass_at_k_of_many_samples():
    # 1 - C(999, 500) / C(1000, 500) = 1 - 500 / 1000, of numbers that no float can hold
    assert pass_at_k(1000, 1, 500) == 0.5


@pytest.mark.parametrize(
    ("arguments", "name"), [((4, 2, 5), "`k`"), ((4, 2, 0), "`k`"), ((4, 5, 2), "`num_c"), ((4, -1, 2), "`num_c")]
)
def test_pass_at_k_refuses(arguments, name):
    with pytest.raises(ValueError, match=name):
        pass_at_k(*arguments)


def test_batches_do_not_change_a_completion(puzzles, tmp_path):
    # At a vanishing temperature samples are greedy: those of ragged prompts, in batches that part the samples of one
    # prompt, against each prompt by itself
    prompts = list(puzzles["prompt"])
    assert len({len(prompt) for prompt in prompts}) > 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TEACHER), AutoTokenizer.from_pretrained(TEACHER)
    # Its tokenizer pads on the left, and has a token for it: here one that doesn't
    path = shutil.copytree(TEACHER, tmp_path / "teacher")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name != "pad_token"} | {"padding_side": "right"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    completions = sample(str(path), prompts, 2, temperature=1e-3, max_new_tokens=33, batch_size=7)
    for prompt, texts in zip(prompts, completions, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=33)
        assert texts == [tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)] * 2


def test_the_seed_decides(puzzles):
    first, same, other = (
        sample(STUDENT, list(puzzles["prompt"]), 2, temperature=2.0, max_new_tokens=33, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == same != other
    assert any(texts[0] != texts[1] for texts in first)


def test_the_generation_config_does_not_interfere(puzzles):
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    model.generation_config.update(top_k=1, repetition_penalty=5.0, temperature=0.1, top_p=0.1, do_sample=False)
    prompts = list(puzzles["prompt"])
    # Hot enough for more than one token to be drawn
    settings = {"num_samples": 4, "temperature": 2.0, "max_new_tokens": 33}
    assert sample(model, prompts, **settings) == sample(STUDENT, prompts, **settings)


def test_chat_prompts(chat_model):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    prompts = [[{"role": "user", "content": content}] for content in ("Hi", "Hello there")]
    first, _ = encode_prompts(tokenizer, prompts)
    assert tokenizer.decode(first) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    completions = sample(chat_model, prompts, 2, max_new_tokens=4)
    assert [len(texts) for texts in completions] == [2, 2]


def test_backends(monkeypatch):
    # vLLM itself is run by no test: it needs a GPU
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'pip install "trl\[vllm\]"'):
        sample(STUDENT, ["?"], backend="vllm")
    with pytest.raises(ValueError, match="'transformers' or 'vllm'"):
        sample(STUDENT, ["?"], backend="sglang")


def test_what_vllm_is_asked_for(monkeypatch):
    # A stand-in, as it needs a GPU
    asked = []

    def generate(prompts, params):
        asked.append((prompts, params))
        completions = [SimpleNamespace(text=f"answer {i}") for i in range(params["n"])]
        return [SimpleNamespace(outputs=completions) for _ in prompts]

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return SimpleNamespace(generate=generate)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=load, SamplingParams=dict))
    settings = {"temperature": 0.7, "top_p": 0.8, "max_new_tokens": 9, "seed": 3}
    texts = sample(STUDENT, ["?", "A ?"], 2, **settings, backend="vllm")
    assert texts == [["answer 0", "answer 1"]] * 2
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    assert asked == [
        ((STUDENT,), {"seed": 3}),
        (
            [{"prompt_token_ids": ids} for ids in tokenizer(["?", "A ?"])["input_ids"]],
            {"n": 2, "temperature": 0.7, "top_p": 0.8, "max_tokens": 9},
        ),
    ]


def test_a_second_reward_function_says_what_is_right():
    task = Task(None, None, lambda **columns: columns["rewards"], best=3.0)
    assert task.accuracy(rewards=[3.0, 1.0, -1.0, None]) == [1.0, 0.0, 0.0, None]


def test_what_cannot_be_judged_is_left_out_of_a_score_and_not_believed(puzzles, tmp_path):
    def reward(prompts, completions, solution, difficulty):
        rewards = correctness_reward(completions, solution)
        return [None if people == 2 else reward for people, reward in zip(difficulty, rewards, strict=True)]

    scores = evaluate(STUDENT, Task(None, puzzles, reward), 1, max_new_tokens=33)
    assert [(name, row["puzzles"]) for name, row in scores.items()] == [("3", 7), ("4", 6), ("overall", 13)]
    with pytest.raises(ValueError, match="can judge none of the puzzles"):
        evaluate(STUDENT, Task(None, puzzles.filter(lambda row: row["difficulty"] == 2), reward), 1, max_new_tokens=1)
    marks = [[True, None, False, None], [None] * 4, [True] * 4]
    shares = store_teacher_weight(tmp_path / "weight.json", "teacher", ["a", "b", "c"], marks)
    assert shares == {"a": 0.25, "b": 0.0, "c": 1.0}


def test_grade_takes_the_best_reward_only():
    def reward(completions, answer, **kwargs):
        assert kwargs["prompts"] == [prompt, prompt] and "prompt" not in kwargs  # as TRL does
        texts = [completion[0]["content"] for completion in completions]
        return [{"right": 3.0, "wrong": -0.5}.get(text) for text in texts]  # `None` where it can't tell

    prompt = [{"role": "user", "content": "?"}]
    dataset = make_dataset([2], 2, 0, True).map(lambda row: {"prompt": prompt, "answer": ""})
    task = Task(None, dataset, reward, best=3.0)
    marks = grade(task, dataset, [["right", "wrong", ""], ["", "right", "right"]])
    assert marks == [[True, False, None], [None, True, True]]


def test_scores_by_difficulty(puzzles):
    settings = {"temperature": 2.0, "max_new_tokens": 33, "seed": 5}  # at lower ones the student is too sure to vary
    scores = evaluate(STUDENT, Task(None, puzzles, correctness_reward), num_samples=4, k=[1, 2, 4], **settings)
    completions = sample(STUDENT, list(puzzles["prompt"]), 4, top_p=0.95, **settings)
    marks = [[text == row["solution"] for text in texts] for row, texts in zip(puzzles, completions, strict=True)]
    groups = {name: [m for m, d in zip(marks, puzzles["difficulty"], strict=True) if d == name] for name in (2, 3, 4)}
    assert [len(group) for group in groups.values()] == [7, 7, 6]
    assert 0.0 < scores["overall"]["pass@1"] < scores["overall"]["pass@4"] < 1.0
    assert list(scores) == ["2", "3", "4", "overall"]
    for name, group in {**groups, "overall": marks}.items():
        expected = {"puzzles": len(group), "samples": 4 * len(group), "mean@4": sum(map(sum, group)) / 4 / len(group)}
        for k in (1, 2, 4):
            expected[f"pass@{k}"] = sum(share_of_subsets(m, k) for m in group) / len(group)
        assert scores[str(name)] == pytest.approx(expected)


def test_too_large_a_k_is_refused_before_sampling(puzzles):
    with pytest.raises(ValueError, match="from 1 to `num_samples` = 2, but is 3"):
        evaluate("no model", Task(None, puzzles, correctness_reward), num_samples=2, k=[3])


def test_the_script(tmp_path, monkeypatch, capsys):
    sizes, load_task = [], script.load_task

    def load(*args, **kwargs):
        task = load_task(*args, **kwargs)
        sizes.append([len(dataset) for dataset in (task.train_dataset, task.eval_dataset)])
        return task

    monkeypatch.setattr(script, "load_task", load)
    output = tmp_path / "new" / "scores.json"
    arguments = f"--model_name_or_path {STUDENT} --eval_size 9 --num_samples 3 --seed 7 --output {output}".split()
    arguments += "--task mini --temperature 1.7 --top_p 0.9 --k 3 2 --batch_size 5".split()
    arguments += "--max_completion_length 31 --task_kwargs".split()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, '{"n_people": [2, 3]}'])
    script.main()
    result = json.loads(output.read_text())
    assert sizes == [[1, 9]]
    task = Task(None, make_dataset([2, 3], 9, seed=7, held_out=True), correctness_reward)
    settings = {"temperature": 1.7, "top_p": 0.9, "batch_size": 5, "max_new_tokens": 31, "seed": 7}
    expected = evaluate(STUDENT, task, num_samples=3, k=[2, 3], **settings)
    assert result["scores"] == expected
    assert result["settings"]["k"] == [2, 3] and result["settings"]["max_completion_length"] == 31
    assert result["versions"].keys() >= {"torch", "transformers", "trl", "trl-rlad"}
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["difficulty", "puzzles", "Mean@3", "Pass@2", "Pass@3"]
    assert [row.split()[:2] for row in rows] == [["2", "5"], ["3", "4"], ["overall", "9"]]
    assert rows[2].split()[2] == f"{expected['overall']['mean@3']:.1%}"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--eval_size", "2", "--backend", "sglang"])
    with pytest.raises(ValueError, match="must be 'transformers' or 'vllm', but is 'sglang'"):
        script.main()


def test_what_the_script_takes_without_arguments():
    args = script.EvaluationArguments()
    assert Path(args.model_name_or_path).resolve() == (MINI / "chains_gpt_half").resolve()
    assert not Path(args.model_name_or_path).is_absolute()  # it goes into the file
    assert (args.k, args.max_completion_length, args.temperature, args.top_p) == ([1, 8], 9, 0.6, 0.95)
    assert (args.seed, args.num_samples, args.eval_size, args.batch_size) == (42, 8, 384, 128)
    other = script.EvaluationArguments(model_name_or_path="x", task="chain_sum", num_samples=1)
    assert (other.k, other.max_completion_length) == ([1], 2048)


@pytest.mark.parametrize("model", ["chat_model", "vision_model"])
def test_a_task_of_reasoning_gym(model, request, tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    output = tmp_path / "scores.json"
    arguments = f"--task chain_sum --eval_size 2 --num_samples 2 --max_completion_length 4 --output {output}".split()
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "--model_name_or_path", request.getfixturevalue(model), *arguments]
    )
    script.main()
    nothing = {"puzzles": 2, "samples": 4, "mean@2": 0.0, "pass@1": 0.0, "pass@2": 0.0}
    assert json.loads(output.read_text())["scores"] == {"overall": nothing}


def test_other_tasks_need_a_model():
    with pytest.raises(ValueError, match="--model_name_or_path"):
        script.EvaluationArguments(task="chain_sum")
