"""HTTP to the servers, JSON in both directions: a call has one time limit, and its reply a size limit."""

import asyncio
import json
import os
from functools import cache
from pathlib import Path
from ssl import SSLContext
from typing import Any, NamedTuple

import httpx

from megatron_srpo.config.engines import ServerSettings
from megatron_srpo.rollout.servers.replies import InvalidReply

IDLE = 2.0  # seconds after which an idle connection is dropped; servers close theirs after 5
CONTROL_BYTES = 32 << 20  # of a reply to a control call; checksums of all tensors are the longest


class ServerFailed(RuntimeError):
    """A call to a server failed; the message has the URL and the reason."""


class Reply(NamedTuple):
    """A complete reply."""

    status: int
    content: bytes

    @property
    def text(self) -> str:
        """The start of the content, for messages."""
        return self.content[:500].decode(errors="replace")

    def json(self) -> Any:
        """Return the JSON value. Raises InvalidReply, also for values nested too deeply."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError) as error:
            raise InvalidReply(f"the answer is not JSON ({error}): {self.text[:100]!r}") from None


async def send(
    http: httpx.AsyncClient, method: str, url: str, body: Any, timeout: float, limit: int
) -> Reply:
    """Send a request and read the reply, both within `timeout` seconds, however slowly it arrives.

    Raises:
        TimeoutError: The reply was not complete in time.
        InvalidReply: It has more than `limit` bytes, of which no more are read.
        httpx.HTTPError: The connection failed.
    """
    content = bytearray()
    async with asyncio.timeout(timeout), http.stream(method, url, json=body) as response:
        async for part in response.aiter_raw():
            content += part
            if len(content) > limit:
                raise InvalidReply(f"the answer has more than {limit} bytes")
    return Reply(response.status_code, bytes(content))


def client(settings: ServerSettings) -> httpx.AsyncClient:
    """Return a client for the servers, without time limits of its own."""
    given = {"Accept-Encoding": "identity"}  # compressed replies could be larger than they look
    if settings.api_key_env is not None:
        given["Authorization"] = f"Bearer {os.environ[settings.api_key_env]}"
    # trust_env: this machine's proxy settings are not for servers of the same cluster
    limits = httpx.Limits(keepalive_expiry=IDLE)
    return httpx.AsyncClient(timeout=None, headers=given, limits=limits, trust_env=False, verify=_tls())


@cache
def _tls() -> SSLContext:
    return httpx.create_ssl_context(trust_env=False)  # it takes longer to make than a request


class Server:
    """The server at `url`; subclassed for each kind of server."""

    def __init__(self, url: str, settings: ServerSettings):
        self.url = url.rstrip("/")
        self.settings = settings
        self.incarnation = 0  # changes whenever another process may answer at the URL
        self.host = httpx.URL(url).host

    def get(self, path: str, timeout: float | None = None) -> dict[str, Any]:
        """Send GET `path`. timeout: in seconds, default health_timeout. Raises ServerFailed."""
        return asyncio.run(self._call("GET", path, None, timeout or self.settings.health_timeout))

    def post(self, path: str, body: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """Send POST `path` with `body`. timeout: in seconds, default update_timeout. Raises ServerFailed."""
        return asyncio.run(self._call("POST", path, body, timeout or self.settings.update_timeout))

    def version(self) -> str:
        """Return the version of the server's weights, as it reports it. Raises ServerFailed."""
        raise NotImplementedError

    def check_up(self) -> None:
        """Raise ServerFailed unless the server responds and generates tokens. Hangs while it is paused."""
        raise NotImplementedError

    def load(self, folder: Path, version: str) -> None:
        """Make the server read the weights in `folder`. Raises ServerFailed."""
        raise NotImplementedError

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None, timeout: float
    ) -> dict[str, Any]:
        url = f"{self.url}{path}"
        try:
            async with client(self.settings) as http:
                reply = await send(http, method, url, body, timeout, CONTROL_BYTES)
            if reply.status != 200:
                raise ServerFailed(f"{url}: {reply.status}: {reply.text}")
            content = reply.json() if reply.content else {}
        except TimeoutError:
            raise ServerFailed(f"{url}: no answer in {timeout:g} s") from None
        except httpx.HTTPError as error:
            raise ServerFailed(f"{url}: {type(error).__name__}: {error}") from None
        except InvalidReply as error:
            raise ServerFailed(f"{url}: {error}") from None
        return content if isinstance(content, dict) else {}
