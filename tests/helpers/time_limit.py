"""Limit the time of code that might hang in this process."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fail the test after `seconds`; as a decorator, limit every call."""

    def expire(*_: object) -> None:
        pytest.fail(f"hangs: not done after {seconds} s")

    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
