"""Calls that control one server: plain HTTP, JSON out and in."""

from __future__ import annotations

import os
from typing import Any

import httpx

from megatron_srpo.config.schema import SGLangSection

IDLE = 2.0  # seconds after which a connection is not used again; servers close theirs after 5


class ServerFailed(RuntimeError):
    """A server did not do what it was asked; the message says what it did instead."""


def headers(settings: SGLangSection) -> dict[str, str]:
    """What every call carries: the API key, when the configuration names the variable that holds it."""
    return (
        {}
        if settings.api_key_env is None
        else {"Authorization": f"Bearer {os.environ[settings.api_key_env]}"}
    )


class Server:
    """The server at `url`. incarnation: changes when another process may stand behind the url."""

    def __init__(self, url: str, settings: SGLangSection):
        self.url, self.settings, self.incarnation = url.rstrip("/"), settings, 0
        self.host = httpx.URL(url).host
        # trust_env: a proxy that this machine's environment names is not for servers of the same cluster
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers(settings),
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=IDLE),
        )

    def get(self, path: str, timeout: float | None = None) -> dict[str, Any]:
        """GET `path`. timeout: seconds, None: rollout.sglang.health_timeout. Raises ServerFailed."""
        return self._call("GET", path, None, timeout or self.settings.health_timeout)

    def post(self, path: str, body: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """POST `body` to `path`. timeout: seconds, None: rollout.sglang.update_timeout.

        Raises ServerFailed.
        """
        return self._call("POST", path, body, timeout or self.settings.update_timeout)

    def version(self) -> str:
        """The version of the weights that the server has, by its own account. Raises ServerFailed."""
        return str(self.get("/model_info").get("weight_version"))

    def check_health(self) -> None:
        """Raises ServerFailed unless the server makes a token (or others', meanwhile).

        It hangs while paused.
        """
        self.get("/health")

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
        """Drop the connection."""
        self._http.close()
