"""Map Megatron parameters to the Hugging Face tensors they consist of, in both directions, at any TP size.

Every HF tensor is sharded over tensor-parallel ranks by contiguous slices along one dimension, and a rank's
parameter is a local arrangement of its slices: slice ↔ concatenate, and `Fusion.merge` ↔ `Fusion.split`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Fusion(Protocol):
    """An arrangement of a mapping's HF tensors, or of a rank's slices of them, in one parameter."""

    def merge(self, pieces: Sequence[Tensor]) -> Tensor:
        """Arrange the pieces in one tensor."""
        ...

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return the pieces of a merged tensor, the inverse of `merge`."""
        ...


@dataclass(frozen=True)
class Stacked:
    """`count` tensors of one shape, concatenated along the first dimension."""

    count: int = 1

    def merge(self, pieces: Sequence[Tensor]) -> Tensor:
        """Concatenate the pieces."""
        return pieces[0] if self.count == 1 else torch.cat(list(pieces))

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return `count` pieces of equal size."""
        return list(tensor.chunk(self.count)) if self.count > 1 else [tensor]


@dataclass(frozen=True)
class QueryGroups:
    """Weights [n, H] or biases [n] of queries, keys and values, interleaved by query group."""

    queries_per_group: int
    head_dim: int

    def merge(self, pieces: Sequence[Tensor]) -> Tensor:
        """Interleave queries, keys and values, group by group."""
        groups, inner = pieces[1].shape[0] // self.head_dim, pieces[1].shape[1:]
        return torch.cat([piece.view(groups, -1, *inner) for piece in pieces], dim=1).reshape(-1, *inner)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return queries, keys and values."""
        widths = [self.queries_per_group * self.head_dim, self.head_dim, self.head_dim]
        inner = tensor.shape[1:]
        grouped = tensor.view(-1, sum(widths), *inner)
        return [piece.reshape(-1, *inner) for piece in grouped.split(widths, dim=1)]


@dataclass(frozen=True)
class TensorMapping:
    """A Megatron parameter of the model, of every layer, or of every expert of every layer.

    Attributes:
        megatron: Name of the parameter; a layer's parameter is named inside its layer.
        tensors: Name in HF folders → shape, with "{layer}" and "{expert}" in place of their numbers.
        dim: Dimension sharded over tensor-parallel (experts: expert-tensor-parallel) ranks, or None.
        fusion: Arrangement of the HF tensors in the parameter.
        padded: The first dimension is the vocabulary, which Megatron pads at the end.
        tied_to: HF tensor that is stored instead if the two are tied, or None.
    """

    megatron: str
    tensors: dict[str, tuple[int, ...]]
    dim: int | None = None
    fusion: Fusion = Stacked()
    padded: bool = False
    tied_to: str | None = None

    @property
    def in_layer(self) -> bool:
        """True for a parameter of every layer."""
        return "{layer}" in next(iter(self.tensors))

    @property
    def is_expert(self) -> bool:
        """True for a parameter of every expert."""
        return "{expert}" in next(iter(self.tensors))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the complete parameter without padding: merging adds up the first dimensions."""
        shapes = list(self.tensors.values())
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    @property
    def numel(self) -> int:
        """Number of elements of the complete parameter, without padding."""
        return math.prod(self.shape)

    def cut(self, tensors: Sequence[Any], index: int, count: int, shape: Sequence[int]) -> Tensor:
        """Cut shard `index` of `count`, of `shape`, from HF tensors or safetensors' lazy slices."""
        pieces = []
        for tensor in tensors:
            if self.dim is None:
                pieces.append(tensor[:])
                continue
            size = (tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)[self.dim]
            width = shape[0] if self.padded else size // count
            span = slice(min(index * width, size), min((index + 1) * width, size))
            pieces.append(tensor[span] if self.dim == 0 else tensor[:, span])
        merged = self.fusion.merge(pieces)
        if len(merged) < shape[0]:  # the vocabulary's padding
            merged = torch.cat([merged, merged.new_zeros(shape[0] - len(merged), *shape[1:])])
        return merged

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Assemble the HF tensors from all tensor-parallel shards, or from the complete parameter."""
        joined = []
        split = zip(*map(self.fusion.split, shards), strict=True)
        for (rows, *_), pieces in zip(self.tensors.values(), split, strict=True):
            whole = pieces[0]
            if len(pieces) > 1:
                assert self.dim is not None
                whole = torch.cat(pieces, dim=self.dim)
            joined.append(whole[:rows] if self.padded else whole)
        return joined


class ParamLocation(NamedTuple):
    """One parameter of the complete model: a mapping, its layer and its expert (0 if it has none)."""

    mapping: TensorMapping
    layer: int = 0
    expert: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stored HF tensors that the parameter consists of."""
        names = [self.mapping.tied_to] if self.mapping.tied_to else self.mapping.tensors
        return tuple(name.format(layer=self.layer, expert=self.expert) for name in names)
