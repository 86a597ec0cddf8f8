"""A teacher behind vLLM's own servers, which `examples/serve_teacher.sh` sets up and starts, as a user would."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
import tiny
import torch
from test_routing import MODES, train
from test_server import make_args
from test_teacher_scorer import assert_names, make_batch, naive_scores
from transformers import TrainerCallback

from trl_rlad import RLADTrainer
from trl_rlad.teachers import ServedTeacher, client


ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


class VLLM:
    """A server, and the processes that belong to it."""

    def __init__(self, model, folder, port=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = port or free.getsockname()[1]
        self.port, self.url, self.log = port, f"http://127.0.0.1:{port}", Path(folder, f"{port}.log")
        command = [
            ROOT / "examples" / "serve_teacher.sh",
            model,
            "--port",
            str(port),
            "--served-model-name",
            "teacher",
        ]
        with self.log.open("w") as log:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)

    def count_requests(self):
        """Completions that it has answered, by its own count."""
        lines = urlopen(f"{self.url}/metrics").read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total"))

    def kill(self):
        with suppress(ProcessLookupError):  # the workers outlive the server for a while
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    """vLLM's kernels for CPUs take heads of 32 numbers and more."""
    return tiny.save_model(tmp_path_factory.mktemp("served"), seed=1, hidden_size=32, vocab_size=40, head_dim=32)


@pytest.fixture(scope="module")
def servers(teacher_path, tmp_path_factory):
    subprocess.run([ROOT / "examples" / "serve_teacher.sh"], check=True, timeout=900)
    folder = tmp_path_factory.mktemp("logs")
    servers = [VLLM(teacher_path, folder) for _ in range(2)]
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()


@pytest.fixture(scope="module")
def ready(servers, tmp_path_factory):
    """The handshake waits for them: minutes on a busy machine."""
    urls = [server.url for server in servers]
    ServedTeacher(urls, None, make_args(tmp_path_factory.mktemp("ready"), urls, patience=600.0))
    return servers


@pytest.mark.parametrize("top_k", [0, 3, 20])
def test_scores_are_the_local_ones(top_k, ready, teacher_path, tmp_path):
    teacher = ServedTeacher([ready[0].url], None, make_args(tmp_path, ready[0].url))
    scorer = tiny.make_scorer(teacher, 1, nameable_ids=range(40))
    for seed in range(3):
        batch = make_batch(seed, rows=20, prompt=30, completion=50)
        scores = scorer.score(batch, batch["completion_mask"], top_k)
        expected = naive_scores(teacher_path, batch, temperature=1.0)
        torch.testing.assert_close(scores["teacher_per_token_logps"], expected, rtol=0, atol=1e-4)
        if top_k:
            assert_names(scores, teacher_path, batch, top_k, shared=40)


@pytest.mark.parametrize("mode", MODES, ids=["trrd", "named"])
def test_three_steps_are_those_of_a_local_teacher(mode, ready, student_path, teacher_path, tmp_path):
    local = train(student_path, teacher_path, tiny.make_dataset(), tmp_path, **mode)
    urls, before = [server.url for server in ready], [server.count_requests() for server in ready]
    served = train(student_path, None, tiny.make_dataset(), tmp_path, teacher_server_urls=urls, **mode)
    for ours, theirs in zip(local.model.parameters(), served.model.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    # One for the handshake, and a share of what was to be scored
    assert all(server.count_requests() - count > 5 for server, count in zip(ready, before, strict=True))


def test_knights_and_knaves(servers, tmp_path):
    """With the mini teacher behind a URL, its accuracies and rewards are those with it at hand."""
    subprocess.run([sys.executable, ROOT / "examples/mini/widen_heads.py", tmp_path / "teacher"], check=True)
    server = VLLM(tmp_path / "teacher", tmp_path)
    job = [sys.executable, "-m", "accelerate.commands.launch", ROOT / "examples/rlad_grpo.py", "--max_steps", "3"]
    job += [
        "--config",
        ROOT / "examples/mini/knights.yaml",
        "--eval_size",
        "24",
        "--save_strategy",
        "no",
        "--logging_steps",
        "1",
    ]
    rewards = []
    try:
        for name, options in {"here": [], "there": ["--teacher_server_urls", server.url]}.items():
            command = [*job, "--output_dir", tmp_path / name, *options]
            run = subprocess.run(command, capture_output=True, text=True, timeout=900)
            assert run.returncode == 0, run.stderr[-3000:]
            log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
            rewards.append([(entry["reward"], entry["teacher/log_ratio"]) for entry in log if "loss" in entry])
    finally:
        server.kill()
    assert len(rewards[0]) == 3
    assert rewards[1] == [pytest.approx(step, rel=1e-3) for step in rewards[0]]


class KillAt(TrainerCallback):
    def __init__(self, server, step):
        self.server, self.step = server, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(self.server.process.pid, signal.SIGKILL)


def test_a_server_that_dies_in_the_middle_does_not_lose_the_run(ready, student_path, tmp_path):
    urls, before = [server.url for server in ready], [server.count_requests() for server in ready]
    args = make_args(tmp_path, urls, patience=60.0, max_steps=8)
    kill = KillAt(ready[0], 4)
    trainer = RLADTrainer(student_path, tiny.reward, args, tiny.make_dataset(), callbacks=[kill])
    shares = [server.count_requests() - count for server, count in zip(ready, before, strict=True)]
    assert shares == [1, 1]  # the handshake
    start = time.monotonic()
    trainer.train()
    assert trainer.state.global_step == 8 and ready[0].process.wait(5) == -signal.SIGKILL
    assert time.monotonic() - start < 60.0


class KillInBatch:
    """Kill the server, in each of these steps, while some rows of the batch are answered and others aren't, and start
    one of another path in its place."""

    __name__ = "reward"

    def __init__(self, server, paths):
        self.server, self.paths, self.answered = server, paths, []

    def __call__(self, completion_ids, trainer_state, **kwargs):
        if path := self.paths.pop(trainer_state.global_step, None):
            rows = list(self.trainer.teacher_scorer.scorers[""]._sent.values())
            while not any(row.done() for row in rows):
                time.sleep(0.001)
            self.server.kill()
            self.answered.append((sum(row.done() for row in rows), len(rows)))
            self.server = VLLM(path, self.server.log.parent, self.server.port)
        return tiny.reward(completion_ids)


def test_a_server_that_is_started_again_in_the_middle_of_a_batch(student_path, teacher_path, tmp_path, monkeypatch):
    """With the same weights the run goes on with a local teacher's numbers; with others it ends with that reason."""
    monkeypatch.setattr(client, "IN_FLIGHT", 1)  # so that a batch takes a while
    settings = {"per_device_train_batch_size": 8, "max_steps": 4}
    local = train(student_path, teacher_path, tiny.make_dataset(), tmp_path, **settings)
    other = tiny.save_model(tmp_path / "other", seed=2, hidden_size=32, vocab_size=40, head_dim=32)
    kill = KillInBatch(VLLM(teacher_path, tmp_path), {1: teacher_path, 3: other})
    try:
        args = make_args(tmp_path, kill.server.url, patience=600.0, save_strategy="steps", save_steps=3, **settings)
        kill.trainer = trainer = RLADTrainer(student_path, kill, args, tiny.make_dataset())
        with pytest.raises(ValueError, match="nats apart from before .* doesn't serve the model with which"):
            trainer.train()
    finally:
        kill.server.kill()
    assert trainer.state.global_step == 3 and all(0 < done < rows for done, rows in kill.answered)
    names = ("loss", "reward", "teacher/log_ratio", "grad_norm")
    logs = [[log for log in each.state.log_history if "loss" in log] for each in (trainer, local)]
    for ours, theirs in zip(*logs, strict=False):
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-3, abs=1e-5)
    assert len(logs[0]) == 3
