"""Answers are scored apart from training: what they run there harms nobody, and no scorer is hindered."""

import math
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_rlad.scripts import tasks
from trl_rlad.scripts.tasks import load_task
from trl_rlad.scripts.tasks import sandbox as sandbox_module
from trl_rlad.scripts.tasks.sandbox import Sandbox, evaluate


pytest.importorskip("reasoning_gym")
ALONE = str(Path(tasks.__file__).parent)  # where the sandbox is imported without the tasks, and so in a moment

from reasoning_gym.factory import DATASETS, create_dataset  # noqa: E402
from sympy.parsing import sympy_parser  # noqa: E402


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


PACK = "__import__('struct').pack"
CLAIMS = ["b'1.0\\n'", f"{PACK}('d', 1.0)", f"{PACK}('Qd', 2, 1.0)"]
OS, MAIN = "__import__('os')", "__import__('sys').modules['__main__']"
HERE = "__import__('sys')._getframe({})"
NUMBER = f"{HERE.format(3)}.f_locals['number']"  # of the request, if the frames of the process are this many
# Python that answers are tried with. Each harms, or gives a score, where it runs
ATTACKS = [
    # Write to every descriptor, a score or half of it, close it, read from it
    *(f"[{OS}.write({file}, {claim} * 9) for _ in '1']" for file in range(10) for claim in CLAIMS),
    *(f"{OS}.close({file})" for file in range(10)),
    f"[{OS}.write(file, b'1.') for file in range(3, 10)]",
    f"{OS}.read(3, 9)",
    f"{OS}.dup2(1, 4)",
    "open('/proc/self/fd/1', 'wb').write(b'1.0')",
    f"open(f'/proc/{{{OS}.getppid()}}/fd/4', 'wb').write(b'1.0')",
    "print('1.0')",
    # A reply for the next answer behind its own
    *(f"{OS}.write({file}, {PACK}('QdQd', {NUMBER}, 0.0, {NUMBER} + 1, 0.0))" for file in range(10)),
    # No numbers, or out of range
    *(f"setattr({HERE.format(1)}.f_locals['self'].__class__, 'score_answer', lambda *_: {x})" for x in CLAIMS),
    *(f"setattr({MAIN}, 'float', lambda _: {value})" for value in ("float('nan')", "float('inf')", "1e30", "-1.0")),
    f"setattr({MAIN}, 'SCORE', None)",
    f"{MAIN}.SCORE.pack(float('nan'))",
    # Patch what is used again
    f"setattr({OS}, 'write', lambda *_: 1)",
    f"setattr({OS}, '_exit', lambda _: None)",
    f"setattr({OS}, 'fork', lambda: 0)",
    *(f"setattr(__import__('builtins'), {name!r}, lambda *_: 1)" for name in ("len", "str", "float", "isinstance")),
    f"{HERE.format(1)}.f_locals['entry'].update(answer='x')",
    f"{HERE.format(1)}.f_locals['self'].__dict__.clear()",
    f"{MAIN}.__dict__.clear()",
    "__import__('sys').modules.clear()",
    "[each.clear() for each in __import__('gc').get_objects() if type(each) is dict]",
    "__import__('sys').settrace(lambda *_: 1 / 0)",
    "__import__('sys').setrecursionlimit(5)",
    "__import__('atexit').register(print, 1.0)",
    "__import__('threading').Thread(target=print).start()",
    "__import__('ctypes').CDLL(None)",
    "__import__('ctypes').pythonapi",
    "exec('import os; os.x = 1')",
    # The right answer, from the frame around
    "oracle_answer.split()",
    "entry['answer'].split()",
    f"{HERE.format(1)}.f_locals['oracle_answer'].split()",
    "type('Right', (str,), {'__str__': lambda _: 'x', '__eq__': lambda *_: True})()",
    # Further processes
    f"{OS}.fork()",
    f"[{OS}.fork() for _ in range(9)]",
    f"{OS}.system('touch PATH')",
    f"{OS}.popen('touch PATH').read()",
    f"{OS}.execv('/bin/true', ['true'])",
    f"{OS}.posix_spawn('/bin/touch', ['touch', 'PATH'], {{}})",
    "__import__('subprocess').run(['touch', 'PATH'])",
    "__import__('multiprocessing').Process(target=print).start()",
    "__import__('pty').spawn('sh')",
    # An end, or none
    "exit()",
    f"{OS}._exit(0)",
    f"{OS}.abort()",
    "(_ for _ in ()).throw(KeyboardInterrupt)",
    "9**9**9**9",
    "[0 for _ in iter(int, 1)]",
    "__import__('time').sleep(99)",
    "__import__('signal').pause()",
    "input()",
    "__import__('re').match('(a+)+$', 'a' * 40 + 'b')",
    "(lambda f: f(f))(lambda f: f(f))",
    "(" * 300 + ")" * 300,
    "-" * 100_000 + "1",
    f"{OS}.write(4, b'1.') or __import__('time').sleep(99)",
    # Signals, to others and to their own
    *(f"{OS}.kill({OS}.getppid(), {number})" for number in (9, 15, 19, 2)),
    f"{OS}.killpg(0, 9)",
    "[__import__('signal').signal(14, 1), 9**9**9**9]",
    "__import__('signal').raise_signal(11)",
    "__import__('signal').pthread_sigmask(0, range(1, 32))",
    # Memory
    "[1] * 10**10",
    "'x' * 10**11",
    "bytearray(10**11)",
    "[[0] * 10**6 for _ in range(10**6)]",
    "__import__('mmap').mmap(-1, 10**11)",
    # Files, secrets, the network
    "open('/etc/hostname').read()",
    "open('PATH', 'w')",
    "open(__import__('os').__file__, 'a')",
    f"{OS}.remove('PATH')",
    f"{OS}.environ['HF_TOKEN']",
    f"open(f'/proc/{{{OS}.getppid()}}/environ').read()",
    "__import__('socket').socket()",
    "__import__('urllib.request').request.urlopen('http://127.0.0.1:9')",
]


class UnguardedSandbox(Sandbox):
    """One whose scorers do run the answers."""

    program = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {ALONE!r}); import sandbox\n"
               "sys.modules['__main__'] = sandbox\nsandbox.evaluate = eval\nsandbox.serve()"]  # fmt: skip


def try_attacks(sandbox, entry, folder):
    """The scores of all attacks. Before and after each, the right answer has its own."""
    right = entry["answer"]
    assert sandbox.score([right], [entry]) == [1.0]
    worker = sandbox.workers.get()
    sandbox.workers.put(worker)
    answers = [answer.replace("PATH", str(folder / "file")) for attack in ATTACKS for answer in (right, attack)]
    scores = sandbox.score([*answers, right, str(right.split())], [entry] * (len(answers) + 2))
    assert scores[::2] == [1.0] * (len(ATTACKS) + 1) and scores.pop() == 0.1
    assert not (folder / "file").exists()
    assert sandbox.workers.get() is worker  # it has never been in doubt
    sandbox.workers.put(worker)
    return scores[1::2]


def test_no_code_of_an_answer_runs(spiral, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sandbox, entry = spiral
    assert len(ATTACKS) > 100
    assert try_attacks(sandbox, entry, tmp_path) == [0.0] * len(ATTACKS)


def test_no_code_of_a_formula_runs(tmp_path):
    # As sympy reads it, which is looser
    entry = create_dataset("countdown", **CONFIG)[0]
    sandbox = Sandbox("countdown", CONFIG, seconds=1.0)
    answers = [attack.replace("PATH", str(tmp_path / "file")) for attack in ATTACKS]
    answers += [f"{entry['answer']} + 0*len({attack})" for attack in answers[::10]]
    assert max(sandbox.score(answers, [entry] * len(answers))) <= 0.05  # what reading the right numbers has
    assert sandbox.score([entry["answer"]], [entry]) == [1.0] and not (tmp_path / "file").exists()


@pytest.mark.slow
def test_code_that_does_run_has_no_part_in_other_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sandbox = UnguardedSandbox("spiral_matrix", CONFIG, seconds=0.5, num_workers=1)
    scores = try_attacks(sandbox, create_dataset("spiral_matrix", **CONFIG)[0], tmp_path)
    assert all(0.0 <= score <= 1.0 for score in scores)
    assert max(scores) > 0.0  # of its own, as it has run


@pytest.mark.parametrize(
    "text",
    ["[[1, -2], ['a', 3.5]]", "2 ** 5 - 7 // 2", "5!", "x**2/2 + C", "sqrt(2)*log(x) + sin(x)**2 + exp(-x)", "3.7[2]",
     "abs(3 - 5)", "max(1, 2) + pi + I", "atan2(1, y) - gamma(3) + floor(2.5)"],
)  # fmt: skip
def test_literals_and_formulas_are_read_as_by_eval(text, monkeypatch):
    expected = sympy_parser.parse_expr(text)
    monkeypatch.setattr(sympy_parser, "eval", evaluate, raising=False)
    assert sympy_parser.parse_expr(text) == expected


@pytest.mark.parametrize(
    "text", ["x.diff()", "sin(x, evaluate=False)", "[x for x in y]", "lambda: 1", "x[0]", "S('1')", "Integral(x, x)",
             "lambdify(x, x)", "(sin)(x)(y)", "f'{x}'", "1 if x else 2", "sin(*y)", "(y := 1)", "x < 1",
             "symbols('a')"]
)  # fmt: skip
def test_what_is_no_formula_is_refused(text, monkeypatch):
    monkeypatch.setattr(sympy_parser, "eval", evaluate, raising=False)
    with pytest.raises((ValueError, SyntaxError, TypeError)):
        sympy_parser.parse_expr(text, transformations=())


@pytest.mark.parametrize(("answer", "is_counted"), [("exit()", 0), ("9**9**9**9", 1)])
def test_an_answer_that_does_not_return(answer, is_counted, spiral):
    sandbox, entry = spiral
    before, start = sandbox.failures, time.monotonic()
    assert sandbox.score([answer, entry["answer"]], [entry] * 2) == [0.0, 1.0]
    assert sandbox.failures - before == is_counted
    assert time.monotonic() - start < 60.0


def test_a_reply_that_does_not_come_or_is_of_another_request_is_no_score(spiral, monkeypatch):
    sandbox, entry = spiral
    monkeypatch.setattr(sandbox_module, "SPARE_SECONDS", -0.9)
    before = sandbox.failures
    worker = sandbox.workers.get()
    worker.send_signal(signal.SIGSTOP)  # in the middle of an exchange
    sandbox.workers.put(worker)
    assert sandbox.score([entry["answer"]], [entry]) == [0.0] and worker.poll() == -signal.SIGKILL
    monkeypatch.undo()
    assert sandbox.score([entry["answer"]], [entry]) == [1.0]
    sandbox.numbers = iter([7])
    worker = sandbox.workers.get()
    sandbox.workers.put(worker)
    exchange = sandbox_module.exchange
    monkeypatch.setattr(sandbox_module, "exchange", lambda *args: (6, exchange(*args)[1]))
    assert sandbox.score([entry["answer"]], [entry]) == [0.0] and sandbox.failures == before + 2


class ClaimingSandbox(Sandbox):
    """One whose forks send as their claim the bytes that the answer says."""

    program = [sys.executable, "-I", "-c", f"import os, sys; sys.path.insert(0, {ALONE!r}); import sandbox\n"
               "sandbox.judge = lambda dataset, answer, entry, pipe, confine: "
               "(os.write(pipe, bytes.fromhex(answer)), os._exit(0))\nsandbox.serve()"]  # fmt: skip


def test_only_a_number_from_0_to_1_is_a_score():
    sandbox = ClaimingSandbox("spiral_matrix", CONFIG, num_workers=1)
    half = struct.pack("d", 0.5)
    claims = [
        half,
        *(struct.pack("d", value) for value in (30.0, -1.0, math.nan, math.inf)),
        half + b"x",
        half[1:],
        b"",
    ]
    scores = sandbox.score([claim.hex() for claim in claims], [{}] * len(claims))
    assert scores == [0.5] + [0.0] * 7 and sandbox.failures == 7


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


def test_the_reward_counts_failures(monkeypatch):
    monkeypatch.setattr("trl_rlad.scripts.tasks.reasoning.Sandbox", UnguardedSandbox)
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
