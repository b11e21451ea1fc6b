"""Requests of one rank to all servers: each to the least loaded one, and to another one when that fails."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from megatron_srpo.config.schema import SGLangSection
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.rollout.engine import Completion, EngineFailed, Finished, Request, Sampling
from megatron_srpo.rollout.servers.http import IDLE, headers
from megatron_srpo.rollout.sglang.replies import BadReply, joined, parse

_NOTHING = Completion([], [], [], "abort")
_LOOK_AGAIN = 2.0  # seconds between looks at the servers
_LONGEST_PAUSE = 10.0  # seconds between two attempts of one request


class _Failed(Exception):
    """This attempt gave nothing; the same request can be asked for elsewhere."""


@dataclass
class Target:
    """A server as this rank sees it. out: why it gets no requests, None when it does; is_distrusted: it lied,
    and stays out until it is seen dead (it is another one when it is back) or the first rank says otherwise.
    """

    url: str
    out: str | None = None
    is_distrusted: bool = False
    calls: set[asyncio.Task] = field(default_factory=set)


class Generation:
    """Asks servers for completions, whatever becomes of them.

    Args:
        urls: of all servers, alike on every rank.
        rank, world_size: this rank's share of rollout.sglang.concurrency, and the server it prefers among
        equals.
        is_seeded: whether servers keep to sampling_seed.
        complain: called with (url, what it did, whether that was a lie) when a server is taken out.
        hopeless: called with the seconds for which there has been no server: why none will come back, or None
            while one may.
    """

    def __init__(
        self,
        urls: Sequence[str],
        settings: SGLangSection,
        vocab_size: int,
        rank: int,
        world_size: int,
        is_seeded: bool,
        complain: Callable[[str, str, bool], None],
        hopeless: Callable[[float], str | None],
    ):
        self.targets = [Target(url) for url in [*urls[rank % len(urls) :], *urls[: rank % len(urls)]]]
        self.settings, self.vocab_size, self.is_seeded = settings, vocab_size, is_seeded
        self.complain, self.hopeless = complain, hopeless
        self.concurrency = max(1, settings.concurrency // world_size)
        self.versions: list[str] = []  # of the policy's weights, as they were published
        self.is_publishing = False
        self.tls = httpx.create_ssl_context(trust_env=False)  # shared: it takes longer to make than a request

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished) -> None:
        """See `Engine.generate`.

        Raises EngineFailed, and ValueError for an id outside the vocabulary, which kills some servers.
        """
        for number, request in enumerate(requests):
            ids = (*request.prompt_ids, *(request.start.ids if request.start else ()))
            if not request.prompt_ids or not all(0 <= token < self.vocab_size for token in ids):
                raise ValueError(
                    f"request {number}: its prompt is empty or has an id outside the vocabulary of {self.vocab_size}"
                )
        asyncio.run(_Batch(self, requests, sampling, finished).run())

    def take_out(self, target: Target, reason: str, is_distrusted: bool = False) -> None:
        """No more requests to this server, and those that it has are called back."""
        target.is_distrusted |= is_distrusted
        if target.out is None:
            target.out = reason
            self.complain(target.url, reason, is_distrusted)
            for call in list(target.calls):
                call.cancel()

    def start_publication(self, version: str) -> None:
        """From now on servers may answer with `version`, and need not with the one before."""
        self.versions.append(version)
        self.is_publishing = True

    def end_publication(self, states: dict[str, str | None]) -> None:
        """The first rank's word on every server: why it is out, None when it is to be used."""
        for target in self.targets:
            target.out, target.is_distrusted = states[target.url], False
        self.is_publishing = False

    def lies(self) -> dict[str, str]:
        """The servers that lied to this rank and have not been seen to since: {url: what they said}."""
        return {target.url: target.out or "" for target in self.targets if target.is_distrusted}


class _Batch:
    """One call of `generate`: workers that take requests from a queue, and one task that watches the
    servers.
    """

    def __init__(
        self, generation: Generation, requests: Sequence[Request], sampling: Sampling, finished: Finished
    ):
        self.generation, self.settings = generation, generation.settings
        self.requests, self.sampling, self.finished = requests, sampling, finished
        self.waiting = deque(range(len(requests)))
        self.running: dict[str, tuple[Target, httpx.AsyncClient]] = {}  # request ids at their servers
        self.enough = False
        self.nobody_since: float | None = None  # when the last usable server was lost

    async def run(self) -> None:
        """Until every request has been handed over."""
        async with self._client() as self.http:
            watch = asyncio.create_task(self._watch())
            try:
                workers = min(self.generation.concurrency, len(self.requests))
                await _all_or_none([self._work() for _ in range(workers)], watch)
            finally:
                watch.cancel()
        for number in self.waiting:
            self.finished({number: (self.requests[number].start or _NOTHING)._replace(finish_reason="abort")})

    def _client(self) -> httpx.AsyncClient:
        """One for each worker: a client looks through all its connections for every request, which with 64
        took 8 ms of CPU time.
        """
        limits = httpx.Limits(keepalive_expiry=IDLE)
        return httpx.AsyncClient(
            timeout=None,
            headers=headers(self.settings),
            limits=limits,
            trust_env=False,
            verify=self.generation.tls,
        )

    async def _work(self) -> None:
        async with self._client() as http:
            while self.waiting and not self.enough:
                number = self.waiting.popleft()
                completion = await self._complete(http, self.requests[number])
                if self.finished({number: completion}) and not self.enough:
                    self.enough = True
                    await self._abort()

    async def _complete(self, http: httpx.AsyncClient, request: Request) -> Completion:
        """The request's completion, after as many attempts as it takes and rollout.sglang.retries allows."""
        done, failure = request.start, "it was aborted by the server again and again"
        for attempt in range(1 + self.settings.retries):
            if attempt:
                await asyncio.sleep(min(0.25 * 2**attempt, _LONGEST_PAUSE))
            target = await self._free_target()
            if target is None:
                break
            try:
                done = joined(done, await self._ask(http, target, request, done))
            except _Failed as error:
                failure = str(error)
                continue
            if done.finish_reason != "abort":
                return done
            if self.enough:
                break
        if self.enough:
            return (done or _NOTHING)._replace(finish_reason="abort")
        raise EngineFailed(
            f"a request failed {1 + self.settings.retries} times (rollout.sglang.retries), the last time at {target.url}: {failure}"
        )

    async def _free_target(self) -> Target | None:
        """The least loaded server, None when there is enough.

        Waits for one to come back. Raises EngineFailed when none will.
        """
        while not self.enough:
            usable = [target for target in self.generation.targets if target.out is None]
            if usable:
                self.nobody_since = None
                return min(usable, key=lambda target: len(target.calls))
            self.nobody_since = self.nobody_since or time.monotonic()
            if (reason := self.generation.hopeless(time.monotonic() - self.nobody_since)) is not None:
                told = "; ".join(f"{target.url}: {target.out}" for target in self.generation.targets)
                raise EngineFailed(f"no SGLang server is left: {reason} ({told})")
            beat()  # `hopeless` ends this wait
            await asyncio.sleep(0.1)
        return None

    async def _ask(
        self, http: httpx.AsyncClient, target: Target, request: Request, start: Completion | None
    ) -> Completion:
        """What one server makes of a request. Raises _Failed after which the server is out or the request may
        be repeated, and EngineFailed when it is refused, which every server would do.
        """
        done = start.ids if start else []
        limit = self.sampling.max_tokens - len(done)
        if limit <= 0:
            return _NOTHING._replace(finish_reason="length")
        key = uuid.uuid4().hex
        oldest = max(
            0, len(self.generation.versions) - 1 - self.generation.is_publishing
        )  # not all servers have it yet
        body = {"rid": key, "input_ids": [*request.prompt_ids, *done], "return_logprob": True}
        body["sampling_params"] = self._parameters(request, limit, len(done))
        self.running[key] = target, http
        try:
            response = await self._post(http, target, body)
        finally:
            del self.running[key]
        if response.status_code in (400, 413, 422):
            raise EngineFailed(
                f"{target.url} refuses a request of {len(body['input_ids'])} tokens: {response.text[:500]}"
            )
        if response.status_code in (429, 503):
            raise _Failed(f"/generate: {response.status_code}: it has too much to do")
        if response.status_code != 200:
            self.generation.take_out(target, f"/generate: {response.status_code}: {response.text[:200]}")
            raise _Failed(target.out)
        try:
            completion = parse(
                response.json(), limit, self.generation.vocab_size, self.generation.versions[oldest:]
            )
        except (BadReply, ValueError) as error:  # ValueError: no JSON
            self.generation.take_out(target, f"/generate: {error}", is_distrusted=True)
            raise _Failed(target.out) from None
        if (
            completion.finish_reason == "abort"
            and completion.ids
            and completion.ids[-1] in self.sampling.stop_ids
        ):
            return completion._replace(
                finish_reason="stop"
            )  # SGLang says of a request that is aborted with its last token: aborted
        if completion.finish_reason == "stop" and completion.ids[-1] not in self.sampling.stop_ids:
            raise EngineFailed(
                f"{target.url} ends responses at token {completion.ids[-1]}, which is not among the trainer's {self.sampling.stop_ids}"
                " (eos_token_id of the tokenizer and of generation_config.json): name it in generation_config.json"
            )
        return completion

    async def _post(self, http: httpx.AsyncClient, target: Target, body: dict[str, Any]) -> httpx.Response:
        call = asyncio.create_task(http.post(f"{target.url}/generate", json=body))
        target.calls.add(call)
        try:
            await asyncio.wait({call}, timeout=self.settings.request_timeout)
            if not call.done():
                raise _Failed(
                    f"no answer in {self.settings.request_timeout:g} s (rollout.sglang.request_timeout)"
                )
            if call.cancelled():
                raise _Failed(target.out)
            return call.result()
        except httpx.HTTPError as error:
            await self._look_at(target)  # a broken connection alone says nothing
            raise _Failed(f"{type(error).__name__}: {error}") from None
        finally:
            call.cancel()
            target.calls.discard(call)

    def _parameters(self, request: Request, limit: int, done: int) -> dict[str, Any]:
        sampling = self.sampling
        parameters = {
            "max_new_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": not sampling.stop_ids,  # else it stops at its own, too
            "skip_special_tokens": False,
        }
        if self.generation.is_seeded:
            digest = hashlib.sha256(f"{request.seed}/{done}".encode()).digest()
            parameters["sampling_seed"] = int.from_bytes(digest[:4], "little") >> 1
        return parameters

    async def _abort(self) -> None:
        """End what still runs at the servers; again and again, as a request may reach its server after its
        abort.
        """
        until = time.monotonic() + self.settings.health_timeout
        while self.running and time.monotonic() < until:
            aborts = [
                http.post(f"{target.url}/abort_request", json={"rid": key}, timeout=5)
                for key, (target, http) in self.running.items()
            ]
            await asyncio.gather(*aborts, return_exceptions=True)
            await asyncio.sleep(0.2)
        for target in {target.url: target for target, _ in self.running.values()}.values():
            self.generation.take_out(
                target, f"/abort_request: requests still run after {self.settings.health_timeout:g} s"
            )

    async def _watch(self) -> None:
        """Look at every server now and then: a silent one is taken out, one that is back is used again."""
        while True:
            await asyncio.sleep(_LOOK_AGAIN)
            if not self.generation.is_publishing:  # a paused server does not answer
                await asyncio.gather(*(self._look_at(target) for target in self.generation.targets))

    async def _get(self, url: str) -> httpx.Response:
        response = await self.http.get(url, timeout=self.settings.health_timeout)
        return response.raise_for_status()

    async def _look_at(self, target: Target) -> None:
        path = "/model_info" if target.out else "/health"
        try:
            response = await self._get(f"{target.url}{path}")
            if target.out is None and target.calls:
                # it makes tokens: the longest response may take longer than a watchdog waits, request_timeout
                # ends that
                beat()
            if (
                target.out
                and not target.is_distrusted
                and str(response.json()["weight_version"]) == self.generation.versions[-1]
            ):
                await self._get(f"{target.url}/health")  # what hangs or is paused has a version, too
                target.out = None
        except (httpx.HTTPError, ValueError, TypeError, KeyError, IndexError) as error:
            target.is_distrusted &= not isinstance(error, httpx.ConnectError)
            if not self.generation.is_publishing:
                self.generation.take_out(target, f"{path}: {type(error).__name__}: {error}")


async def _all_or_none(coroutines: Sequence[Coroutine], beside: asyncio.Task) -> None:
    """Await all; the first failure, `beside`'s too, ends the others and is raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        pending = set(tasks)
        while pending:
            done, _ = await asyncio.wait({*pending, beside}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            pending -= done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
