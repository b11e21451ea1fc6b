"""Shards of the vocabulary, and collectives among the tensor-parallel ranks that hold them."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor


class VocabShard(NamedTuple):
    """This rank's ids, start … start + width - 1, without padding; the ranks of `group` together hold all."""

    start: int
    width: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_rank(cls, rank: int, padded_width: int, vocab_size: int, group: dist.ProcessGroup | None) -> Self:
        """Return the shard of tensor-parallel rank `rank` when each rank holds `padded_width` output rows."""
        start = min(rank * padded_width, vocab_size)
        return cls(start, min(padded_width, vocab_size - start), vocab_size, group)

    @property
    def is_split(self) -> bool:
        """True if several ranks share the vocabulary."""
        return self.group is not None and dist.get_world_size(self.group) > 1


def all_reduce(values: Tensor, group: dist.ProcessGroup | None, op=dist.ReduceOp.SUM) -> Tensor:
    """All-reduce in place and return `values`; a no-op for one rank."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
    return values


def gather(values: Tensor, shard: VocabShard, while_waiting: Callable[[], None] = lambda: None) -> Tensor:
    """All-gather `values` (same shape on all ranks) to [ranks, *shape]; call `while_waiting` meanwhile.

    A sum over the result is bitwise the same on all ranks, which not every all-reduce guarantees.
    """
    if not shard.is_split:
        while_waiting()
        return values[None]
    gathered = values.new_empty(dist.get_world_size(shard.group) * values.numel())
    work = _all_gather(gathered, values.contiguous().view(-1), group=shard.group, async_op=True)
    while_waiting()
    assert work is not None
    work.wait()
    return gathered.view(-1, *values.shape)


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


def check_consistent(
    error: ValueError | None, shard: VocabShard, settings: dict[str, int], device: torch.device
) -> int:
    """Raise ValueError on every rank if one has an `error`, or if shards or settings are inconsistent.

    One small all-gather, made before any other collective could wait for a rank that has raised.

    Returns:
        The number of columns of the widest shard.
    """
    if not shard.is_split:
        if error is not None:
            raise error
        if shard.width != shard.vocab_size:
            found = f"shard: holds {shard.width} of {shard.vocab_size} ids, but has no process group"
            raise ValueError(f"{found}; expected the group of the tensor-parallel ranks that hold the others")
        return shard.width
    local = torch.tensor([error is not None, *shard[:3], *settings.values()], device=device)
    has_error, starts, widths, vocab_sizes, *values = gather(local, shard).t().tolist()
    if error is not None:
        raise error
    if any(has_error):
        ranks = ", ".join(str(rank) for rank, value in enumerate(has_error) if value)
        raise ValueError(f"tensor-parallel rank {ranks} has invalid inputs; see the error on that rank")
    _check_shards(starts, widths, vocab_sizes)
    for name, of_ranks in zip(settings, values, strict=True):
        if len(set(of_ranks)) > 1:
            raise ValueError(f"{name}: the tensor-parallel ranks have {of_ranks}; expected one value")
    return max(widths)


def _check_shards(starts: list[int], widths: list[int], vocab_sizes: list[int]) -> None:
    ends = [start + width for start, width in zip(starts, widths, strict=True)]
    if starts[0] != 0 or starts[1:] != ends[:-1] or any(size != ends[-1] for size in vocab_sizes):
        held = f"ids {list(zip(starts, ends, strict=True))} (start, end) of {vocab_sizes}"
        expected = "expected the entire vocabulary in rank order. Is `group` the tensor-parallel group?"
        raise ValueError(f"shard: the tensor-parallel ranks hold {held}; {expected}")


def local_columns(ids: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return a mask of the ids in this shard, and their columns (0 for the others)."""
    columns = ids - shard.start
    is_local = (columns >= 0) & (columns < shard.width)
    return is_local, columns * is_local


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype inside a tile: fp32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
