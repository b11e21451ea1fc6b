"""Send one rank's requests to the servers: each to the least loaded one, retried on another one."""

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event
from typing import Any, NamedTuple, Protocol

import httpx

from megatron_srpo.config.engines import ServerSettings
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.rollout.engine import EMPTY, Completion, CompletionStream, EngineFailed, Request, Sampling
from megatron_srpo.rollout.servers.http import CONTROL_BYTES, Reply, client, send
from megatron_srpo.rollout.servers.replies import MALFORMED, InvalidReply, joined

_HEALTH_INTERVAL = 2.0  # seconds between health checks
_LONGEST_PAUSE = 10.0  # seconds between two attempts of one request
_REPLY_BYTES, _TOKEN_BYTES = 1 << 20, 1 << 10  # limit of a reply, and in addition per token of its sequence


class _AttemptFailed(Exception):
    """An attempt failed; the request can be retried on another server."""


class Call(NamedTuple):
    """A POST request to a server; more_bytes: of the reply per token, beyond the usual."""

    path: str
    body: dict[str, Any]
    more_bytes: int = 0


class CompletionsAPI(Protocol):
    """The API of one kind of server: requests for completions, and checks of the replies."""

    health_path: str  # GET; fails or hangs unless the server generates tokens
    version_path: str  # GET; answered at once, also by a busy server

    def call(self, request_id: str, ids: list[int], limit: int, sampling: Sampling, seed: str) -> Call:
        """Return the request for at most `limit` tokens that follow `ids`."""
        ...

    def parse(self, call: Call, reply: Any, limit: int, versions: Sequence[str]) -> Completion:
        """Return the completion in a JSON reply. Raises InvalidReply. versions: accepted, newest last."""
        ...

    def abort_call(self, request_id: str) -> Call | None:
        """Return the call that aborts a running request; None if closing its connection does."""
        ...

    def has_version(self, info: Any, version: str) -> bool:
        """Return True if the answer at `version_path` may be of a server with these weights."""
        ...


@dataclass
class Target:
    """A server, and its state on this rank."""

    url: str
    quarantined: str | None = None  # the reason; None if it gets requests
    is_invalid: bool = False  # or hung: quarantined until its process is gone or the first rank acts
    calls: set[asyncio.Task] = field(default_factory=set)
    timeouts: int = 0  # in a row, while it answered no other request
    answered_at: float = 0.0


@dataclass(eq=False)
class Generation:
    """Get completions from servers, some of which may fail."""

    api: CompletionsAPI
    urls: Sequence[str]  # of all servers, the same on every rank
    settings: ServerSettings
    vocab_size: int
    rank: int  # decides which server this rank prefers among equals
    world_size: int  # ranks that share `settings.concurrency`
    report_failure: Callable[[str, str, bool], None]  # (url, reason, is_invalid) of a server in quarantine
    no_server_reason: Callable[[float], str | None]  # after seconds without one: why none will recover

    def __post_init__(self) -> None:
        first = self.rank % len(self.urls)
        self.targets = [Target(url) for url in [*self.urls[first:], *self.urls[:first]]]
        self.concurrency = max(1, self.settings.concurrency // self.world_size)
        self.versions: list[str] = []  # of the policy's weights, in the order of publication
        self.is_publishing = False

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: Event) -> CompletionStream:
        """Implement `Engine.generate`. Servers are served in a thread, also while the consumer verifies.

        Raises:
            EngineFailed: No server can complete a request, or none is left.
            ValueError: A prompt is empty or has an id outside the vocabulary, which crashes some servers.
        """
        for number, request in enumerate(requests):
            ids = (*request.prompt_ids, *(request.start.ids if request.start else ()))
            if not request.prompt_ids or not all(0 <= token < self.vocab_size for token in ids):
                problem = f"empty or has an id outside the vocabulary of {self.vocab_size}"
                raise ValueError(f"request {number}: its prompt is {problem}")
        with _loop_in_thread() as loop:
            batch = _Batch(self, requests, sampling)
            task = asyncio.run_coroutine_threadsafe(batch.run(), loop)
            while (completions := batch.done.get()) is not None:
                yield completions
                if stop.is_set() and not batch.stopped:
                    asyncio.run_coroutine_threadsafe(batch.stop(), loop).result()
            task.result()

    def quarantine(self, target: Target, reason: str, is_invalid: bool = False) -> None:
        """Send no more requests to this server, and cancel those in flight."""
        target.is_invalid |= is_invalid
        if target.quarantined is None:
            target.quarantined = reason
            self.report_failure(target.url, reason, is_invalid)
            for call in list(target.calls):
                call.cancel()

    def start_publication(self, version: str) -> None:
        """Accept replies made with `version`, and still those of the version before."""
        self.versions.append(version)
        self.is_publishing = True

    def end_publication(self, states: dict[str, str | None]) -> None:
        """Apply the first rank's states, by URL: the reason for quarantine, or None."""
        for target in self.targets:
            target.quarantined = states[target.url]
            target.is_invalid, target.timeouts = False, 0
        self.is_publishing = False

    def accepted_versions(self) -> list[str]:
        """Return the weight versions that a reply to a request sent now may have been made with."""
        return self.versions[max(0, len(self.versions) - 1 - self.is_publishing) :]

    def invalid_replies(self) -> dict[str, str]:
        """Return the servers with invalid replies to this rank since the last publication: {url: reason}."""
        return {target.url: target.quarantined or "" for target in self.targets if target.is_invalid}


class _Batch:
    """One call of `generate`: workers that take requests from a queue, and a health check of the servers."""

    def __init__(self, generation: Generation, requests: Sequence[Request], sampling: Sampling):
        self.generation = generation
        self.settings = generation.settings
        self.requests = requests
        self.sampling = sampling
        self.stopped = False
        self._waiting = deque(range(len(requests)))
        self._running: dict[str, tuple[Target, httpx.AsyncClient]] = {}  # by request id
        self.done: SimpleQueue[dict[int, Completion] | None] = SimpleQueue()  # None: the end
        self._no_server_since: float | None = None

    async def run(self) -> None:
        """Complete every request unless stopped. Raises EngineFailed."""
        try:
            async with client(self.settings) as self._http:
                health = asyncio.create_task(self._check_health())
                try:
                    workers = min(self.generation.concurrency, len(self.requests))
                    await _all_or_none([self._work() for _ in range(workers)], health)
                finally:
                    health.cancel()
            for number in self._waiting:
                self.done.put({number: self.requests[number].aborted()})
        finally:
            self.done.put(None)

    async def stop(self) -> None:
        """Abort requests in flight, repeatedly: a request may reach its server after its abort."""
        self.stopped = True
        until = time.monotonic() + self.settings.health_timeout
        while self._running and time.monotonic() < until:
            calls = []
            for request_id, (target, http) in self._running.items():
                call = self.generation.api.abort_call(request_id)
                if call is not None:
                    url = f"{target.url}{call.path}"
                    calls.append(send(http, "POST", url, call.body, 5, CONTROL_BYTES))
            if not calls:
                for target in self.generation.targets:
                    for running in list(target.calls):
                        running.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await asyncio.sleep(0.2)
        for target in {target.url: target for target, _ in self._running.values()}.values():
            seconds = self.settings.health_timeout
            self.generation.quarantine(target, f"abort: requests still run after {seconds:g} s")

    async def _work(self) -> None:
        # one client per worker: it scans all its connections for every request, 8 ms of CPU time with 64
        async with client(self.settings) as http:
            while self._waiting and not self.stopped:
                number = self._waiting.popleft()
                self.done.put({number: await self._complete(http, self.requests[number])})

    async def _complete(self, http: httpx.AsyncClient, request: Request) -> Completion:
        """Return the request's completion, after as many attempts as `retries` allows."""
        done, failure, url = request.start, "the server aborted it every time", ""
        for attempt in range(1 + self.settings.retries):
            if attempt and not self.stopped:
                await asyncio.sleep(min(0.25 * 2**attempt, _LONGEST_PAUSE))
            target = await self._free_target()
            if target is None:
                break
            url = target.url
            try:
                done = joined(done, await self._request(http, target, request, done))
            except _AttemptFailed as error:
                failure = str(error)
                continue
            if done.finish_reason != "abort":
                return done
            if self.stopped:
                break
        if self.stopped:
            return (done or EMPTY)._replace(finish_reason="abort")
        times = f"{1 + self.settings.retries} times (rollout.{self.settings.name}.retries)"
        raise EngineFailed(f"a request failed {times}, the last time at {url}: {failure}")

    async def _free_target(self) -> Target | None:
        """Return the least loaded server, None once stopped. Raises EngineFailed if none will recover."""
        while not self.stopped:
            usable = [target for target in self.generation.targets if target.quarantined is None]
            if usable:
                self._no_server_since = None
                return min(usable, key=lambda target: (target.timeouts, len(target.calls)))
            self._no_server_since = self._no_server_since or time.monotonic()
            reason = self.generation.no_server_reason(time.monotonic() - self._no_server_since)
            if reason is not None:
                each = "; ".join(f"{target.url}: {target.quarantined}" for target in self.generation.targets)
                raise EngineFailed(f"no server is left: {reason} ({each})")
            beat()  # `no_server_reason` ends this wait
            await asyncio.sleep(0.1)
        return None

    async def _request(
        self, http: httpx.AsyncClient, target: Target, request: Request, start: Completion | None
    ) -> Completion:
        """Return one server's continuation of `start`. Raises EngineFailed if a retry cannot help."""
        done = start.ids if start else []
        limit = self.sampling.max_tokens - len(done)
        if limit <= 0:
            return EMPTY._replace(finish_reason="length")
        versions = self.generation.accepted_versions()
        request_id, ids = uuid.uuid4().hex, [*request.prompt_ids, *done]
        call = self.generation.api.call(request_id, ids, limit, self.sampling, f"{request.seed}/{len(done)}")
        self._running[request_id] = target, http
        try:
            size = (_TOKEN_BYTES + call.more_bytes) * (limit + len(ids))
            reply = await self._post(http, target, call, size)
        finally:
            del self._running[request_id]
        self._check_status(target, call, reply, len(ids))
        try:
            completion = self.generation.api.parse(call, reply.json(), limit, versions)
        except MALFORMED as error:
            self.generation.quarantine(target, f"{call.path}: {error}", is_invalid=True)
            raise _AttemptFailed(target.quarantined) from None
        ends_at_stop = bool(completion.ids) and completion.ids[-1] in self.sampling.stop_ids
        if completion.finish_reason == "abort" and ends_at_stop:
            # an abort that arrives with the last token hides the stop
            return completion._replace(finish_reason="stop")
        if completion.finish_reason == "stop" and not ends_at_stop:
            found = f"{target.url} ends responses at token {completion.ids[-1]}"
            known = f"{self.sampling.stop_ids} (eos_token_id of the tokenizer and of generation_config.json)"
            hint = "add it to generation_config.json"
            raise EngineFailed(f"{found}, which is not among the trainer's {known}: {hint}")
        return completion

    def _check_status(self, target: Target, call: Call, reply: Reply, tokens: int) -> None:
        if reply.status in (400, 413, 422):
            raise EngineFailed(f"{target.url} refuses a request of {tokens} tokens: {reply.text}")
        if reply.status in (429, 503):
            raise _AttemptFailed(f"{call.path}: {reply.status}: the server is overloaded")
        if reply.status != 200:
            reason = f"{call.path}: {reply.status}: {reply.text[:200]}"
            self.generation.quarantine(target, reason)
            raise _AttemptFailed(target.quarantined)

    async def _post(self, http: httpx.AsyncClient, target: Target, call: Call, limit: int) -> Reply:
        """Return the reply, of at most `limit` bytes and some. Raises _AttemptFailed."""
        seconds, began = self.settings.request_timeout, time.monotonic()
        request = send(http, "POST", f"{target.url}{call.path}", call.body, seconds, _REPLY_BYTES + limit)
        task = asyncio.create_task(request)
        target.calls.add(task)
        try:
            await asyncio.wait({task})
            if task.cancelled():
                raise _AttemptFailed(target.quarantined)
            reply = task.result()
            target.answered_at, target.timeouts = time.monotonic(), 0
            return reply
        except TimeoutError:
            reason = f"no answer in {seconds:g} s (rollout.{self.settings.name}.request_timeout)"
            if target.answered_at < began:  # not even to another request
                self._note_timeout(target, f"{call.path}: {reason}")
            raise _AttemptFailed(reason) from None
        except InvalidReply as error:
            self.generation.quarantine(target, f"{call.path}: {error}", is_invalid=True)
            raise _AttemptFailed(target.quarantined) from None
        except httpx.HTTPError as error:
            await self._check_target(target)  # a broken connection alone is no failure of the server
            raise _AttemptFailed(f"{type(error).__name__}: {error}") from None
        finally:
            task.cancel()
            target.calls.discard(task)

    def _note_timeout(self, target: Target, reason: str) -> None:
        """Quarantine a server that answers no request; the only one that is left has a second attempt.

        Its health checks may succeed, so they do not end this quarantine (`is_invalid`).
        """
        target.timeouts += 1
        others = [other for other in self.generation.targets if other.quarantined is None]
        if target.timeouts > 1 or len(others) > 1:
            self.generation.quarantine(target, reason, is_invalid=True)

    async def _check_health(self) -> None:
        """Quarantine servers that do not respond, and use recovered ones again."""
        while True:
            await asyncio.sleep(_HEALTH_INTERVAL)
            if not self.generation.is_publishing:  # a paused server does not answer
                await asyncio.gather(*(self._check_target(target) for target in self.generation.targets))

    async def _check_target(self, target: Target) -> None:
        api = self.generation.api
        path = api.version_path if target.quarantined else api.health_path
        try:
            info = await self._get(f"{target.url}{path}")
            if target.quarantined is None and target.calls:
                beat()  # it generates tokens, maybe for longer than the watchdog waits; see request_timeout
            may_return = target.quarantined is not None and not target.is_invalid
            if may_return and api.has_version(info.json(), self.generation.versions[-1]):
                await self._get(f"{target.url}{api.health_path}")  # a hung server reports a version, too
                target.quarantined = None
        except (httpx.HTTPError, TimeoutError, _AttemptFailed, *MALFORMED) as error:
            target.is_invalid &= not isinstance(error, httpx.ConnectError)
            if not self.generation.is_publishing:
                self.generation.quarantine(target, f"{path}: {type(error).__name__}: {error}")

    async def _get(self, url: str) -> Reply:
        reply = await send(self._http, "GET", url, None, self.settings.health_timeout, CONTROL_BYTES)
        if reply.status != 200:
            raise _AttemptFailed(f"{reply.status}: {reply.text[:200]}")
        return reply


@contextmanager
def _loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """Yield an event loop that runs in a thread of its own; on exit, cancel what it still runs."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever, name="requests", daemon=True)
        thread.start()
        try:
            yield loop
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


async def _all_or_none(coroutines: Sequence[Coroutine], background: asyncio.Task) -> None:
    """Await all; raise the first failure, also that of `background`, and cancel the others."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        pending = set(tasks)
        while pending:
            done, _ = await asyncio.wait({*pending, background}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            pending -= done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
