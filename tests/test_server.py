"""A teacher behind a URL, against a server of ours that fails by script; `test_vllm.py` has a real one."""

import atexit
import json
import logging
import os
import re
import shutil
import threading
import time
import traceback
import tracemalloc
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from teacher_server import (
    FAULTS,
    SGLangServer,
    TeacherServer,
    changed,
    corrupt,
    die,
    drip,
    echo_key,
    is_check,
    long,
    packed,
    right,
    set_last,
    status,
    stuck,
)
from tenacity import wait_fixed
from test_routing import MODES, assert_scores, make_dataset, train
from test_teacher_scorer import assert_names, make_batch, naive_scores
from transformers import AutoModelForCausalLM

from trl_rlad import RLADTrainer, cli
from trl_rlad.commands.compare import compare
from trl_rlad.scoring import served
from trl_rlad.teachers import ServedTeacher, ServerError, client
from trl_rlad.teachers.server import read_logp


HOPELESS = {"positive", "no scores"}  # of those faults


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    opened, open_servers = [], client.Servers._open
    monkeypatch.setattr(client.Servers, "_open", lambda self: opened.append(self) or open_servers(self))
    monkeypatch.setattr(client, "WAIT", wait_fixed(0.02))
    monkeypatch.setattr(client, "POLL", 2.0)  # a busy machine needs it for the check of two servers
    monkeypatch.setenv("VLLM_API_KEY", "open-sesame\n")  # as in a file that a secret is mounted from
    yield
    for each in opened:
        each.close()


@pytest.fixture
def serve(teacher_path):
    """Start servers, of `teacher_path` unless told otherwise."""
    with ExitStack() as stack:
        yield lambda path=teacher_path, kind=TeacherServer, **kwargs: stack.enter_context(kind(path, **kwargs))


def make_args(folder, urls, patience=20.0, **kwargs):
    return tiny.make_config(folder, teacher_server_urls=urls, teacher_timeout=2 * patience, **kwargs)


def make_scorer(folder, *servers, failure="raise", patience=20.0, **kwargs):
    urls = [server.url for server in servers]
    teacher = ServedTeacher(urls, None, make_args(folder, urls, **kwargs))
    teacher.servers.patience = patience  # less is for what fails: a busy machine answers nothing within a moment
    return tiny.make_scorer(teacher, 1, nameable_ids=range(40), on_failure=failure)


def assert_right(scorer, teacher_path, seed=0):
    batch = make_batch(seed)
    scores = scorer.score(batch, batch["completion_mask"])
    expected = naive_scores(teacher_path, batch, temperature=1.0)
    assert (scores["teacher_mask"] == batch["completion_mask"].bool()).all()
    torch.testing.assert_close(scores["teacher_per_token_logps"], expected, rtol=0, atol=1e-5)


def test_scores_on_a_ragged_batch(serve, teacher_path, tmp_path):
    server = serve()
    assert_right(make_scorer(tmp_path, server), teacher_path)
    # Exactly the row's own tokens are sent, and equal rows once
    assert len(server.requests) == 7 and {request["prompt_logprobs"] for request in server.requests} == {0}
    assert {request["max_tokens"] for request in server.requests} == {1}  # none that is generated is wanted
    assert server.keys == {"Bearer open-sesame"}


def test_without_a_key_none_is_sent(serve, tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY")
    server = serve()
    make_scorer(tmp_path, server)
    assert server.keys == {None}


def test_attempts_are_made_after_a_pause_each(serve, teacher_path, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(client, "WAIT", lambda state: waits.append(state.attempt_number) or 0.02)
    server = serve()
    scorer = make_scorer(tmp_path, server)
    server.faults = [status(500)] * 2
    assert_right(scorer, teacher_path)
    assert len(waits) == 2


def test_what_the_settings_say_of_time_and_names_holds_for_servers(serve, tmp_path):
    server = serve()
    settings = {"teacher_kl_coef": 0.1, "teacher_kl": "forward", "teacher_top_k": 30}
    teacher = ServedTeacher([server.url], None, make_args(tmp_path, server.url, patience=7.0, **settings))
    assert teacher.servers.patience == 7.0  # half of `teacher_timeout`
    # A server that names fewer tokens than are wanted is found out before training
    assert {request["prompt_logprobs"] for request in server.requests} == {30}


@pytest.mark.parametrize("name", sorted(FAULTS.keys() - HOPELESS))
def test_what_passes_is_asked_again(name, serve, teacher_path, tmp_path):
    server = serve()
    scorer = make_scorer(tmp_path, server, patience=4.0 if name == "stuck" else 20.0)
    server.faults = [FAULTS[name]] * 2
    assert_right(scorer, teacher_path)
    assert len(server.requests) == 9


@pytest.mark.parametrize("name", sorted(FAULTS.keys() - HOPELESS))
def test_what_doesnt_pass_ends_training(name, serve, tmp_path):
    server = serve()
    scorer = make_scorer(tmp_path, server, patience=0.5)
    server.fault, batch = FAULTS[name], make_batch()
    with pytest.raises(ServerError, match=rf"{server.url} gave no answer that can be used: .* \d s\)\. .*resume"):
        scorer.score(batch, batch["completion_mask"])


@pytest.mark.parametrize("name", ["500", "nan", "reset"])
def test_one_row_that_fails_for_ever(name, serve, tmp_path):
    """The others are answered, so it isn't waited for until patience ends."""
    server, batch = serve(), make_batch()
    scorer = make_scorer(tmp_path, server, patience=1000.0)
    batch["completion_mask"][0] = 1
    unlucky = batch["completion_ids"][0].tolist()

    def fault(handler, answer):
        is_unlucky = handler.body["prompt"][-len(unlucky) :] == unlucky
        (FAULTS[name] if is_unlucky else right)(handler, answer)

    server.fault = fault
    with pytest.raises(ServerError, match=rf"\({client.ATTEMPTS} attempts, "):
        scorer.score(batch, batch["completion_mask"])


def test_what_the_server_refuses_is_not_asked_again(serve, tmp_path):
    server, batch = serve(), make_batch(rows=1)
    scorer = make_scorer(tmp_path, server)
    server.fault = status(400, "Requested prompt logprobs of 30, which is greater than max allowed: 20")
    with pytest.raises(ValueError, match=f"{server.url}/v1/completions doesn't accept .* 400, .*max allowed: 20"):
        scorer.score(batch, batch["completion_mask"])
    assert len(server.checks + server.requests) == 2  # before training, and then


@pytest.mark.parametrize("code", [500, 400, 301])
def test_the_key_is_told_to_nobody(code, serve, tmp_path, caplog):
    server, batch = serve(), make_batch()
    scorer = make_scorer(tmp_path, server, patience=1.0)
    server.fault, caplog.handler.level = echo_key(code), logging.DEBUG
    with caplog.at_level(logging.DEBUG), pytest.raises((ServerError, ValueError)) as caught:
        scorer.score(batch, batch["completion_mask"])
    assert "not with Bearer ***" in str(caught.value)
    assert "open-sesame" not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_an_answer_with_the_key_in_it(serve, tmp_path):
    server = serve()
    server.cards = [{"id": "not-open-sesame"}]
    with pytest.raises(ValueError, match=re.escape("serves not-***, and not another")) as caught:
        ServedTeacher([server.url], "another", make_args(tmp_path, server.url))
    assert "open-sesame" not in "".join(traceback.format_exception(caught.value))


def test_servers_share_the_load_and_stand_in_for_each_other(serve, teacher_path, tmp_path):
    servers = serve(), serve()
    scorer = make_scorer(tmp_path, *servers)
    assert_right(scorer, teacher_path)
    assert {len(server.requests) for server in servers} == {3, 4}
    servers[0].stop()
    for seed in (1, 2):
        assert_right(scorer, teacher_path, seed)
    servers[0].start(servers[0].port)
    assert_right(scorer, teacher_path, seed=3)


def test_a_server_that_fails_is_not_asked_first_while_another_one_answers(serve, tmp_path):
    servers = serve(), serve()
    scorer, ids = make_scorer(tmp_path, *servers), torch.arange(4, 8)
    servers[0].fault = status(500)
    for _ in range(20):  # one after the other, so that both are idle and the first would be taken
        future = scorer.teachers[""].submit(ids, ids)
        wait([future], timeout=5)
        assert future.done() or not future.cancel(), "it is asked in vain, over and over"
        assert future.result().logps.shape == (4,)
    assert [len(server.requests) for server in servers] == [0, 20]


def test_a_server_that_has_answered_since_is_given_its_time_again(serve, tmp_path, monkeypatch):
    server = serve()
    scorer, ids = make_scorer(tmp_path, server), torch.arange(4, 8)
    for ahead in (0.0, 1000.0):  # one failure now, and one long after
        clock = SimpleNamespace(monotonic=lambda ahead=ahead: time.monotonic() + ahead)
        monkeypatch.setattr(client, "time", clock)
        server.faults = [status(500)]
        assert scorer.teachers[""].submit(ids, ids).result(timeout=30).logps.shape == (4,)


def wait_until(holds, seconds=30):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for(number, *servers):
    """The requests that each server has, when so many are there."""
    wait_until(lambda: sum(len(server.requests) for server in servers) >= number)
    time.sleep(0.2)  # for those that are too many
    return [len(server.requests) for server in servers]


def count_at_once(servers, scorer, rows, number):
    """
    The requests that each server has before any is answered, when it is scored, rightly, and so many are expected.
    """
    batch, answering = make_batch(rows=rows, prompt=9), threading.Event()

    def hold(handler, answer):
        is_check(handler) or answering.wait(30)
        right(handler, answer)

    for server in servers:
        server.fault = hold
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(scorer.score, batch, batch["completion_mask"])
        counts = wait_for(number, *servers)
        answering.set()
        assert torch.equal(scores.result()["teacher_mask"], batch["completion_mask"].bool())
    return counts


@pytest.mark.parametrize("number", [1, 2])
def test_a_server_has_32_requests_at_once(number, serve, tmp_path):
    servers = [serve() for _ in range(number)]
    assert count_at_once(servers, make_scorer(tmp_path, *servers), 80, 32 * number) == [32] * number


def test_a_server_that_stands_in_for_another_one_has_32_requests_at_once(serve, tmp_path):
    servers = serve(), serve()
    scorer = make_scorer(tmp_path, *servers)
    servers[1].fault = status(500)
    assert count_at_once(servers[:1], scorer, 80, 32) == [32]


@pytest.mark.parametrize("end", ["answered", "failed", "refused", "called back"])
def test_what_has_come_to_an_end_is_not_under_way(end, serve, tmp_path):
    servers = serve(), serve()
    scorer, ids = make_scorer(tmp_path, *servers), torch.arange(4, 8)
    faults = {"answered": right, "failed": status(500), "refused": status(400), "called back": stuck}
    servers[0].faults = [faults[end]] * 7
    asked = [scorer.teachers[""].submit(ids, ids, url=servers[0].url) for _ in range(7)]
    if end == "called back":
        wait_for(7, *servers)
        assert all(future.cancel() for future in asked)
    else:
        assert all(isinstance(future.exception(), ValueError) == (end == "refused") for future in asked)
    scorer.teachers[""].submit(ids, ids, url=servers[0].url).result()  # it is well again
    servers[0].requests.clear()
    # Each row goes to the server with the fewest requests: both have none, so they share
    assert count_at_once(servers, scorer, 8, 8) == [4, 4]


# Deaths


def test_a_server_that_dies_in_the_middle_of_a_batch(serve, teacher_path, tmp_path):
    """Rows that are under way when the last answer comes are waited for like all others."""
    server, batch = serve(), make_batch()
    scorer = make_scorer(tmp_path, server)
    server.faults = [right, right, stuck, stuck, right, stuck, stuck]
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(scorer.score, batch, batch["completion_mask"])
        wait_for(7, server)
        server.stop()
        asked = len(server.requests)
        time.sleep(1.0)  # in which eight attempts have been made long since
        assert not scores.done()
        server.start(server.port)
        assert torch.equal(scores.result(timeout=20)["teacher_mask"], batch["completion_mask"].bool())
    assert len(server.requests) == asked + 4  # none was asked for while nobody was there, or again
    assert_right(scorer, teacher_path)


@pytest.mark.parametrize("pause", [0.02, 60.0])
@pytest.mark.parametrize("fault", [status(500), drip, stuck], ids=["500", "drip", "stuck"])
def test_nothing_is_asked_for_longer_than_promised(pause, fault, serve, tmp_path, monkeypatch):
    """Not while pauses last, or answers come byte by byte; and those that wait for a place aren't asked for anew."""
    monkeypatch.setattr(client, "IN_FLIGHT", 2)
    server, batch = serve(), make_batch()
    scorer = make_scorer(tmp_path, server, failure="grpo", patience=1.0)
    monkeypatch.setattr(client, "WAIT", wait_fixed(pause))
    server.fault, start = fault, time.monotonic()
    scorer.score(batch, batch["completion_mask"])
    assert scorer.failed_rows == 7 and 1.0 <= time.monotonic() - start < 6.0


def test_a_hundred_packed_megabytes_are_not_unpacked(serve, tmp_path):
    server, batch = serve(), make_batch(rows=1)
    scorer = make_scorer(tmp_path, server)
    server.faults = [packed]
    tracemalloc.start()
    scorer.score(batch, batch["completion_mask"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(server.requests) == 2 and peak < 50_000_000


def test_an_answer_is_read_to_its_greatest_length_only(serve, tmp_path):
    server, batch = serve(), make_batch(rows=1)
    scorer = make_scorer(tmp_path, server, patience=1.0)
    server.fault = long
    with pytest.raises(ServerError, match=r"an answer of more than 1\d{6} bytes"):
        scorer.score(batch, batch["completion_mask"])


@pytest.mark.parametrize("fault", [status(503), stuck], ids=["503", "stuck"])
def test_one_line_a_minute_says_what_is_waited_for(fault, serve, tmp_path, monkeypatch, caplog):
    server, batch = serve(), make_batch()
    scorer = make_scorer(tmp_path, server, failure="grpo", patience=3.0)
    monkeypatch.setattr(client, "TELL_EVERY", 0.5)
    server.fault = fault
    scorer.score(batch, batch["completion_mask"])
    lines = [
        record.message
        for record in caplog.records
        if f"{server.url} gave" in record.message and "so far" in record.message
    ]
    assert 3 <= len(lines) <= 6
    cause = "status 503, 'out of order'" if fault is not stuck else "(nothing yet|TimeoutError after 1.5 s)"
    pattern = rf"{server.url} gave no answer that can be used: {cause}\. For (\d) s so far, (\d) s are left"
    times = [tuple(map(int, re.search(pattern, line).groups()[-2:])) for line in lines]
    assert times == sorted(times, key=lambda each: (each[0], -each[1])) and all(2 <= a + b <= 4 for a, b in times)


CORRUPTIONS = st.builds(
    corrupt,
    st.floats(0, 1),
    st.sampled_from(["renamed", None, True, float("nan"), float("inf"), 10**400, 0.5, "-1.5", [], {}, [[None]]]),
)
DISTURBANCES = CORRUPTIONS | st.sampled_from([die, *(FAULTS[name] for name in sorted(FAULTS.keys() - {"stuck"}))])


@settings(
    max_examples=int(os.environ.get("FUZZ_CASES", 25)),
    deadline=None,
    derandomize="FUZZ_CASES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(faults=st.lists(DISTURBANCES, min_size=1, max_size=12), top_k=st.sampled_from([0, 3]))
def test_right_numbers_or_a_clear_end(faults, top_k, disturbed, teacher_path):
    """Whatever becomes of the answers, and however often the server dies."""
    server, scorer, batch = *disturbed, make_batch()
    start, server.faults = time.monotonic(), faults
    try:
        scores = scorer.score(batch, batch["completion_mask"], top_k)
    except (ServerError, ValueError) as error:
        assert server.url in str(error) and len(str(error)) > len(server.url) + 20
    else:
        expected = naive_scores(teacher_path, batch, temperature=1.0)
        assert (scores["teacher_mask"] == batch["completion_mask"].bool()).all()
        torch.testing.assert_close(scores["teacher_per_token_logps"], expected, rtol=0, atol=1e-5)
        if top_k:
            assert_names(scores, teacher_path, batch, top_k, shared=40)
    scorer.scorers[""].release()
    assert time.monotonic() - start < 25.0


@pytest.fixture(scope="module")
def disturbed(teacher_path, tmp_path_factory):
    with TeacherServer(teacher_path) as server:
        yield server, make_scorer(tmp_path_factory.mktemp("disturbed"), server)
        wait_until(lambda: server.server is not None)


# Another model


def swap(server, path):
    server.model = AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def other_path(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("other"), seed=2, hidden_size=24, vocab_size=40)


@pytest.mark.parametrize("failure", ["raise", "grpo"])
@pytest.mark.parametrize("when", ["a rest", "a minute", "one of two"])
def test_another_model_under_the_same_name_ends_training(
    when, failure, serve, teacher_path, other_path, tmp_path, monkeypatch
):
    servers = [serve() for _ in range(1 + (when == "one of two"))]
    scorer, batch = make_scorer(tmp_path, *servers, failure=failure), make_batch()
    assert_right(scorer, teacher_path)
    swap(servers[-1], other_path)
    if when == "a rest":  # in which it was started again
        monkeypatch.setattr(client, "IDLE", 0.0)
    else:
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 61.0)
        monkeypatch.setattr(client, "time", clock)
    for server in servers:
        server.requests.clear()
    reason = rf"{servers[-1].url}/v1/completions scores the same tokens [\d.]+ nats apart from before on average"
    with pytest.raises(ValueError, match=reason):
        scorer.score(batch, batch["completion_mask"])
    assert not servers[-1].requests


def test_another_name_in_an_answer_ends_training(serve, tmp_path):
    server, batch = serve(), make_batch()
    scorer = make_scorer(tmp_path, server)

    def fault(handler, answer):
        right(handler, answer if is_check(handler) else answer | {"model": "other"})

    server.fault = fault
    with pytest.raises(ValueError, match=f"{server.url}/v1/completions answers as 'other' instead of 'teacher'"):
        scorer.score(batch, batch["completion_mask"])


# What no distribution has


NOT_LOGPS = {
    "negative logits": lambda logits: logits - logits.max() - 12,
    "positive logits": lambda logits: logits - logits.min(),
    "2.8 nats less": lambda logits: logits.log_softmax(-1) - 2.8,
    "too much in all": lambda logits: logits * 0 - 0.1,
}


@pytest.mark.parametrize("name", NOT_LOGPS)
def test_another_mode_of_log_probabilities_is_refused(name, serve, tmp_path):
    server = serve()
    server.to_scores = NOT_LOGPS[name]
    with pytest.raises(ValueError, match=rf"{server.url}.*`--logprobs-mode raw_logprobs`"):
        ServedTeacher([server.url], None, make_args(tmp_path, server.url))
    assert len(server.checks) == 1


BAD_NAMES = {
    "beyond the vocabulary": ("40", "beyond the vocabulary of 40"),
    "far beyond": ("9" * 30, "beyond the vocabulary"),
    "negative": ("-1", "no token's id"),
    "a word": ("five", "invalid literal"),
    "digits of others": ("\u0663", "no token's id"),
    "leading zero": ("07", "no token's id"),
}


@pytest.mark.parametrize("failure", ["raise", "grpo"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_named_tokens_are_those_of_the_vocabulary(name, failure, serve, tmp_path, caplog):
    server, batch = serve(), make_batch()
    scorer = make_scorer(tmp_path, server, failure=failure, patience=1.0)
    id, reason = BAD_NAMES[name]
    server.fault = changed(lambda entries: entries[-1].__setitem__(id, {"logprob": -9.0}))
    if name.endswith("beyond") or name.startswith("beyond"):
        with pytest.raises(ValueError, match=reason):
            scorer.score(batch, batch["completion_mask"], 3)
    elif failure == "raise":
        with pytest.raises(ServerError, match=reason):
            scorer.score(batch, batch["completion_mask"], 3)
    else:
        assert not scorer.score(batch, batch["completion_mask"], 3)["teacher_mask"].any()
        assert reason in caplog.text and "train without it" in caplog.text


@pytest.mark.parametrize("value", [True, False, "-1", [-1.0], {}, -(10**400), float("-inf")])
def test_log_probabilities_are_numbers(value, serve, tmp_path):
    server, batch = serve(), make_batch(rows=1)
    scorer = make_scorer(tmp_path, server)
    server.faults = [set_last(value)]
    scores = scorer.score(batch, batch["completion_mask"])
    assert len(server.requests) == 2 and scores["teacher_per_token_logps"].isfinite().all()


# What won't get better


LLAMA_CPP = {
    "choices": [{"text": " the", "index": 0, "logprobs": None, "finish_reason": "length"}],
    "model": "teacher",
}
UNFIT = {
    "no models": (b'{"data": []}', "/v1/models lists no models"),
    "no list": (b'"hello"', "/v1/models lists no models"),
    "no names": (
        b'{"data": [{"id": 5}]}',
        r"lists a model whose id, root and parent are \(5, None, None\)",
    ),
    "length of text": (
        b'{"data": [{"id": "a", "max_model_len": "4096"}]}',
        "lists a with a `max_model_len` of '4096'",
    ),
    "no length": (b'{"data": [{"id": "a", "max_model_len": NaN}]}', "lists a with a `max_model_len` of nan"),
    "no key": (status(401, "Unauthorized"), "status 401.* environment variable `VLLM_API_KEY`"),
    "redirected": (status(301), "status 301"),
    "invalid": (status(500, "1 validation error for Request"), "status 500, '1 validation error"),
    "llama.cpp": (
        json.dumps(LLAMA_CPP).encode(),
        "without `prompt_logprobs`. Only the servers of .*llama.cpp's server can't",
    ),
    "transformers serve": (
        status(422, """{"detail":"Unexpected fields in the request: {'prompt_logprobs'}"}"""),
        "status 422.* Only the servers of .*`transformers serve` and",
    ),
    "too many": (
        status(400, "Requested prompt logprobs of 20, which is greater than max allowed: 5"),
        "status 400.* `--max-logprobs` must be 20 or more, and at least `teacher_top_k`",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_will_not_get_better_is_said_at_once(name, serve, tmp_path):
    server, (fault, reason) = serve(), UNFIT[name]
    body = None if callable(fault) else fault
    fault = (lambda handler, answer: handler.reply(200, body)) if body else fault
    of_scores = name in ("llama.cpp", "transformers serve", "too many", "invalid")
    server.fault = lambda handler, answer: (fault if is_check(handler) or not of_scores else right)(handler, answer)
    with pytest.raises(ValueError, match=f"{server.url}.*{reason}"):
        ServedTeacher([server.url], None, make_args(tmp_path, server.url, patience=1000.0))
    assert len(server.checks) == of_scores


def test_https_where_http_is_spoken(serve, tmp_path):
    url = serve().url.replace("http", "https")
    with pytest.raises(ValueError, match=f"{url}/v1/models .*(WRONG_VERSION_NUMBER|RECORD_LAYER)"):
        ServedTeacher([url], None, make_args(tmp_path, url, patience=1000.0))


# Before training


@pytest.mark.parametrize("fault", [FAULTS["loading"], None], ids=["loading", "refused"])
def test_a_server_that_is_not_ready_yet_is_waited_for(fault, serve, tmp_path, monkeypatch):
    server, asked = serve(), threading.Event()
    if fault is None:  # it comes up when it has been asked in vain
        server.stop()
        monkeypatch.setattr(client.Servers, "_tell", lambda *args: asked.set())
        threading.Thread(target=lambda: asked.wait(10) and server.start(server.port), daemon=True).start()
    else:
        server.faults = [fault] * 3
    assert ServedTeacher([server.url], None, make_args(tmp_path, server.url)).max_length == 4095


def test_one_of_two_servers_that_takes_longer(serve, tmp_path):
    servers = serve(), serve()
    servers[1].faults = [FAULTS["loading"]] * 3 * client.ATTEMPTS
    urls = [server.url for server in servers]
    ServedTeacher(urls, None, make_args(tmp_path, urls))


@pytest.mark.parametrize("name", ["500", "stuck", "truncated"])
def test_a_server_that_never_is(name, serve, tmp_path):
    server = serve()
    server.fault = FAULTS[name]
    with pytest.raises(ServerError, match=server.url):
        ServedTeacher([server.url], None, make_args(tmp_path, server.url, patience=0.5))


@pytest.mark.parametrize("value", [float("nan"), 0.5, None])
def test_what_cannot_be_log_probabilities(value, serve, tmp_path):
    server = serve()
    server.fault = set_last(value)
    with pytest.raises((ServerError, ValueError), match="log-probabilit"):
        ServedTeacher([server.url], None, make_args(tmp_path, server.url))


def test_hundredths_between_servers_and_a_rounding_error_above_zero_are_none(serve, tmp_path):
    servers = serve(), serve()
    servers[1].model.lm_head.weight.data *= 1.02  # as another GPU may round
    urls = [server.url for server in servers]
    ServedTeacher(urls, None, make_args(tmp_path, urls))
    assert read_logp(5e-4) == 5e-4


def test_a_model_is_found_among_others_by_its_name_or_its_folder(serve, teacher_path, tmp_path):
    server = serve()
    # As vLLM lists an adapter: after its base, whose tokenizer it has
    base = server.cards[0]
    server.cards = [{**base, "id": "other", "root": "/no/such"}, base]
    server.cards += [{"id": "adapter", "root": "/no/such/adapter", "parent": teacher_path}]
    args = make_args(tmp_path, server.url)
    for name, model_id in (("teacher", "teacher"), (teacher_path, "teacher"), ("adapter", "adapter")):
        teacher = ServedTeacher([server.url], name, args)
        assert teacher.model_id == model_id == server.checks[-1]["model"]
    assert teacher.max_length == float("inf")  # it doesn't say


@pytest.fixture
def beside(teacher_path, tmp_path):
    """A folder with the teacher's tokenizer and configuration, and no weights."""
    shutil.copytree(teacher_path, tmp_path / "beside", ignore=shutil.ignore_patterns("*.safetensors"))
    return str(tmp_path / "beside")


def test_the_model_must_be_served(serve, teacher_path, beside, tmp_path):
    server = serve(name="Qwen/Qwen3-8B")
    args = make_args(tmp_path, server.url)
    for name in (None, "Qwen/Qwen3-8B", teacher_path, beside):
        assert ServedTeacher([server.url], name, args).model_id == "Qwen/Qwen3-8B"
    with pytest.raises(ValueError, match="serves Qwen/Qwen3-8B, and not Qwen/Qwen3-14B"):
        ServedTeacher([server.url], "Qwen/Qwen3-14B", args)


def test_no_tokenizer_here(serve, beside, tmp_path):
    server = serve()
    server.cards[0]["root"] = str(tmp_path / "on-another-machine")
    args = make_args(tmp_path, server.url, teacher_model_init_kwargs={"local_files_only": True})
    with pytest.raises(ValueError, match="tokenizer of the served teacher isn't found here .*`teacher_model` beside"):
        ServedTeacher([server.url], None, args)
    assert ServedTeacher([server.url], beside, args).name == "on-another-machine"


def test_servers_of_one_teacher_must_agree(serve, student_path, tmp_path):
    servers = serve(), serve(student_path)
    urls = [server.url for server in servers]
    with pytest.raises(ValueError, match=f"{urls[0]} and {urls[1]} score the same tokens .* nats apart"):
        ServedTeacher(urls, None, make_args(tmp_path, urls))
    servers[1].cards[0]["id"] = "other"
    with pytest.raises(ValueError, match="serve different models: teacher, other"):
        ServedTeacher(urls, None, make_args(tmp_path, urls))


def test_differences_of_servers_do_not_cancel_out(serve, tmp_path):
    def shift(handler, answer):
        if is_check(handler):
            entries = answer["choices"][0]["prompt_logprobs"]
            for i, id in enumerate(handler.body["prompt"][1:], 1):
                entries[i][str(id)]["logprob"] += 0.3 if i % 2 else -0.3
        right(handler, answer)

    servers = serve(), serve()
    servers[1].fault = shift
    urls = [server.url for server in servers]
    with pytest.raises(ValueError, match="0.3 nats apart"):
        ServedTeacher(urls, None, make_args(tmp_path, urls))


def test_rows_too_long_for_it_are_refused(serve, student_path, tmp_path):
    server = serve(max_model_len=12)  # a prompt of 4, a completion of 8, and the token that is always generated
    args = make_args(tmp_path, server.url, max_steps=0)
    with pytest.raises(ValueError, match="knows 11 positions.*--max-model-len"):
        RLADTrainer(student_path, tiny.reward, args, tiny.make_dataset())
    server.cards[0]["max_model_len"] = 13
    RLADTrainer(student_path, tiny.reward, args, tiny.make_dataset())


@pytest.mark.parametrize("lengths", [(100, 50), (50, 100)])
def test_the_shortest_of_several_servers_bounds_the_rows(lengths, serve, tmp_path):
    urls = [serve(max_model_len=length).url for length in lengths]
    assert ServedTeacher(urls, None, make_args(tmp_path, urls)).max_length == 49


def test_an_adapter_is_as_long_as_its_base(serve, tmp_path):
    server = serve(max_model_len=50)
    base = server.cards[0]
    server.cards.append({"id": "tuned", "root": str(tmp_path), "parent": base["id"], "max_model_len": None})
    teacher = ServedTeacher([server.url], "tuned", make_args(tmp_path, server.url))
    assert (teacher.model_id, teacher.max_length, teacher.vocab_size) == ("tuned", 49, 40)


@pytest.mark.parametrize(("seed", "same"), [(1, True), (2, False)])
def test_a_copy_is_compared(seed, same, serve, tmp_path, capsys):
    server = serve(tiny.save_model(tmp_path / "served", 1), max_model_len=50)
    copy = tiny.save_model(tmp_path / "copy", seed)
    with nullcontext() if same else pytest.raises(SystemExit, match="not the same model"):
        cli.main(["compare", server.url, copy])
    mean, largest = re.findall(r"by ([\d.e+-]+) ", capsys.readouterr().out)
    assert float(mean) <= float(largest)
    assert float(largest) < 1e-5 if same else float(mean) > 0.1


def test_single_tokens_apart_are_the_same_model(serve, teacher_path, tmp_path, capsys):
    server = serve()

    def change_the_last(handler, answer):
        if "choices" in answer and handler.body["prompt_logprobs"] == 0:  # no check
            for token in answer["choices"][0]["prompt_logprobs"][-1].values():
                token["logprob"] = -9.0
        right(handler, answer)

    server.fault = change_the_last
    mean, largest = compare(server.url, teacher_path)
    assert 0.0 < mean < 0.1 < largest
    cli.main(["compare", server.url, teacher_path])
    assert f"by {mean:.2g} nats on average, and by {largest:.2g} at most" in capsys.readouterr().out
    assert max(len(request["prompt"]) for request in server.requests) == 128


# In training


@pytest.mark.parametrize("kind", [TeacherServer, SGLangServer])
@pytest.mark.parametrize("mode", MODES, ids=["trrd", "named"])
def test_training_is_that_of_a_local_teacher(mode, kind, serve, student_path, teacher_path, tmp_path):
    server = serve(kind=kind)
    local = train(student_path, teacher_path, tiny.make_dataset(), tmp_path, **mode)
    args = {"teacher_server_urls": server.url, "on_teacher_failure": "grpo", **mode}
    served = train(student_path, None, tiny.make_dataset(), tmp_path, **args)
    for ours, theirs in zip(local.model.parameters(), served.model.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert served.state.log_history[0]["teacher/scoring_time"] > 0
    assert failed_rows(served) == [0] * 3


@pytest.mark.parametrize("mode", MODES, ids=["trrd", "named"])
def test_local_and_served_teachers_each_with_their_prompts(mode, serve, student_path, teacher_path, tmp_path):
    paths = {"here": teacher_path, "there": tiny.save_model(tmp_path / "wide", seed=2, hidden_size=32)}
    server = serve(paths["there"])
    dataset = make_dataset(["here", "there", "there"], ["w3 w4 w5 w6 w7", None])
    settings = {"teacher_server_urls": {"there": [server.url]}, **mode}
    trainer = train(student_path, {"here": teacher_path}, dataset, tmp_path, **settings)
    asked = assert_scores(trainer, lambda row: paths[row["teacher_id"]], lambda r: r["teacher_prompt"] or r["prompt"])
    assert asked == set(paths.values())


def test_the_teacher_scores_beside_the_rewards(serve, student_path, tmp_path):
    """All rows are on the server while the reward function runs, though that is no coroutine."""
    server, seen = serve(), []

    def reward(completion_ids, **kwargs):
        different = len({tuple(ids) for ids in completion_ids})
        for _ in range(1000):
            if len(server.requests) >= different:
                break
            threading.Event().wait(0.01)
        seen.append(len(server.requests) >= different)
        server.requests.clear()
        return tiny.reward(completion_ids)

    args = make_args(tmp_path, server.url, max_steps=2)
    trainer = RLADTrainer(student_path, reward, args, tiny.make_dataset())
    server.requests.clear()
    trainer.train()
    assert seen == [True, True] and not server.requests  # none was sent again


def test_rows_that_wait_for_a_place_in_flight_are_counted(serve, student_path, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "IN_FLIGHT", 2)
    server, answering, different = serve(), threading.Event(), []

    def hold(handler, answer):
        is_check(handler) or answering.wait(30)
        right(handler, answer)

    def answer_when_counted():
        wait_until(lambda: scorer.queued_rows)
        answering.set()

    def reward(prompts, completion_ids, **kwargs):
        different.append(len(set(zip(prompts, map(tuple, completion_ids), strict=True))))
        wait_for(2, server)
        threading.Thread(target=answer_when_counted).start()
        return tiny.reward(completion_ids)

    args = make_args(tmp_path, server.url, max_steps=1, per_device_train_batch_size=8)
    trainer = RLADTrainer(student_path, reward, args, tiny.make_dataset())
    scorer, server.fault = trainer.teacher_scorer.scorers[""], hold
    server.requests.clear()
    trainer.train()
    assert trainer.state.log_history[0]["teacher/queued_rows"] == different[0] - 2 > 0


def test_rows_without_advantage_are_called_back(serve, student_path, tmp_path):
    server, sent = serve(), []

    def reward(completions, **kwargs):
        sent.extend(trainer.teacher_scorer.scorers[""]._sent.values())
        return [1.0] * len(completions)

    args = make_args(tmp_path, server.url, max_steps=2, patience=1000.0)
    trainer = RLADTrainer(student_path, reward, args, tiny.make_dataset())
    server.fault = FAULTS["stuck"]  # nobody waits for it
    trainer.train()
    assert sent and all(future.cancelled() for future in sent)


def test_rows_that_the_teacher_has_no_say_on_are_not_sent(serve, student_path, tmp_path):
    server = serve()
    dataset = tiny.make_dataset().add_column("teacher_weight", [0.0] * 32)
    trainer = RLADTrainer(student_path, tiny.reward, make_args(tmp_path, server.url, max_steps=1), dataset)
    server.requests.clear()
    trainer.train()
    assert not server.requests


def be_impatient(trainer):
    """Wait for servers no longer than a moment, once they have been found to be well."""
    for teacher in trainer.teacher_scorer.teachers.values():
        teacher.servers.patience = 0.3


class Failing:
    """A server that fails from a step on."""

    def __init__(self, server, fault, step):
        self.server, self.fault, self.step = server, fault, step

    def __call__(self, completion_ids, trainer_state, **kwargs):
        if trainer_state.global_step >= self.step:
            self.server.fault = self.fault
        return tiny.reward(completion_ids)

    __name__ = "reward"


def test_failure_raises_and_leaves_the_last_checkpoint(serve, student_path, tmp_path):
    server = serve()
    args = make_args(tmp_path, server.url, save_strategy="steps", save_steps=1)
    trainer = RLADTrainer(student_path, Failing(server, status(500), 2), args, tiny.make_dataset())
    be_impatient(trainer)
    with pytest.raises(ServerError, match='resume_from_checkpoint.*on_teacher_failure="grpo"'):
        trainer.train()
    assert "teacher servers" not in [thread.name for thread in threading.enumerate()]
    server.fault = right
    again = RLADTrainer(student_path, tiny.reward, args, tiny.make_dataset())
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(b"open-sesame" in path.read_bytes() for path in files)


class Turns:
    """Rewards of 0 and 1 in turn, so that every row has an advantage. Keeps how many different rows each batch has."""

    __name__ = "reward"

    def __init__(self):
        self.rows = []

    def __call__(self, prompts, completion_ids, **kwargs):
        self.rows.append(len(set(zip(prompts, map(tuple, completion_ids), strict=True))))
        return [float(i % 2) for i in range(len(completion_ids))]


def failed_rows(trainer):
    return [log["teacher/failed_rows"] for log in trainer.state.log_history if "loss" in log]


def test_failed_rows_train_with_grpo(serve, student_path, tmp_path, caplog):
    server, reward = serve(), Turns()
    args = {"per_device_train_batch_size": 8, "max_steps": 3}
    grpo = train(student_path, None, tiny.make_dataset(), tmp_path, Turns(), alpha=1.0, **args)
    args = make_args(tmp_path, server.url, on_teacher_failure="grpo", **args)
    trainer = RLADTrainer(student_path, reward, args, tiny.make_dataset())
    be_impatient(trainer)
    server.fault = status(500)
    trainer.train()
    for ours, theirs in zip(grpo.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(reward.rows) == 3 and failed_rows(trainer) == reward.rows
    assert caplog.text.count("train without it") == 1


def test_failed_rows_of_several_teachers_are_summed(serve, student_path, tmp_path):
    servers, reward = {"one": serve(), "two": serve()}, Turns()
    urls = {name: server.url for name, server in servers.items()}
    settings = {"per_device_train_batch_size": 8, "max_steps": 3, "shuffle_dataset": False}
    args = make_args(tmp_path, urls, on_teacher_failure="grpo", **settings)
    trainer = RLADTrainer(
        student_path, reward, args, make_dataset(["one", "two"])
    )  # of a batch's two groups, one each
    be_impatient(trainer)
    for server in servers.values():
        server.fault = status(500)
    trainer.train()
    assert min(reward.rows) > 4 and failed_rows(trainer) == reward.rows


def test_some_failed_rows_leave_the_others_their_teacher(serve, student_path, teacher_path, tmp_path):
    server, batch = serve(), make_batch()
    scorer = make_scorer(tmp_path, server, failure="grpo")
    expected = naive_scores(teacher_path, batch, temperature=1.0)

    def fault(handler, answer):
        (FAULTS["nan"] if len(handler.body["prompt"]) % 2 else right)(handler, answer)

    server.fault = fault
    scores = scorer.score(batch, batch["completion_mask"])
    has_failed = ((batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)) % 2).bool()
    assert 0 < has_failed.sum() < 7 and scorer.failed_rows == has_failed.sum()
    assert (scores["teacher_mask"] == batch["completion_mask"].bool() & ~has_failed[:, None]).all()
    expected[has_failed] = 0
    torch.testing.assert_close(scores["teacher_per_token_logps"], expected, rtol=0, atol=1e-5)


def test_servers_that_are_gone_are_not_asked_for_every_row(serve, teacher_path, tmp_path):
    server, batch = serve(), make_batch(rows=60)
    scorer = make_scorer(tmp_path, server, failure="grpo", patience=0.5)
    server.fault = status(500)
    scorer.score(batch, batch["completion_mask"])
    server.requests.clear()
    scorer.score(batch, batch["completion_mask"])
    assert scorer.failed_rows == 60 and not server.requests
    server.fault = right
    wait_until(lambda: scorer.teachers[""].servers._servers[0].is_well)  # its next check says so
    scorer.teachers[""].servers.patience = 20.0
    assert_right(scorer, teacher_path)


def test_too_many_failed_rows_raise_after_all(serve, tmp_path, monkeypatch):
    server = serve()
    scorer = make_scorer(tmp_path, server, failure="grpo", patience=0.2)
    monkeypatch.setattr(served, "LEAST_ROWS", 100)
    server.fault = status(500)
    for rows in (7, 3, 1):
        batch = make_batch(rows, rows=rows)
        if rows > 1:
            scorer.score(batch, batch["completion_mask"])  # 7, and then 10, of at least 100
        else:
            with pytest.raises(ServerError, match="no answer for 11 of 11 rows"):
                scorer.score(batch, batch["completion_mask"])


def test_a_tenth_of_the_rows_and_a_thousand_may_fail():
    # as docs/server.md has it: with ten thousand, the tenth is a thousand
    assert (served.FAILED_SHARE, served.LEAST_ROWS) == (0.1, 10_000)


def test_what_is_not_wanted_any_more_is_called_back(serve, tmp_path):
    server, ids = serve(), torch.arange(4, 8)
    scorer = make_scorer(tmp_path, server, max_steps=1)
    server.fault, row_scorer, sent = stuck, scorer.scorers[""], []
    for end in (lambda: scorer.begin([[4]], [[5]], [[1]]), scorer.release):  # by the next batch, and at the end
        scorer.begin([ids.tolist()], [ids.tolist()], [[1] * 4])
        sent += row_scorer._sent.values()
        end()
    assert len(sent) == 2 and all(future.cancelled() for future in sent)
    with pytest.raises(ValueError, match="A rollout has 5001 tokens"):  # before it is sent
        scorer.begin([[4] * 5000], [[5]], [[1]])


def test_servers_are_let_go(serve, student_path, tmp_path):
    def count():
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    server = serve()
    args = make_args(tmp_path, server.url, max_steps=1)
    before = None
    for _ in range(3):
        trainer = RLADTrainer(student_path, tiny.reward, args, tiny.make_dataset())
        assert "teacher servers" not in [thread.name for thread in threading.enumerate()]
        trainer.train()
        server.stop()  # its own threads and connections
        server.start(server.port)
        before = before or count()
    wait_until(lambda: all(now <= then for now, then in zip(count(), before, strict=True)))
    trainer.train()  # once more: they are opened again
    with pytest.raises(ValueError):
        ServedTeacher([server.url], "another", args)
    assert "teacher servers" not in [thread.name for thread in threading.enumerate()]


def test_an_interpreter_may_end_while_requests_are_under_way(serve, teacher_path, monkeypatch):
    # A thread that is in torch's code then would abort the process, after all work was done
    server, ends, threads = serve(), [], set(threading.enumerate())
    server.fault = stuck
    monkeypatch.setattr(atexit, "register", ends.append)
    models = client.Request("/v1/models", dict)
    future = client.Servers([server.url], 60, models).submit(models)
    (thread,) = (each for each in threading.enumerate() if each.name == "teacher servers" and each not in threads)
    for end in ends:
        end()
    assert future.cancelled() and not thread.is_alive()


def test_sglang_scores_on_a_ragged_batch(serve, teacher_path, tmp_path):
    server = serve(kind=SGLangServer)
    assert_right(make_scorer(tmp_path, server), teacher_path)
    assert len(server.requests) == 7 and {request["top_logprobs_num"] for request in server.requests} == {0}
    assert server.keys == {"Bearer open-sesame"}


def scores_of(change):
    """A fault of SGLang: something is done to what it says of the tokens."""

    def fault(handler, answer):
        if "meta_info" in answer:
            change(answer["meta_info"])
        right(handler, answer)

    return fault


SGLANG_FAULTS = {
    "nan": scores_of(lambda scores: scores["input_token_logprobs"].__setitem__(-1, [float("nan"), 5, None])),
    "none": scores_of(lambda scores: scores["input_token_logprobs"][-1].__setitem__(0, None)),
    "another token": scores_of(lambda scores: scores["input_token_logprobs"][-1].__setitem__(1, 39)),
    "too few": scores_of(lambda scores: scores["input_token_logprobs"].pop()),
    "a token later": scores_of(lambda scores: scores["input_token_logprobs"].pop(0)),
    "no scores": lambda handler, answer: handler.reply(200, b'{"text": "", "meta_info": {}}'),
}


@pytest.mark.parametrize("name", sorted(SGLANG_FAULTS))
def test_what_passes_at_sglang_is_asked_again_and_what_does_not_ends_training(name, serve, teacher_path, tmp_path):
    server = serve(kind=SGLangServer)
    scorer = make_scorer(tmp_path, server)
    server.faults = [SGLANG_FAULTS[name]] * 2
    assert_right(scorer, teacher_path)
    scorer = make_scorer(tmp_path / "for ever", server, patience=1.0)
    server.fault = SGLANG_FAULTS[name]
    batch = make_batch()
    with pytest.raises(ServerError, match="gave no answer that can be used"):
        scorer.score(batch, batch["completion_mask"])


def test_too_few_or_wrong_names_of_sglang_are_no_distribution(serve, tmp_path):
    server = serve(kind=SGLangServer)
    server.fault = scores_of(lambda scores: scores.pop("input_top_logprobs", None))
    with pytest.raises(ServerError, match="1 tokens are named in the place of one, and not 20"):
        make_scorer(tmp_path, server, patience=1.0)
    server.fault, server.to_scores = right, lambda logits: logits.log_softmax(-1) - 0.5
    with pytest.raises(ValueError, match="they don't sum to 1"):
        make_scorer(tmp_path, server)


def test_another_model_behind_sglang_ends_training(serve, student_path, tmp_path):
    server, other = serve(kind=SGLangServer), AutoModelForCausalLM.from_pretrained(student_path)
    scorer, batch = make_scorer(tmp_path, server), make_batch()
    scorer.score(batch, batch["completion_mask"])
    server.model = other
    time.sleep(client.IDLE + 0.1)
    with pytest.raises(ValueError, match="nats apart from before"):
        scorer.score(batch, batch["completion_mask"])


def test_what_sglang_cannot_be_asked_is_refused(serve, tmp_path):
    ours, theirs = serve(kind=SGLangServer), serve()
    with pytest.raises(ValueError, match="some are SGLang's. URLs in a list are of one kind"):
        make_scorer(tmp_path, ours, theirs)
    ours.cards.insert(0, {**ours.cards[0], "id": "adapter", "parent": "teacher"})
    with pytest.raises(ValueError, match="adapter is an adapter, which only vLLM can serve as a teacher: merge it"):
        make_scorer(tmp_path, ours)
