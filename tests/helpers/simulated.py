"""Simulate one rank of many with torch's fake backend, whose collectives do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_srpo.config.schema import ParallelSection
from megatron_srpo.distributed.layout import Layout, initialize, shut_down


@contextmanager
def simulated(rank: int, world_size: int, parallel: ParallelSection | None = None) -> Iterator[Layout]:
    """Yield the layout of `rank` of `world_size` under `parallel`, with all of Megatron's groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world_size))
        new_group = dist.new_group
        patch.setattr(dist, "new_group", lambda ranks=None, **options: new_group(ranks, backend="fake"))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            layout = initialize(parallel or ParallelSection(), seed=1)
            try:
                with _Zeros():
                    yield layout
            finally:
                shut_down(layout)
        finally:
            dist.destroy_process_group()


class _Zeros(TorchDispatchMode):
    """Fill new memory with zeros.

    A buffer for another rank's data keeps its content, which might otherwise be NaN.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        return made.zero_() if "empty" in function._schema.name else made


class Collectives(TorchDispatchMode):
    """Record every collective of this process while entered: (operation, bytes of its tensors)."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.seen.append((function._schema.name.removeprefix("c10d::"), _bytes(args[0])))
        return function(*args, **(kwargs or {}))


def _bytes(tensors) -> int:
    if isinstance(tensors, (list, tuple)):
        return sum(map(_bytes, tensors))
    return tensors.nbytes if hasattr(tensors, "nbytes") else 0
