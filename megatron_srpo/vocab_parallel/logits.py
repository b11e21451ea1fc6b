"""Sources of logits, tile by tile, and accumulators for the gradients of the tiles.

Tiles are fp32 (float64 for float64 inputs): products of bf16 matrices are never rounded to bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.kernels.base import ColumnBlock
from megatron_srpo.vocab_parallel.shard import VocabShard, accumulation_dtype

Rows = slice | Tensor  # a range of tokens, or their indices

_UPCAST_COLUMNS = 8192  # columns of a bf16 matrix upcast at a time on a CPU
_ROW_BLOCK = 2048  # rows of a product added at a time where `addmm` cannot add; they fit into a GPU's cache


class Logits(NamedTuple):
    """Logits in memory: this rank's columns, [T, padded_width], padding last."""

    logits: Tensor

    @property
    def tensor(self) -> Tensor:
        """The tensor that defines the number of tokens, the dtype and the device."""
        return self.logits

    def validate(self, name: str, shard: VocabShard) -> None:
        """Raise ValueError if shape, dtype or shard do not match; `name` is the argument's."""
        name, shape = name or "logits", list(self.logits.shape)
        if len(shape) != 2 or not self.logits.is_floating_point():
            found = f"{name} {shape} ({self.logits.dtype})"
            raise ValueError(f"{found}: expected [tokens, vocabulary columns], floating-point")
        _check_shard(shard, shape[1], f"{name} of {shape[1]} columns")

    def write(self, rows: Rows, columns: slice, block: Tensor, scale: float, add: bool = False) -> None:
        """Write scale · logits[rows, columns] to `block` [n, columns], or add it."""
        logits = self.logits[rows, columns]
        if add:
            block.add_(logits, alpha=scale)
            return
        block.copy_(logits)
        if scale != 1.0:
            block.mul_(scale)

    def gradients(self, needed: tuple[bool, ...], weight_grad: Tensor | None = None) -> LogitsGradient:
        """Create the accumulator of dLogits; the arguments are not used."""
        return LogitsGradient(self)


class Projection(NamedTuple):
    """Logits as hidden [T, H] · weightᵀ; weight [padded_width, H] has this rank's rows, padding last."""

    hidden: Tensor
    weight: Tensor

    @property
    def tensor(self) -> Tensor:
        """The tensor that defines the number of tokens, the dtype and the device."""
        return self.hidden

    def validate(self, name: str, shard: VocabShard) -> None:
        """Raise ValueError if shapes, dtypes, devices or shard do not match; `name` is the argument's."""
        hidden, weight = self
        prefix = f"{name}." if name else ""
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            found = f"{prefix}hidden {list(hidden.shape)} and {prefix}weight {list(weight.shape)}"
            raise ValueError(f"{found}: expected [tokens, H] and [vocabulary rows, H]")
        if hidden.dtype != weight.dtype or hidden.device != weight.device or not hidden.is_floating_point():
            kinds = [f"({x.dtype}, {x.device})" for x in self]
            found = f"{prefix}hidden {kinds[0]} and {prefix}weight {kinds[1]}"
            raise ValueError(f"{found}: expected one floating-point dtype and one device")
        _check_shard(shard, len(weight), f"{prefix}weight of {len(weight)} rows")

    def write(self, rows: Rows, columns: slice, block: Tensor, scale: float, add: bool = False) -> None:
        """Write scale · hidden[rows] · weight[columns]ᵀ to `block` [n, columns], or add it."""
        hidden, weight, beta = self.hidden[rows], self.weight[columns], 1.0 if add else 0.0
        if weight.dtype == block.dtype:
            torch.addmm(block, hidden, weight.t(), beta=beta, alpha=scale, out=block)
        elif weight.is_cuda and not add:
            torch.mm(hidden, weight.t(), out_dtype=block.dtype, out=block)
            if scale != 1.0:
                block.mul_(scale)
        elif weight.is_cuda:
            _add_product(block.t(), weight, hidden.t(), scale)
        else:
            hidden = hidden.to(block.dtype)
            for part in _parts(block.shape[1]):
                upcast = weight[part].to(block.dtype)
                torch.addmm(block[:, part], hidden, upcast.t(), beta=beta, alpha=scale, out=block[:, part])

    def gradients(self, needed: tuple[bool, ...], weight_grad: Tensor | None = None) -> ProjectionGradient:
        """Create the accumulator of dHidden and dWeight.

        `needed` is (for dHidden, for dWeight); for `weight_grad` see `fused_objective`.
        """
        return ProjectionGradient(self, needed, weight_grad)


Student = Logits | Projection


class InterpolatedLogits(NamedTuple):
    """Logits of the trust-region teacher: (1 - interpolation) · z_reference + interpolation · z_policy."""

    reference: Student
    policy: Student
    interpolation: float

    @property
    def tensor(self) -> Tensor:
        """The tensor that defines the number of tokens, the dtype and the device."""
        return self.reference.tensor

    def validate(self, name: str, shard: VocabShard) -> None:
        """Raise ValueError if a source is invalid or the two do not match; `name` is the argument's."""
        if not 0 <= self.interpolation <= 1:
            raise ValueError(f"{name}.interpolation {self.interpolation}: expected 0 … 1")
        self.reference.validate(f"{name}.reference", shard)
        self.policy.validate(f"{name}.policy", shard)
        one, other = self.reference.tensor, self.policy.tensor
        if len(one) != len(other) or one.dtype != other.dtype or one.device != other.device:
            found = [f"{len(x)} tokens ({x.dtype}, {x.device})" for x in (one, other)]
            raise ValueError(f"{name}.reference and {name}.policy: {' and '.join(found)}; expected the same")

    def write(self, rows: Rows, columns: slice, block: Tensor, scale: float, add: bool = False) -> None:
        """Write scale times the interpolated logits to `block` [n, columns], or add them."""
        for source, share in ((self.reference, 1 - self.interpolation), (self.policy, self.interpolation)):
            if share:  # 0 · -inf would be NaN
                source.write(rows, columns, block, scale * share, add)
                add = True


Teacher = Student | InterpolatedLogits


class LogitsGradient:
    """The accumulator of dLogits [T, padded_width] in the logits' dtype; padded columns get zeros."""

    def __init__(self, source: Logits):
        self.gradient = torch.zeros_like(source.logits)

    def products(self, rows: Rows, blocks: Iterable[ColumnBlock]) -> Iterator[Callable[[], None]]:
        """Yield the calls that store a tile's dLogits."""
        for block in blocks:
            yield functools.partial(self._store, rows, *block)

    def _store(self, rows: Rows, columns: slice, gradient: Tensor) -> None:
        self.gradient[rows, columns] = gradient.to(self.gradient.dtype)

    def results(self) -> tuple[Tensor]:
        """Return the gradients of the source's tensors, in order."""
        return (self.gradient,)


class ProjectionGradient:
    """The accumulator of dHidden [T, H] in its dtype and dWeight [padded_width, H] in fp32 or float64."""

    def __init__(self, source: Projection, needed: tuple[bool, ...], weight_grad: Tensor | None):
        self.source = source
        self.hidden_grad = torch.zeros_like(source.hidden) if needed[0] else None
        self.returns_weight_grad = needed[1] and weight_grad is None
        if self.returns_weight_grad:
            weight = source.weight
            weight_grad = weight.new_zeros(weight.shape, dtype=accumulation_dtype(weight.dtype))
        self.weight_grad = weight_grad

    def products(self, rows: Rows, blocks: Iterable[ColumnBlock]) -> Iterator[Callable[[], None]]:
        """Yield the calls for dHidden[rows] = gradient · weight and dWeight += gradientᵀ · hidden[rows].

        Each block is requested after the calls of the previous one, whose memory may be reused for it.
        """
        hidden, weight, hidden_sum = self.source.hidden[rows], self.source.weight, None
        for columns, gradient in blocks:
            if self.hidden_grad is not None:
                if hidden_sum is None:
                    hidden_sum = gradient.new_zeros(hidden.shape)
                yield functools.partial(_add_to_hidden, hidden_sum, gradient, weight[columns])
            if self.weight_grad is not None:
                yield functools.partial(_add_to_weight, self.weight_grad[columns], gradient, hidden)
        if self.hidden_grad is not None and hidden_sum is not None:
            self.hidden_grad[rows] = hidden_sum.to(self.hidden_grad.dtype)

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """Return dHidden and dWeight; None if not needed, or if dWeight was added to the caller's tensor."""
        if self.returns_weight_grad and self.weight_grad is not None:
            return self.hidden_grad, self.weight_grad.to(self.source.weight.dtype)
        return self.hidden_grad, None


def _add_to_hidden(hidden_sum: Tensor, gradient: Tensor, weight: Tensor) -> None:
    if weight.dtype == gradient.dtype:
        hidden_sum.addmm_(gradient, weight)
        return
    for part in _parts(gradient.shape[1]):
        hidden_sum.addmm_(gradient[:, part], weight[part].to(gradient.dtype))


def _add_to_weight(weight_grad: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    if gradient.dtype == weight_grad.dtype:
        weight_grad.addmm_(gradient.t(), hidden.to(gradient.dtype))
    else:
        _add_product(weight_grad, gradient.t(), hidden)


def _add_product(into: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add scale · left · right on CUDA, as an fp32 product of bf16 matrices, never rounded to bf16."""
    if _addmm_takes_fp32(into.device):
        torch.addmm(into, left, right, out_dtype=into.dtype, alpha=scale, out=into)
        return
    for start in range(0, len(left), _ROW_BLOCK):
        rows = slice(start, start + _ROW_BLOCK)
        into[rows].add_(torch.mm(left[rows], right, out_dtype=into.dtype), alpha=scale)


@functools.cache
def _addmm_takes_fp32(device: torch.device) -> bool:
    """Return True if addmm can add bf16 products to fp32: from torch 2.10 on (pytorch#167931)."""
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(one.float(), one, one, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def _parts(width: int) -> Iterator[slice]:
    for start in range(0, width, _UPCAST_COLUMNS):
        yield slice(start, min(start + _UPCAST_COLUMNS, width))


def _check_shard(shard: VocabShard, padded_width: int, source: str) -> None:
    if not (0 <= shard.width <= padded_width and 0 <= shard.start <= shard.vocab_size - shard.width):
        found = f"shard (start {shard.start}, width {shard.width}, vocabulary {shard.vocab_size})"
        raise ValueError(f"{found}: does not fit {source}, or its own vocabulary")
