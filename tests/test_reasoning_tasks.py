import os
import subprocess
import sys

import pytest

from trl_rlad.scripts.tasks import load_task
from trl_rlad.scripts.tasks.reasoning import extract_answer, score_roles


pytest.importorskip("reasoning_gym")


ENTRY = {
    "metadata": {
        "names": ["Jack", "Jackson", "Zoey"],
        "solution": (True, False, True),
        "knight_knave_terms": {"knight": "altruist", "knave": "egoist"},
    }
}
RIGHT = "(1) Jack is an altruist\n(2) Jackson is an egoist\n(3) Zoey is an altruist"


def tagged(answer, thinking="hmm"):
    return f"<think>{thinking}</think>\n<answer>{answer}</answer>"


def message(content, **fields):
    return {"role": "assistant", "content": content, **fields}


@pytest.mark.parametrize(
    ("content", "reward"),
    [
        # Right: 1 for the format + 2 for the answer = 3
        (tagged(RIGHT), 3.0),
        (tagged(RIGHT.upper()), 3.0),
        (tagged("**Zoey**: altruist; **Jackson**: egoist; **Jack**: altruist"), 3.0),
        (tagged("Jack is a altruist, Jackson is a egoist, and Zoey is a altruist."), 3.0),
        (f"First.\n<think>hmm</think>\nIn short:\n<answer>\n{RIGHT}\n</answer>\nDone.", 3.0),
        (f"hmm</think><answer>{RIGHT}</answer>", 3.0),  # the chat template opened the thinking
        # Readable but wrong: 1 - 1.5 = -0.5
        (tagged(RIGHT.replace("Zoey is an altruist", "Zoey is an egoist")), -0.5),
        (tagged("Jack is an egoist, Jackson is an altruist, Zoey is an egoist"), -0.5),
        (tagged("Jackson is an altruist, Jack is an egoist, Zoey is an altruist"), -0.5),
        # Unreadable: 1 - 2 = -1
        (tagged(""), -1.0),
        (tagged("I do not know"), -1.0),
        (tagged("(1) Jack is an altruist\n(2) Jackson is an egoist"), -1.0),  # someone missing
        (tagged("Jack is an altruist, Jackson is an egoist, Zoey"), -1.0),  # without a role
        (tagged(RIGHT + "\n(4) Zoey is an altruist"), -1.0),  # named twice
        (tagged(RIGHT + "\n(4) Zoey is an egoist"), -1.0),
        (tagged(RIGHT + "\n(4) Emma is an egoist"), -1.0),  # not in the puzzle
        (tagged(RIGHT.replace("Zoey", "Jack")), -1.0),
        (tagged(RIGHT.replace("Zoey", "Zoeys")), -1.0),
        (tagged(RIGHT.replace("an egoist", "not an altruist")), -1.0),
        (tagged(RIGHT.replace("an egoist", "an altruist/egoist")), -1.0),
        (tagged(RIGHT.replace("an egoist", "a knave")), -1.0),  # not a word of this puzzle
        # Wrong format: -1 - 2 = -3, whatever the answer
        ("", -3.0),
        (RIGHT, -3.0),
        (f"<answer>{RIGHT}</answer>", -3.0),
        (f"<think>hmm</think>{RIGHT}", -3.0),
        ("<think>hmm, Jack is", -3.0),  # truncated
        (f"<think>hmm</think><answer>{RIGHT}", -3.0),
        (f"<think>hmm<answer>{RIGHT}</answer>", -3.0),
        (f"<think>hmm</think><answer>{RIGHT}</answer><answer>{RIGHT}</answer>", -3.0),
        (tagged(RIGHT, thinking=f"<answer>{RIGHT}</answer>"), -3.0),
        (f"<think><think>hmm</think><answer>{RIGHT}</answer>", -3.0),
        (f"<answer>{RIGHT}</answer><think>hmm</think>", -3.0),
        (f"<think>hmm<answer></think>{RIGHT}</answer>", -3.0),
        (f"</think>hmm<think><answer>{RIGHT}</answer>", -3.0),
        (f"<Think>hmm</Think><Answer>{RIGHT}</Answer>", -3.0),
    ],
)
def test_score_roles(content, reward):
    assert score_roles(extract_answer(message(content)), ENTRY) == reward


@pytest.mark.parametrize("field", ["reasoning_content", "thinking"])
def test_extract_answer_from_a_parsed_response(field):
    assert extract_answer(message("<answer> 4 </answer>", **{field: "2 + 2"})) == "4"
    assert extract_answer(message("", **{field: "2 + 2, truncated"})) is None
    assert extract_answer(message("<answer>4</answer>", **{field: "</think>"})) is None


@pytest.fixture(scope="module")
def roles():
    return load_task("knights_knaves", 21, 14, seed=3, task_kwargs={"n_people": [*range(2, 9)]})


def test_knights_knaves(roles):
    train, held_out, reward, best = roles
    assert best == 3.0
    for dataset, share in ((train, 3), (held_out, 2)):
        assert sorted(dataset["difficulty"]) == sorted([str(n) for n in range(2, 9)] * share)
    for row in train:
        system, user = row["prompt"]
        assert (system["role"], user["role"]) == ("system", "user")
        assert all(tag in system["content"] for tag in ("<think>", "</think>", "<answer>", "</answer>"))
        assert row["question"].startswith(user["content"]) and user["content"].endswith("?")
    completions = [[message(tagged(answer))] for answer in train["answer"]]
    columns = {name: train[name] for name in train.column_names}
    assert reward(completions=completions, trainer_state=None, **columns) == [3.0] * len(train)
    assert reward.__name__ == "knights_knaves_reward"


def test_knights_knaves_are_held_out_by_statements():
    # Two people have few different puzzles, so nearly every one would come back with other names
    with pytest.raises(ValueError, match=r"Found only \d+ different questions of 'knights_knaves'"):
        load_task("knights_knaves", 500, 100)


@pytest.mark.parametrize(
    ("task", "wrong"),
    [("chain_sum", "0.5"), ("countdown", "1 + 1"), ("leg_counting", "a hundred"), ("prime_factorization", "many")],
)
def test_other_tasks(task, wrong):
    train, held_out, reward, _ = load_task(task, 8, 4)
    assert (len(train), len(held_out)) == (8, 4)

    def score(contents):
        return reward(completions=[[message(content)] for content in contents], question=train["question"])

    assert score([tagged(answer) for answer in train["answer"]]) == [1.0] * 8
    assert all(0 <= value < 1 for value in score([tagged(wrong)] * 8))
    assert score(train["answer"]) == [0.0] * 8  # without the tags
    assert reward.__name__ == f"{task}_reward"


def test_tasks_without_a_single_right_answer():
    train, held_out, *_ = load_task("graph_color", 2)
    assert train["answer"] == ["", ""] and len(held_out) == 0


@pytest.mark.parametrize("task", ["knights_knaves", "chain_sum", "list_functions"])
def test_generation_is_seeded_and_held_out(task):
    train, held_out, *_ = load_task(task, 30, 10, seed=1)
    again, held_out_again, *_ = load_task(task, 20, 10, seed=1)
    assert train["prompt"][:20] == again["prompt"][:]
    assert held_out["prompt"][:] == held_out_again["prompt"][:]
    assert len({*train["question"], *held_out["question"]}) == 40
    neighbor, *_ = load_task(task, 30, 10, seed=2)
    assert len({*train["question"]} & {*neighbor["question"]}) < 5


def test_repeated_questions_are_replaced():
    train, held_out, *_ = load_task("tower_of_hanoi", 50, 20)  # 1000 draws give about 90 questions
    assert len({*train["question"], *held_out["question"]}) == 70


@pytest.mark.parametrize(
    ("task", "task_kwargs", "error"),
    [
        ("knight_knave", {}, r"Unknown `task` 'knight_knave'.* among the \d{3} tasks: .*knights_knaves"),
        ("chain_sum", {"n_people": 3}, r"Unknown `task_kwargs` \['n_people'\].*'chain_sum': .*'max_terms'"),
        ("chain_sum", {"seed": 3}, r"Unknown `task_kwargs` \['seed'\]"),
        ("chain_sum", {"min_terms": 0}, r"Bad `task_kwargs` {'min_terms': 0} for 'chain_sum': min_terms must be"),
        ("knights_knaves", {"n_people": 1}, "2 <= `width_constraint` < 2 \\* `n_people`"),
        ("knights_knaves", {"n_people": [2, 3], "width_constraint": 4}, "2 <= `width_constraint` < 2 \\* `n_people`"),
        ("knights_knaves", {"depth_constraint": 1}, "`depth_constraint` >= 2"),
        ("knights_knaves", {"n_people": "many"}, "Bad `task_kwargs` {'n_people': 'many'}"),
        ("coin_flip", {"min_trials": 1, "max_trials": 1}, "Ask for fewer, or make room with `task_kwargs`"),
    ],
)
def test_errors(task, task_kwargs, error):
    with pytest.raises(ValueError, match=error):
        load_task(task, 10000 if task == "coin_flip" else 4, task_kwargs=task_kwargs)


def test_missing_reasoning_gym(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ImportError, match=r'pip install "trl-rlad\[tasks\]"'):
        load_task("chain_sum", 1)


def test_processes_generate_the_same_questions():
    code = "from trl_rlad.scripts.tasks import load_task; print(load_task('knights_knaves', 5)[0]['question'][:])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs != {b""}
