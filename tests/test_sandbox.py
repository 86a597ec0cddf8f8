"""Answers are scored apart from training: what they run there harms nobody, and no scorer is hindered."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytest.importorskip("reasoning_gym")
EXAMPLES = str(Path(__file__).parents[1] / "examples")
ALONE = str(Path(EXAMPLES, "tasks"))  # where the sandbox is imported without the tasks, and so in a moment
sys.path.insert(0, EXAMPLES)

from reasoning_gym.factory import DATASETS, create_dataset  # noqa: E402
from tasks import load_task  # noqa: E402
from tasks.sandbox import Sandbox  # noqa: E402


CONFIG = {"seed": 1, "size": 5}


@pytest.fixture(scope="module")
def spiral():
    """A scorer that evaluates answers as Python."""
    return Sandbox("spiral_matrix", CONFIG, seconds=1.0, num_workers=1), create_dataset("spiral_matrix", **CONFIG)[0]


def test_right_and_wrong_answers(spiral):
    sandbox, entry = spiral
    right = entry["answer"]
    before = sandbox.failures
    assert sandbox.score([right, "1 2", f"{right.split()}", ""], [entry] * 4) == [1.0, 0.0, 0.1, 0.0]
    assert sandbox.failures == before


# Each evaluates to the right answer, but for what it does first
ATTACKS = {
    "read": "open('/etc/hostname').read()",
    "write": "open({path!r}, 'w')",
    "overwrite Python": "open(__import__('os').__file__, 'a')",
    "shell": "__import__('os').system('touch ' + {path!r})",
    "process": "__import__('subprocess').run(['touch', {path!r}])",
    "network": "__import__('socket').socket()",
    "kill training": "__import__('os').kill(__import__('os').getppid(), 9)",
    "secrets": "__import__('os').environ['HF_TOKEN']",
    "secrets of training": "open('/proc/%d/environ' % __import__('os').getppid()).read()",
    "memory": "[1] * 10**10",
    "C": "__import__('ctypes').CDLL(None)",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_an_answer_may_not_do(attack, spiral, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sandbox, entry = spiral
    answer = "[{attack}, {numbers}][1]".format(attack="{}", numbers=entry["answer"].split())
    harmless, harmful = (answer.format(code) for code in ("1", ATTACKS[attack].format(path=str(tmp_path / "file"))))
    assert sandbox.score([harmless, harmful, harmless], [entry] * 3) == [0.1, 0.0, 0.1]
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("answer", "is_counted"),
    [
        ("exit()", 0),
        ("9**9**9**9", 1),
        ("__import__('os')._exit(0)", 1),
        ("[__import__('signal').signal(14, 1), 9**9**9**9]", 1),  # deaf to its own timer
    ],
)
def test_an_answer_that_does_not_return(answer, is_counted, spiral):
    sandbox, entry = spiral
    before, start = sandbox.failures, time.monotonic()
    assert sandbox.score([answer, entry["answer"]], [entry] * 2) == [0.0, 1.0]  # the next one finds a scorer
    assert sandbox.failures - before == is_counted
    assert time.monotonic() - start < 60.0


def test_the_network_is_out_of_reach():
    # Whatever the audit hooks let through, on kernels that allow it
    code = (
        f"import sys; sys.path.insert(0, {ALONE!r}); import ctypes, os, sandbox\n"
        "left = ctypes.CDLL(None).unshare(sandbox.NEW_USER_AND_NETWORK)\n"
        "print(left, sorted(os.listdir('/sys/class/net')) if left else open('/proc/self/net/dev').read().count(':'))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if output[0] != "0":
        pytest.skip("this kernel doesn't let a process leave the network")
    assert output[1] == "1"  # the loopback, which is down


def test_the_reward_counts_failures():
    train_dataset, _, reward, _ = load_task("spiral_matrix", train_size=3)
    answers, logged = [*train_dataset["answer"][:2], "__import__('os')._exit(0)"], {}
    completions = [
        [{"role": "assistant", "content": f"<think>x</think><answer>{answer}</answer>"}] for answer in answers
    ]
    completions[1] = [{"role": "assistant", "content": answers[1]}]  # without its tags
    scores = reward(completions=completions, question=train_dataset["question"], log_metric=logged.__setitem__)
    assert scores == [1.0, 0.0, 0.0]
    assert logged == {"scorer_failures": 1}
    reward(completions=completions[:1], question=train_dataset["question"][:1], log_metric=logged.__setitem__)
    assert logged == {"scorer_failures": 0}  # of this batch


def test_a_scorer_does_not_outlive_training():
    code = (
        f"import sys; sys.path.insert(0, {ALONE!r}); from sandbox import Sandbox\n"
        f"sandbox = Sandbox('spiral_matrix', {CONFIG}, seconds=2.0, num_workers=1)\n"
        "worker = sandbox._start(); print(worker.pid, flush=True)\n"
        "sandbox.workers.get(); sandbox.workers.put(worker)\n"
        "sandbox.score(['9**9**9**9'], [{'answer': '1'}])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30.0
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def score_here(dataset, answer, entry):
    try:
        return dataset.score_answer(answer, entry)
    except Exception:  # as some do with an answer that they can't read
        return 0.0


@pytest.mark.slow
def test_no_scorer_is_hindered():
    different = []
    for task in sorted(DATASETS):
        if task == "composite":  # made of the others, which it has to be given
            continue
        dataset = create_dataset(task, **CONFIG)
        entries = [dataset[i] for i in range(2)]
        answers = [entry["answer"] or "" for entry in entries] + ["7"]
        expected = [score_here(dataset, *pair) for pair in zip(answers, [*entries, entries[0]], strict=True)]
        scores = Sandbox(task, CONFIG, num_workers=1).score(answers, [*entries, entries[0]])
        if scores != expected:
            different.append((task, scores, expected))
    assert not different


def test_a_task_that_does_not_start():
    with pytest.raises(RuntimeError, match="scorer of 'nothing' doesn't start"):
        Sandbox("nothing", CONFIG).score(["1"], [{}])
