"""Requests to servers that stand in for each other: pooled, bounded, and made again where that may help."""

import asyncio
import atexit
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, NamedTuple

import httpx2
from accelerate.logging import get_logger
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential


logger = get_logger(__name__)


def in_flight(processes: int) -> int:
    """Requests that each of so many processes may have at one server, which batches what is there: of all together no
    more than 256, or one each."""
    return max(1, min(32, 256 // processes))


IN_FLIGHT = in_flight(int(os.environ.get("WORLD_SIZE", 1)))
ATTEMPTS = 8  # at a request, not counting the wait for servers that answer nothing
CHECK_EVERY = TELL_EVERY = 60.0  # seconds
IDLE = 1.0  # seconds without a request after which a server is checked before the next one
POLL = 0.2  # seconds after which a request looks again for a server that is well
WAIT = wait_random_exponential(multiplier=0.5, max=10)
SILENT = "nothing yet"
# What won't get better, and what helps then
HOPELESS = httpx2.LocalProtocolError, httpx2.UnsupportedProtocol, httpx2.InvalidURL
NO_TLS = "WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "CERTIFICATE_VERIFY_FAILED"
WHICH_SERVERS = (
    "Only the servers of vLLM and SGLang return the log-probabilities of a prompt: `transformers serve` and "
    "llama.cpp's server can't be a teacher."
)
HINTS = {
    "status 401": "Set the environment variable `VLLM_API_KEY` to the key of the server.",
    "status 403": "Set the environment variable `VLLM_API_KEY` to the key of the server.",
    "greater than max allowed": "`--max-logprobs` must be 20 or more, and at least `teacher_top_k`.",
    "prompt_logprobs": WHICH_SERVERS,
}


class ServerError(RuntimeError):
    """A request that no server has answered rightly."""


class UnfitServerError(ValueError):
    """A server that won't answer rightly, however often it is asked."""


class _Failure(Exception):
    """An attempt in vain."""


class Request(NamedTuple):
    """What a server is asked for, with a `body` to be posted as JSON. `read` makes of the decoded answer what is
    returned, and may raise any exception if that is wrong: an [`UnfitServerError`] if it won't get better."""

    path: str
    read: Callable[[Any], Any]
    body: Mapping[str, Any] | None = None
    max_bytes: int = 2**20  # of the answer


@dataclass
class _Server:
    url: str
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(IN_FLIGHT))
    under_way: list[float] = field(default_factory=list)  # when the attempts were begun that it has
    check: asyncio.Task | None = None
    # By the clock: its last check, its last right answer, and the beginning of the first attempt in vain since then
    checked_at: float = -float("inf")
    answered_at: float = -float("inf")
    failed_at: float = float("inf")
    told_at: float = -float("inf")
    cause: str = SILENT

    @property
    def silence(self) -> float:
        """Seconds for which it hasn't answered what it was asked."""
        return time.monotonic() - max(min([*self.under_way, self.failed_at]), self.answered_at)

    @property
    def problem(self) -> str:
        return f"{self.url} gave no answer that can be used: {self.cause}"

    @property
    def is_well(self) -> bool:
        """Whether its last check holds: while nothing is under way it may be started again unnoticed."""
        now = time.monotonic()
        return now - self.checked_at < CHECK_EVERY and bool(self.under_way or now - self.answered_at < IDLE)


class Servers:
    """
    Servers that answer the same requests alike: a request goes to the one with the fewest, and to another if that
    fails. They are asked in a thread of their own, so that many requests can be under way while the caller does other
    things. Before its first request, after a rest, after each failure and every minute a server must answer a check.

    Args:
        urls (`list[str]`):
            Their addresses.
        patience (`float`):
            Seconds for which a request is made again, and for which all of them are while no server answers any. An
            attempt lasts at most half as long.
        check ([`Request`]):
            What a server must answer to be asked for anything else.
        key (`str`, *optional*):
            What is sent to prove who asks. It is left out of all answers, and so of all messages.

    Attributes:
        queued (`int`):
            Number of requests that wait for a place among those in flight.
    """

    def __init__(self, urls: list[str], patience: float, check: Request, key: str | None = None):
        self.urls, self.patience, self.check, self.key = urls, patience, check, key
        self.queued = 0
        self._thread: Thread | None = None

    def submit(self, request: Request, url: str | None = None) -> Future:
        """
        Ask, and go on.

        Returns a future of what `request.read` has made of the answer. It raises an [`UnfitServerError`] if a server
        refuses the request or isn't fit, and a [`ServerError`] if there is no right answer from the server `url`, or
        if that is `None` from any.
        """
        if self._thread is None:
            self._open()
        servers = [server for server in self._servers if url in (None, server.url)]
        return asyncio.run_coroutine_threadsafe(self._ask(servers, request), self._loop)

    def _open(self):
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="teacher servers", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # the process would abort if the interpreter went while that is in torch's code
        self._servers = [_Server(url) for url in self.urls]
        self._slots = asyncio.Semaphore(IN_FLIGHT * len(self.urls))
        headers = {"Accept-Encoding": "identity"}  # what is packed could be of any size
        self._client = httpx2.AsyncClient(
            headers=headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {}),
            timeout=httpx2.Timeout(None, connect=min(self.patience / 2, 10.0)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=IN_FLIGHT * len(self.urls)),
        )
        asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    def close(self):
        """Call everything back, and let the thread and the connections go. The next request opens them again."""
        if self._thread is None:
            return
        atexit.unregister(self.close)
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._thread = None

    async def _cancel(self):
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    @asynccontextmanager
    async def _place(self):
        self.queued += 1
        try:
            await self._slots.acquire()
        finally:
            self.queued -= 1
        try:
            yield
        finally:
            self._slots.release()

    async def _ask(self, servers, request):
        async with self._place():
            start = time.monotonic()
            try:
                async with asyncio.timeout(self.patience - max(min(server.silence for server in servers), 0.0)):
                    return await retrying(stop=stop_after_attempt(ATTEMPTS))(self._try, servers, request)
            except _Failure as error:
                reason = f"{error} ({ATTEMPTS} attempts"
            except TimeoutError:
                reason = f"{'; '.join(server.problem for server in servers)} (asked again and again"
            raise ServerError(f"{reason}, {time.monotonic() - start:.0f} s)")

    async def _try(self, servers, request):
        server = await self._choose(servers)
        async with server.slots:
            return await self._attempt(server, request)

    async def _choose(self, servers):
        """Of the servers that are well the one with the fewest requests, once there is one."""
        has_waited = False
        while True:
            for server in servers:
                if server.check is not None and server.check.done():
                    server.check.result()  # raises what won't get better
                    server.check = None
                if server.check is None and not server.is_well:
                    server.checked_at = -float("inf")
                    server.check = asyncio.create_task(self._check(server))
            well = [server for server in servers if server.is_well]
            # A moment for those that are likely to be well too, or all would go to the first
            if well and (has_waited or all(server in well or server.failed_at < float("inf") for server in servers)):
                return min(well, key=lambda server: len(server.under_way))
            # Not for one that fails, or the others would have rested meanwhile
            hopeful = [server for server in servers if server.failed_at == float("inf")] or servers
            await asyncio.wait([server.check for server in hopeful if server.check], timeout=POLL)
            has_waited = True

    async def _check(self, server):
        await retrying()(self._attempt, server, self.check)
        server.checked_at = time.monotonic()

    async def _attempt(self, server, request):
        start = time.monotonic()
        server.under_way.append(start)
        try:
            async with asyncio.timeout(self.patience / 2):
                result = self._read(request, *await self._fetch(server.url + request.path, request))
        except Exception as error:
            reason = self.redact(str(error) or f"{type(error).__name__} after {time.monotonic() - start:.1f} s")
            if isinstance(error, (UnfitServerError, *HOPELESS)) or any(each in reason for each in NO_TLS):
                raise UnfitServerError(f"{server.url}{request.path} {reason}") from None
            server.cause, server.failed_at = reason, min(server.failed_at, start)
            if start > server.checked_at:
                server.checked_at = -float("inf")
            self._tell(server)
            raise _Failure(server.problem) from None  # the error itself might quote the key
        finally:
            server.under_way.remove(start)
        server.cause, server.answered_at, server.failed_at = SILENT, time.monotonic(), float("inf")
        return result

    async def _fetch(self, url, request) -> tuple[int, str]:
        """The status and the text of an answer, up to the size that it may have."""
        body = bytearray()
        async with self._client.stream("GET" if request.body is None else "POST", url, json=request.body) as answer:
            async for part in answer.aiter_raw():
                body += part
                if len(body) > request.max_bytes:
                    raise ValueError(f"an answer of more than {request.max_bytes} bytes")
        return answer.status_code, body.decode(errors="replace")

    def _read(self, request, status, text):
        said = repr(self.redact(text)[:300])
        if status in (408, 429) or status >= 500 and "validation error" not in text:
            raise ValueError(f"status {status}, {said}")
        if not 200 <= status < 300:  # what isn't accepted once won't be accepted later
            hint = next((f". {hint}" for sign, hint in HINTS.items() if sign in f"status {status}, {text}"), "")
            raise UnfitServerError(f"doesn't accept the request: status {status}, {said}{hint}")
        try:
            return request.read(json.loads(text))
        except UnfitServerError:
            raise
        except Exception as error:  # it is of the answer, whatever it is
            raise ValueError(f"{error} ({type(error).__name__}) in {said}") from error

    def redact(self, text: str) -> str:
        """A text without the key."""
        forms = [self.key, json.dumps(self.key)[1:-1]] if self.key else []
        for form in forms:
            text = text.replace(form, "***")
        return text

    async def _watch(self):
        while True:
            await asyncio.sleep(TELL_EVERY / 6)
            for server in self._servers:
                if server.silence > TELL_EVERY:
                    self._tell(server)

    def _tell(self, server):
        """Say, once a minute, that a server is waited for."""
        if time.monotonic() - server.told_at > TELL_EVERY:
            server.told_at = time.monotonic()
            left = max(self.patience - server.silence, 0.0)
            logger.warning(
                f"{server.problem}. For {server.silence:.0f} s so far, {left:.0f} s are left.",
                main_process_only=False,
            )


def retrying(**kwargs) -> AsyncRetrying:
    return AsyncRetrying(wait=WAIT, retry=retry_if_exception_type(_Failure), reraise=True, **kwargs)
