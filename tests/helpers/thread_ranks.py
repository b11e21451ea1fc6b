"""Simulate the ranks of a run by threads that exchange bytes; each trains its own samples."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_srpo.distributed.layout import Layout

_T = TypeVar("_T")


@dataclass(frozen=True)
class ThreadLayout(Layout):
    """A layout whose ranks are threads; `sent` and `received` count the bytes of this rank's messages."""

    meeting: Any = None
    shown: list[Any] = field(default_factory=list)  # shared: what each rank sends
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    def gather_bytes(self, own: bytes, background: bool = False) -> list[bytes]:
        """Return every rank's bytes."""
        everyone = self._meet(own)
        self.sent.append(len(own))
        self.received.append(sum(map(len, everyone)))
        return everyone

    def exchange_bytes(
        self, outgoing: Mapping[int, bytes], incoming: Mapping[int, int], background: bool = False
    ) -> dict[int, bytes]:
        """Return the messages to this rank; their sizes must be those of `incoming`."""
        everyone = self._meet(outgoing)
        messages = {rank: sent[self.rank] for rank, sent in enumerate(everyone) if self.rank in sent}
        assert incoming == {rank: len(message) for rank, message in messages.items()}
        self.sent.append(sum(map(len, outgoing.values())))
        self.received.append(sum(map(len, messages.values())))
        return messages

    def _meet(self, own: Any) -> list[Any]:
        self.shown[self.rank] = own
        self.meeting.wait()
        everyone = [*self.shown]
        self.meeting.wait()
        return everyone


def on_ranks(ranks: int, work: Callable[[ThreadLayout], _T]) -> list[_T]:
    """Return what work(layout) returns on every rank, each in a thread; an error ends all of them."""
    meeting, shown = threading.Barrier(ranks, timeout=60), [b""] * ranks
    layouts = [
        ThreadLayout(
            rank=rank,
            world_size=ranks,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            meeting=meeting,
            shown=shown,
        )
        for rank in range(ranks)
    ]

    def one(layout: ThreadLayout) -> _T:
        try:
            return work(layout)
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(ranks) as threads:
        futures = [threads.submit(one, layout) for layout in layouts]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
