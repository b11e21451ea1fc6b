"""Which part of the vocabulary a rank holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class VocabShard(NamedTuple):
    """This rank's columns of the vocabulary: ids start … start + width - 1. Padded columns are not counted in `width`.

    group: the tensor-parallel ranks that hold the other columns; None when this rank holds them all.
    """

    start: int
    width: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_rank(cls, rank: int, padded_width: int, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """The shard of tensor-parallel rank `rank` when every rank holds `padded_width` rows of the output matrix."""
        start = min(rank * padded_width, vocab_size)
        return cls(start, min(padded_width, vocab_size - start), vocab_size, group)


def all_reduce(values: Tensor, group: dist.ProcessGroup | None, op=dist.ReduceOp.SUM) -> Tensor:
    """In-place all-reduce; nothing to do without a group."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
    return values


def own_columns(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Which targets this shard holds, and their columns (0 for the others)."""
    column = targets - shard.start
    mine = (column >= 0) & (column < shard.width)
    return mine, column * mine


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype inside a tile: fp32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
