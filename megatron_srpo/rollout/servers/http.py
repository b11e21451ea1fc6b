"""Calls that control one server: plain HTTP, JSON in both directions."""

import os
from pathlib import Path
from typing import Any

import httpx

from megatron_srpo.config.engines import ServerSettings

IDLE = 2.0  # seconds after which an idle connection is dropped; servers close theirs after 5


class ServerFailed(RuntimeError):
    """A call to a server failed; the message has the URL and the reason."""


def headers(settings: ServerSettings) -> dict[str, str]:
    """Return the headers of every call: the API key, if the configuration names its variable."""
    if settings.api_key_env is None:
        return {}
    return {"Authorization": f"Bearer {os.environ[settings.api_key_env]}"}


class Server:
    """The server at `url`; subclassed for each kind of server."""

    def __init__(self, url: str, settings: ServerSettings):
        url = url.rstrip("/")
        self.url = url
        self.settings = settings
        self.incarnation = 0  # changes whenever another process may answer at the URL
        self.host = httpx.URL(url).host
        # trust_env: this machine's proxy settings are not for servers of the same cluster
        limits = httpx.Limits(keepalive_expiry=IDLE)
        self._http = httpx.Client(base_url=url, headers=headers(settings), trust_env=False, limits=limits)

    def get(self, path: str, timeout: float | None = None) -> dict[str, Any]:
        """Send GET `path`. timeout: in seconds, default health_timeout. Raises ServerFailed."""
        return self._call("GET", path, None, timeout or self.settings.health_timeout)

    def post(self, path: str, body: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """Send POST `path` with `body`. timeout: in seconds, default update_timeout. Raises ServerFailed."""
        return self._call("POST", path, body, timeout or self.settings.update_timeout)

    def version(self) -> str:
        """Return the version of the server's weights, as it reports it. Raises ServerFailed."""
        raise NotImplementedError

    def check_up(self) -> None:
        """Raise ServerFailed unless the server responds and generates tokens. Hangs while it is paused."""
        raise NotImplementedError

    def load(self, folder: Path, version: str) -> None:
        """Make the server read the weights in `folder`. Raises ServerFailed."""
        raise NotImplementedError

    def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=body, timeout=timeout)
        except httpx.TimeoutException:
            raise ServerFailed(f"{self.url}{path}: no answer in {timeout:g} s") from None
        except httpx.HTTPError as error:
            raise ServerFailed(f"{self.url}{path}: {type(error).__name__}: {error}") from None
        if response.status_code != 200:
            raise ServerFailed(f"{self.url}{path}: {response.status_code}: {response.text[:500]}")
        try:
            content = response.json() if response.content else {}
        except ValueError:
            raise ServerFailed(f"{self.url}{path}: the answer is not JSON: {response.text[:100]!r}") from None
        return content if isinstance(content, dict) else {}

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
