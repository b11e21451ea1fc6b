"""Which part of the vocabulary a rank holds, and what its tensor-parallel ranks tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class VocabShard(NamedTuple):
    """This rank's columns of the vocabulary: ids start … start + width - 1. Padded columns are not counted in
    `width`.

    group: the tensor-parallel ranks that hold the other columns; None when this rank holds them all.
    """

    start: int
    width: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_rank(
        cls, rank: int, padded_width: int, vocab_size: int, group: dist.ProcessGroup | None
    ) -> VocabShard:
        """The shard of tensor-parallel rank `rank` when every rank holds `padded_width` rows of the output
        matrix.
        """
        start = min(rank * padded_width, vocab_size)
        return cls(start, min(padded_width, vocab_size - start), vocab_size, group)

    @property
    def is_split(self) -> bool:
        """Whether other ranks hold columns too."""
        return self.group is not None and dist.get_world_size(self.group) > 1


def all_reduce(values: Tensor, group: dist.ProcessGroup | None, op=dist.ReduceOp.SUM) -> Tensor:
    """In-place all-reduce; nothing to do without a group."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
    return values


def gather(values: Tensor, shard: VocabShard, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
    """Every rank's `values` (one shape everywhere), [ranks, *shape]; `meanwhile()` runs while they travel.

    A sum of these is the same on all ranks to the last bit, which not every all-reduce promises.
    """
    if not shard.is_split:
        meanwhile()
        return values[None]
    everyone = values.new_empty(dist.get_world_size(shard.group) * values.numel())
    work = _all_gather(everyone, values.contiguous().view(-1), group=shard.group, async_op=True)
    meanwhile()
    work.wait()
    return everyone.view(-1, *values.shape)


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


def check_consistent(
    problem: str | None, shard: VocabShard, same: dict[str, int], device: torch.device
) -> int:
    """One small all-gather that turns what is wrong on any rank into a ValueError on every rank, before
    anything waits for it.

    Args:
        problem: what does not fit on this rank, or None.
        same: numbers that must be the same on all ranks, by what to call them.

    Returns:
        The widest shard's columns.
    """
    if not shard.is_split:
        if problem is None and shard.width != shard.vocab_size:
            problem = f"shard: holds {shard.width} of {shard.vocab_size} ids, but there is no process group of ranks with the others"
        if problem is not None:
            raise ValueError(problem)
        return shard.width
    own = torch.tensor([problem is not None, *shard[:3], *same.values()], device=device)
    wrong, starts, widths, sizes, *numbers = gather(own, shard).t().tolist()
    if any(wrong):
        ranks = ", ".join(str(rank) for rank, value in enumerate(wrong) if value)
        raise ValueError(
            problem or f"tensor-parallel rank {ranks} was given what does not fit; its own error says what"
        )
    ends = [start + width for start, width in zip(starts, widths, strict=True)]
    if starts[0] != 0 or starts[1:] != ends[:-1] or any(size != ends[-1] for size in sizes):
        raise ValueError(
            f"shard: the tensor-parallel ranks hold ids {list(zip(starts, ends, strict=True))} (start, end) of {sizes}; expected the"
            " whole vocabulary in rank order, without gaps. Is `group` the tensor-parallel group?"
        )
    for name, of_ranks in zip(same, numbers, strict=True):
        if len(set(of_ranks)) > 1:
            raise ValueError(
                f"{name}: the tensor-parallel ranks were given {of_ranks}; expected the same on all"
            )
    return max(widths)


def local_columns(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Which targets this shard holds, and their columns (0 for the others)."""
    column = targets - shard.start
    mine = (column >= 0) & (column < shard.width)
    return mine, column * mine


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype inside a tile: fp32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
