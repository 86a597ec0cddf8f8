"""
A teacher's server for the tests, over real sockets on 127.0.0.1: as much of vLLM's as is asked for, with faults by
script.

    with TeacherServer(path) as server:
        server.faults = [status(503), nan]  # what becomes of the next answers, in turn; `server.fault`: of all of them

Checks, which alone have 20 tokens named, are kept apart: they count as no request, and none of the faults in turn is
theirs.

vLLM's own is in `test_vllm.py`.
"""

import json
import socket
import threading
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM


def status(code, text="out of order"):
    def fault(handler, answer):
        handler.reply(code, text.encode())

    return fault


def right(handler, answer):
    handler.reply(200, json.dumps(answer).encode())


def changed(change):
    """The answer with something done to its list of log-probabilities."""

    def fault(handler, answer):
        if "choices" in answer:
            change(answer["choices"][0]["prompt_logprobs"])
        right(handler, answer)

    return fault


def set_last(value):
    return changed(lambda entries: entries.__setitem__(-1, {key: {"logprob": value} for key in entries[-1]}))


def truncated(handler, answer):
    handler.reply(200, json.dumps(answer).encode()[:-20])


def reset(handler, answer):
    """Breaks off in the middle of the body."""
    body = json.dumps(answer).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def stuck(handler, answer):
    """Answers when the server ends, if anybody still wants to know."""
    handler.server.owner.ending.wait(30)


def drip(handler, answer):
    """A byte now and then, for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.owner.ending.wait(0.05):
        handler.wfile.write(b" ")


def packed(handler, answer):
    """200 MB of blanks in 200 KB, whatever was accepted."""
    packer = zlib.compressobj(1, wbits=31)
    body = b"".join(packer.compress(b" " * 1_000_000) for _ in range(200)) + packer.flush()
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def long(handler, answer):
    handler.reply(200, json.dumps(answer).encode() + b" " * 2_000_000)


def places(answer):
    """All fields of an answer, each by what holds it and its name there."""
    items = answer.items() if isinstance(answer, dict) else enumerate(answer) if isinstance(answer, list) else ()
    for name, value in list(items):
        yield answer, name
        yield from places(value)


def corrupt(where, value):
    """A field of the answer, chosen by a share of all of them, is another value, or has another name."""

    def fault(handler, answer):
        fields = list(places(answer))
        holder, name = fields[int(where * (len(fields) - 1))]
        if value == "renamed" and isinstance(holder, dict):
            holder["-1"] = holder.pop(name)
        else:
            holder[name] = value
        right(handler, answer)

    return fault


def die(handler, answer):
    """The server dies, and is there again soon after."""
    owner = handler.server.owner
    with owner.dying:
        if owner.server is handler.server:
            owner.stop()
            threading.Timer(0.1, owner.start, [owner.port]).start()


def echo_key(code):
    def fault(handler, answer):
        handler.reply(code, f"not with {handler.headers['Authorization']}".encode())

    return fault


FAULTS = {
    "500": status(500),
    "429": status(429),
    "loading": status(503),
    "stuck": stuck,
    "reset": reset,
    "truncated": truncated,
    "nan": set_last(float("nan")),
    "-inf": set_last(float("-inf")),
    "none": set_last(None),
    "positive": set_last(0.5),
    "text": set_last("-1.5"),
    "missing token": changed(lambda entries: entries.__setitem__(-1, {"38": {"logprob": -1.0}})),
    "missing entry": changed(lambda entries: entries.__setitem__(-1, None)),
    "too few": changed(lambda entries: entries.pop()),
    "too many": changed(lambda entries: entries.append(entries[-1])),
    "no scores": lambda handler, answer: handler.reply(200, json.dumps({"choices": [{"text": ""}]}).encode()),
    "not ours": lambda handler, answer: handler.reply(200, b'"hello"'),
}


def is_check(handler):
    return handler.body is not None and handler.body.get("prompt_logprobs", handler.body.get("top_logprobs_num")) == 20


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    body = None

    def log_message(self, *args):
        pass

    def reply(self, code, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def setup(self):
        super().setup()
        self.server.owner.connections.append(self.connection)

    def do_GET(self):
        self.body = None  # the connection may have had others
        self.answer({"data": self.server.owner.cards})

    def do_POST(self):
        owner, self.body = self.server.owner, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (owner.checks if is_check(self) else owner.requests).append(self.body)
        self.answer(owner.respond(self.path, self.body))

    def answer(self, answer):
        owner = self.server.owner
        owner.keys.add(self.headers["Authorization"])
        fault = owner.faults.pop(0) if owner.faults and not is_check(self) else owner.fault
        try:
            fault(self, answer)
        except OSError:
            pass  # nobody is there any more


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


class TeacherServer:
    def __init__(self, path, name="teacher", max_model_len=4096):
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.cards = [{"id": name, "root": str(path), "parent": None, "max_model_len": max_model_len}]
        self.faults, self.fault, self.requests, self.checks, self.keys = [], right, [], [], set()
        self.dying = threading.Lock()
        self.to_scores = lambda logits: logits.log_softmax(-1)
        self.ending, self.lock = threading.Event(), threading.Lock()
        self.connections = []
        self.server = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *args):
        self.stop()

    def start(self, port=0):
        self.ending.clear()
        self.server = Server(("127.0.0.1", port), Handler)
        self.server.owner = self
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        self.ending.set()
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
        for connection in self.connections:
            with suppress(OSError):  # it is gone already
                connection.shutdown(socket.SHUT_RDWR)
        self.connections = []

    @torch.no_grad()
    def read(self, ids):
        """Log-probabilities `(L, V)`, at temperature 1 whatever is asked for."""
        with self.lock:
            return self.to_scores(self.model(torch.tensor([ids])).logits[0].float())

    def respond(self, path, body):
        """As vLLM does, with `prompt_logprobs`."""
        assert path == "/v1/completions"
        ids, entries = torch.tensor(body["prompt"]), [None]
        logps = self.read(body["prompt"])
        for row, id in zip(logps[:-1], ids[1:], strict=True):
            named = {*row.topk(min(body["prompt_logprobs"], len(row))).indices.tolist(), id.item()}
            entries.append({str(i): {"logprob": row[i].item()} for i in named})
        return {"model": self.cards[0]["id"], "choices": [{"prompt_logprobs": entries}]}


class SGLangServer(TeacherServer):
    """
    As much of SGLang's native endpoint as is asked for, by what public code that calls it sends and reads: the real
    one doesn't run here.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cards[0]["owned_by"] = "sglang"

    def respond(self, path, body):
        assert path == "/generate" and body["return_logprob"] and body["sampling_params"] == {"max_new_tokens": 0}
        ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        logps = self.read(ids)
        scores = {"input_token_logprobs": [[None, ids[start], None]], "prompt_tokens": len(ids)}
        if k:
            scores["input_top_logprobs"] = [None]
        for row, id in zip(logps[start:-1], ids[start + 1 :], strict=True):
            scores["input_token_logprobs"].append([row[id].item(), id, None])
            if k:
                top = row.topk(min(k, len(row)))
                named = zip(top.values.tolist(), top.indices.tolist(), strict=True)
                scores["input_top_logprobs"].append([[logp, i, None] for logp, i in named])
        return {"text": "", "meta_info": scores}
