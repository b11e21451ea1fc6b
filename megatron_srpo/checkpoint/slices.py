"""Map a rank's parameter shards to slices of a checkpoint's tensors, which have Megatron's names and shapes.

A distributed optimizer holds a range of a shard's flat elements: a few rectangles of the global tensor. A
rank writes the rectangles that it holds; with any layout, a rank reads the rectangles that it needs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.checkpoint.folder import DamagedCheckpoint
from megatron_srpo.model.mapping import Stacked
from megatron_srpo.weights.sources import CheckpointSlice
from megatron_srpo.weights.torch_dist import Folder
from megatron_srpo.weights.transfer import ParameterShard

# Kinds of values that a checkpoint stores per parameter → prefix of the keys (Megatron's for the optimizer).
PREFIXES = {
    "policy": "",  # fp32 master weights
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
    "teacher": "teacher.",
}


class TensorSlice(NamedTuple):
    """A rectangle of the checkpoint's tensor `key`, the arguments of `torch_dist.Writer.write`."""

    key: str
    tensor: Tensor
    tensor_shape: tuple[int, ...]
    start: tuple[int, ...]


class Rectangle(NamedTuple):
    """Flat elements first … last - 1 of a shard: the region of `shape` at `start` in the stored tensor."""

    first: int
    last: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardLocation:
    """A rank's shard of a parameter, and the parameter's location in the checkpoint."""

    place: CheckpointSlice
    shard: ParameterShard
    shape: tuple[int, ...]  # of the shard, [n] or [rows, columns], with this layout's padding

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor, with stacked dimensions."""
        whole = list(self.shape)
        if (dim := self.place.mapping.dim) is not None:
            whole[dim] *= self.shard.count
        return *self.place.stacks, *whole

    def rectangles(self, start: int, end: int) -> Iterator[Rectangle]:
        """Cut flat elements start … end - 1 of the shard into rectangles of the checkpoint's tensor."""
        rows, width = self.shape[0], math.prod(self.shape[1:])
        mapping, index, count = self.place.mapping, self.shard.index, self.shard.count
        # Stacked matrices, such as gate and up, are sharded one by one.
        block = rows // mapping.fusion.count if isinstance(mapping.fusion, Stacked) else rows
        while start < end:
            row, column = divmod(start, width)
            if column == 0 and end - start >= width:
                taken = min((end - start) // width, block - row % block)
                size = (taken, *self.shape[1:])
            else:
                size = (1, min(width - column, end - start))
            if mapping.dim == 0:
                row = row // block * block * count + index * block + row % block
            if mapping.dim == 1:
                column += index * width
            place = (row, column)[: len(size)]
            last = start + math.prod(size)
            ones = (1,) * len(self.place.stacks)
            yield Rectangle(start, last, (*self.place.index, *place), (*ones, *size))
            start = last

    def cut(self, prefix: str, values: Tensor, start: int) -> Iterator[TensorSlice]:
        """Yield CPU copies of flat `values`, the shard's elements from `start` on, as slices."""
        for part in self.rectangles(start, start + values.numel()):
            copy = values[part.first - start : part.last - start].detach().to("cpu", copy=True)
            yield TensorSlice(prefix + self.place.key, copy.view(part.shape), self.tensor_shape, part.start)

    def read(self, folder: Folder, prefix: str, start: int, end: int) -> Tensor:
        """Read flat elements start … end - 1 of the shard. Raises FileError or DamagedCheckpoint."""
        key = prefix + self.place.key
        if key not in folder.chunks:
            raise DamagedCheckpoint(f"{folder.path}: {key} is not in the checkpoint")
        saved, axis = folder.shape(key), len(self.place.stacks)
        wanted = self.tensor_shape
        if self.place.mapping.padded:
            wanted = (saved[0], *wanted[1:])
        if saved != wanted:
            raise DamagedCheckpoint(f"{folder.path}: {key} has shape {list(saved)}, expected {list(wanted)}")
        values = torch.zeros(end - start, dtype=folder.dtype(key))
        for part in self.rectangles(start, end):
            rows = min(part.shape[axis], saved[axis] - part.start[axis])  # fewer if saved with less padding
            if rows > 0:
                shape = (*part.shape[:axis], rows, *part.shape[axis + 1 :])
                found = folder.read_region(key, part.start, shape).reshape(-1)
                values[part.first - start :][: found.numel()] = found
        return values
