"""Requests to servers that stand in for each other: pooled, bounded, and made again where that may help."""

import asyncio
import atexit
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import httpx2
from accelerate.logging import get_logger
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential


logger = get_logger(__name__)


def in_flight(processes: int) -> int:
    """Requests that each of so many processes may have at one server, which batches what is there: of all together no
    more than 256, or one each."""
    return max(1, min(32, 256 // processes))


IN_FLIGHT = in_flight(int(os.environ.get("WORLD_SIZE", 1)))
ATTEMPTS = 8  # at a request that is answered wrongly, or while others are answered
PAUSE = 30.0  # seconds for which a server that has failed comes last
WAIT = wait_random_exponential(multiplier=0.5, max=30)


class ServerError(RuntimeError):
    """A request that no server has answered rightly."""


class _Failure(Exception):
    """An attempt in vain."""


class _WrongAnswer(_Failure):
    """An attempt that has ended in a wrong answer."""


@dataclass
class _Server:
    url: str
    in_flight: int = 0  # requests that it has, or waits for a slot to be given
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(IN_FLIGHT))
    # By the clock: the last answer, and since then the first and the last failure
    answered_at: float = -float("inf")
    silent_since: float = float("inf")
    failed_at: float = -float("inf")


class Servers:
    """
    Servers that answer the same requests alike: a request goes to the one with the fewest, and to another if that
    fails. They are asked in a thread of their own, so that many requests can be under way while the caller does other
    things.

    Args:
        urls (`list[str]`):
            Their addresses.
        patience (`float`):
            Seconds for which requests are made again while no server answers any. An attempt lasts at most half as
            long.
        key (`str`, *optional*):
            What is sent to prove who asks. It is left out of all messages.
    """

    def __init__(self, urls: list[str], patience: float, key: str | None = None):
        self.urls, self.patience, self.key = urls, patience, key
        self._servers = [_Server(url) for url in urls]
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="teacher servers", daemon=True)
        self._thread.start()
        atexit.register(self._end)  # the process would abort if the interpreter went while that is in torch's code
        self._slots = asyncio.Semaphore(IN_FLIGHT * len(urls))
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(patience / 2, connect=min(patience / 2, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=IN_FLIGHT * len(urls)),
        )

    def submit(
        self, path: str, read: Callable, body: Mapping[str, Any] | None = None, url: str | None = None
    ) -> Future:
        """
        Ask for a path, with a `body` to be posted as JSON, and go on.

        Returns a future of what `read` makes of the decoded answer; it may raise a `ValueError` if that is wrong. The
        future raises a `ValueError` if a server refuses the request, and a [`ServerError`] if there is no right answer
        from the server `url`, or if that is `None` from any.
        """
        servers = [server for server in self._servers if url in (None, server.url)]
        return asyncio.run_coroutine_threadsafe(self._ask(servers, path, read, body), self._loop)

    def _end(self):
        """Call everything back and end the thread."""
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _cancel(self):
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, servers, path, read, body):
        retrying = AsyncRetrying(
            stop=self._gives_up,
            wait=WAIT,
            retry=retry_if_exception_type(_Failure),
            retry_error_callback=self._report,
        )
        async with self._slots:
            now = time.monotonic()
            if self._silence(servers) > self.patience and all(now - server.failed_at < PAUSE for server in servers):
                raise ServerError(f"{', '.join(server.url for server in servers)} gave no answer just now")
            return await retrying(self._try, servers, path, read, body)

    async def _try(self, servers, path, read, body):
        now = time.monotonic()
        server = min(servers, key=lambda server: (now - server.failed_at < PAUSE, server.in_flight))
        server.in_flight += 1
        answer = None
        try:
            async with server.slots:
                answer = await self._client.request("GET" if body is None else "POST", server.url + path, json=body)
            if answer.status_code in (408, 429) or answer.status_code >= 500:
                raise ValueError(describe(answer))
            if answer.is_success:
                result = read(answer.json())
                server.answered_at = time.monotonic()
                server.silent_since, server.failed_at = float("inf"), -float("inf")
                return result
        except (httpx2.RequestError, ValueError) as error:
            server.failed_at = time.monotonic()
            reason = str(error) or type(error).__name__
            reason = self._without_key(f"{server.url} gave no answer that can be used: {reason}")
            if server.silent_since > server.failed_at:
                server.silent_since = server.failed_at
                logger.warning(f"{reason}. It is asked again.", main_process_only=False)
            failure = _WrongAnswer if answer is not None and answer.is_success else _Failure
            raise failure(reason) from None  # it might quote the key
        finally:
            server.in_flight -= 1
        # What isn't accepted once won't be accepted later
        raise ValueError(self._without_key(f"{server.url}{path} doesn't accept the request: {describe(answer)}"))

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def _gives_up(self, state: RetryCallState) -> bool:
        error, servers = state.outcome.exception() if state.outcome else None, state.args[0]
        if isinstance(error, _WrongAnswer) or any(server.answered_at > state.start_time for server in servers):
            return state.attempt_number >= ATTEMPTS
        return self._silence(servers) > self.patience

    def _silence(self, servers: list[_Server]) -> float:
        """Seconds for which none of them has answered."""
        return time.monotonic() - max(min(server.silent_since, time.monotonic()) for server in servers)

    def _report(self, state: RetryCallState):
        error = state.outcome.exception() if state.outcome else None
        raise ServerError(
            f"{error} (attempt {state.attempt_number}, after {state.seconds_since_start:.0f} s)"
        ) from error


def describe(answer: httpx2.Response) -> str:
    """What to say of an answer that is no success."""
    return f"status {answer.status_code}, {answer.text[:300]!r}"
