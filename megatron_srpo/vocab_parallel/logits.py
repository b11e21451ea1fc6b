"""Where logits come from, tile by tile, and where the gradients of the tiles go.

A student is `Logits` or a `Projection`; a teacher may also be a `InterpolatedLogits` of two such. Inside a tile numbers
are fp32 (float64 for float64 inputs) whatever the inputs' dtype: the products of bf16 matrices are never
rounded to bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.shard import VocabShard, accumulation_dtype

Rows = slice | Tensor  # a range of tokens, or their indices

_COLUMN_BLOCK = (
    8192  # columns of a bf16 matrix upcast at a time where the hardware's products cannot do it (CPU)
)
# rows of a product made and added at a time where `addmm` cannot do it: few enough for a GPU's cache
_ROW_BLOCK = 2048


class Logits(NamedTuple):
    """Logits that exist. logits: [T, padded_width] this rank's columns, padded ones last."""

    logits: Tensor

    @property
    def tensor(self) -> Tensor:
        """The tensor whose length, dtype and device stand for this source's."""
        return self.logits

    def problem(self, name: str, shard: VocabShard) -> str | None:
        """What does not fit, naming the argument, what it is and what was expected."""
        name, shape = name or "logits", list(self.logits.shape)
        if len(shape) != 2 or not self.logits.is_floating_point():
            return (
                f"{name} {shape} ({self.logits.dtype}): expected [tokens, vocabulary columns], floating-point"
            )
        return _shard_problem(shard, shape[1], f"{name} of {shape[1]} columns")

    def write(self, rows: Rows, tile: Tensor, scale: float, add: bool = False) -> None:
        """tile [n, width] = scale · logits[rows], or += with `add`."""
        logits = self.logits[rows, : tile.shape[1]]
        if add:
            tile.add_(logits, alpha=scale)
        else:
            tile.copy_(logits)
            if scale != 1.0:
                tile.mul_(scale)

    def gradients(self, needed: tuple[bool, ...], weight_grad: None = None) -> LogitsGradient:
        """Collects this source's gradients; `needed`: of its tensors, in order."""
        return LogitsGradient(self)


class Projection(NamedTuple):
    """Logits z = hidden · weightᵀ, made when a tile needs them.

    hidden: [T, H] final hidden states. weight: [padded_width, H] this rank's rows of the output matrix,
    padded ones last.
    """

    hidden: Tensor
    weight: Tensor

    @property
    def tensor(self) -> Tensor:
        """The tensor whose length, dtype and device stand for this source's."""
        return self.hidden

    def problem(self, name: str, shard: VocabShard) -> str | None:
        """What does not fit, naming the argument, what it is and what was expected."""
        hidden, weight = self
        prefix = f"{name}." if name else ""
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            shapes = f"{prefix}hidden {list(hidden.shape)} and {prefix}weight {list(weight.shape)}"
            return f"{shapes}: expected [tokens, H] and [vocabulary rows, H]"
        if hidden.dtype != weight.dtype or hidden.device != weight.device or not hidden.is_floating_point():
            kinds = f"{prefix}hidden ({hidden.dtype}, {hidden.device}) and {prefix}weight ({weight.dtype}, {weight.device})"
            return f"{kinds}: expected one floating-point dtype and one device"
        return _shard_problem(shard, len(weight), f"{prefix}weight of {len(weight)} rows")

    def write(self, rows: Rows, tile: Tensor, scale: float, add: bool = False) -> None:
        """tile [n, width] = scale · hidden[rows] · weightᵀ, or += with `add`."""
        hidden, weight, beta = self.hidden[rows], self.weight[: tile.shape[1]], 1.0 if add else 0.0
        if weight.dtype == tile.dtype:
            torch.addmm(tile, hidden, weight.t(), beta=beta, alpha=scale, out=tile)
        elif weight.is_cuda and not add:
            torch.mm(hidden, weight.t(), out_dtype=tile.dtype, out=tile)
            if scale != 1.0:
                tile.mul_(scale)
        elif weight.is_cuda:
            _add_product(tile.t(), weight, hidden.t(), scale)
        else:
            hidden = hidden.to(tile.dtype)
            for columns in _column_blocks(tile.shape[1]):
                block = tile[:, columns]
                torch.addmm(
                    block, hidden, weight[columns].to(tile.dtype).t(), beta=beta, alpha=scale, out=block
                )

    def gradients(self, needed: tuple[bool, ...], weight_grad: Tensor | None = None) -> ProjectionGradient:
        """Collects this source's gradients; `needed`: of its tensors, in order.

        `weight_grad`: see `fused_objective`.
        """
        return ProjectionGradient(self, needed, weight_grad)


class InterpolatedLogits(NamedTuple):
    """The trust-region teacher: z = (1 - share) · z_reference + share · z_policy, softmax of interpolated
    logits.
    """

    reference: Logits | Projection
    policy: Logits | Projection
    share: float

    @property
    def tensor(self) -> Tensor:
        """The tensor whose length, dtype and device stand for this source's."""
        return self.reference.tensor

    def problem(self, name: str, shard: VocabShard) -> str | None:
        """What does not fit, naming the argument, what it is and what was expected."""
        if not 0 <= self.share <= 1:
            return f"{name}.share {self.share}: expected 0 … 1"
        if problem := self.reference.problem(f"{name}.reference", shard) or self.policy.problem(
            f"{name}.policy", shard
        ):
            return problem
        one, other = (source.tensor for source in self[:2])
        if len(one) != len(other) or one.dtype != other.dtype or one.device != other.device:
            given = [f"{len(tensor)} tokens ({tensor.dtype}, {tensor.device})" for tensor in (one, other)]
            return f"{name}.reference and {name}.policy: {given[0]} and {given[1]}; expected the same"
        return None

    def write(self, rows: Rows, tile: Tensor, scale: float, add: bool = False) -> None:
        """tile [n, width] = scale · interpolated logits; two products for projections."""
        for source, share in ((self.reference, 1 - self.share), (self.policy, self.share)):
            if share:  # 0 · -inf would be NaN
                source.write(rows, tile, scale * share, add)
                add = True


Student = Logits | Projection
Teacher = Logits | Projection | InterpolatedLogits


class LogitsGradient:
    """dLogits [T, padded_width] in the logits' dtype; padded columns get zeros."""

    def __init__(self, source: Logits):
        self.gradient = torch.zeros_like(source.logits)

    def products(self, rows: Rows, gradient: Tensor) -> list[Callable[[], None]]:
        """What is to be done with a tile's dLogits [n, width]."""
        return [lambda: self._store(rows, gradient)]

    def _store(self, rows: Rows, gradient: Tensor) -> None:
        self.gradient[rows, : gradient.shape[1]] = gradient.to(self.gradient.dtype)

    def results(self) -> tuple[Tensor]:
        """The gradients of the source's tensors, in order."""
        return (self.gradient,)


class ProjectionGradient:
    """dHidden [T, H] in the states' dtype, and dWeight [padded_width, H] accumulated in fp32."""

    def __init__(self, source: Projection, needed: tuple[bool, ...], weight_grad: Tensor | None):
        self.source = source
        self.hidden_grad = torch.zeros_like(source.hidden) if needed[0] else None
        self.own_weight_grad = needed[1] and weight_grad is None
        if self.own_weight_grad:
            weight_grad = torch.zeros(
                source.weight.shape,
                dtype=accumulation_dtype(source.weight.dtype),
                device=source.weight.device,
            )
        self.weight_grad = weight_grad

    def products(self, rows: Rows, gradient: Tensor) -> list[Callable[[], None]]:
        """dHidden[rows] = gradient · weight and dWeight += gradientᵀ · hidden[rows], as two calls to be
        made.
        """
        products = []
        if self.hidden_grad is not None:
            products.append(lambda: self._to_hidden(rows, gradient))
        if self.weight_grad is not None:
            products.append(lambda: self._to_weight(rows, gradient))
        return products

    def _to_hidden(self, rows: Rows, gradient: Tensor) -> None:
        weight = self.source.weight[: gradient.shape[1]]
        if weight.dtype != gradient.dtype:
            result = gradient.new_zeros(len(gradient), weight.shape[1])
            for columns in _column_blocks(gradient.shape[1]):
                result.addmm_(gradient[:, columns], weight[columns].to(gradient.dtype))
            self.hidden_grad[rows] = result.to(weight.dtype)
        elif isinstance(rows, slice):
            torch.mm(gradient, weight, out=self.hidden_grad[rows])
        else:
            self.hidden_grad[rows] = torch.mm(gradient, weight)

    def _to_weight(self, rows: Rows, gradient: Tensor) -> None:
        hidden, accumulator = self.source.hidden[rows], self.weight_grad[: gradient.shape[1]]
        if gradient.dtype == accumulator.dtype:
            accumulator.addmm_(gradient.t(), hidden.to(gradient.dtype))
        else:
            _add_product(accumulator, gradient.t(), hidden)

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the source's tensors, in order; None where the caller's `weight_grad` has it
        already.
        """
        return self.hidden_grad, self.weight_grad.to(
            self.source.weight.dtype
        ) if self.own_weight_grad else None


def _add_product(into: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """into += scale · left · right on CUDA: an fp32 product of bf16 matrices, never rounded to bf16."""
    if _addmm_takes_fp32(into.device):
        torch.addmm(into, left, right, out_dtype=into.dtype, alpha=scale, out=into)
        return
    for start in range(0, len(left), _ROW_BLOCK):
        rows = slice(start, start + _ROW_BLOCK)
        into[rows].add_(torch.mm(left[rows], right, out_dtype=into.dtype), alpha=scale)


@functools.cache
def _addmm_takes_fp32(device: torch.device) -> bool:
    """Whether it adds to an fp32 matrix the product of bf16 ones: not before torch 2.10 (pytorch#167931), as
    NVIDIA's images have it.
    """
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(one.float(), one, one, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def _column_blocks(width: int):
    return (slice(start, min(start + _COLUMN_BLOCK, width)) for start in range(0, width, _COLUMN_BLOCK))


def _shard_problem(shard: VocabShard, padded_width: int, what: str) -> str | None:
    if 0 <= shard.width <= padded_width and 0 <= shard.start <= shard.vocab_size - shard.width:
        return None
    return f"shard (start {shard.start}, width {shard.width}, vocabulary {shard.vocab_size}): does not fit {what}, or its own vocabulary"
