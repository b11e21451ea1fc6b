"""The results of a kernel for one tile of tokens, and the elementwise operations each device provides."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FLOOR = -1e30  # replaces logits of -inf: gives a probability of exactly 0, without NaN
TINY = 1e-37  # keeps logarithms of 0 and of 0/0 finite where they are multiplied by 0


WriteLogits = Callable[[int, slice], None]  # write these columns of the tile with this index
ColumnBlock = tuple[slice, Tensor]  # columns of a tile and their values, [n, columns]


def times(probability: Tensor, log: Tensor) -> Tensor:
    """Multiply with 0 · inf = 0, so that an id of probability 0 adds nothing."""
    return torch.where(probability == 0, torch.zeros_like(log), probability * log)


class Statistics(NamedTuple):
    """Per-token results in fp32 (float64 for float64 inputs); zeros for ignored tokens."""

    logprob: Tensor  # [T], log-probs of the target ids
    entropy: Tensor  # [T], the student's, in nats
    divergence: Tensor | None  # [D], of the first D tokens; None on a tile without a teacher


class StatisticsGrad(NamedTuple):
    """Gradients of a scalar with respect to a tile's statistics, [n] each; None for zeros."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    divergence: Tensor | None = None


class GradTerms(NamedTuple):
    """The logit gradient p_scale · p + pf_scale · p·f + plogp_scale · p·log p + target_grad at the targets.

    Contiguous [n] each; None where the term is absent.
    """

    target_columns: Tensor  # -1 in rows without a local target
    target_grad: Tensor
    p_scale: Tensor
    pf_scale: Tensor | None = None
    plogp_scale: Tensor | None = None


class TileOps(Protocol):
    """Elementwise operations on `tiles` ([student] or [student, teacher], [n, width] each), often in place.

    maximum, total: [tiles, n], over all ranks' columns, with p = exp(z - maximum) / total. In fp32 this is
    three times as exact as exp(z - maximum - log total), which rounds numbers larger than the result.
    """

    gradient_is_separate: bool  # the gradient remains valid while the next tile's logits are written

    def row_sums(self, tiles: list[Tensor], write: WriteLogits, sums: Tensor) -> None:
        """Let `write` fill the tiles.

        Fill sums [3, tiles, n] with m = max z, Σ exp(z - m) and the student's Σ exp(z - m)(z - m).
        """

    def divergence_sums(self, tiles: list[Tensor], maximum: Tensor, total: Tensor) -> Tensor:
        """Return [2, n]: Σ p·f without Formula.pf_weight, and the teacher's sum (see Formula.value)."""
        ...

    def gradient(self, terms: GradTerms, maximum: Tensor, total: Tensor) -> Iterable[ColumnBlock]:
        """Return the gradient of the student's logits as blocks of columns in order."""
        ...


class RowSums(NamedTuple):
    """m = max z, Σ exp(z - m) and Σ exp(z - m)(z - m) over some columns."""

    maximum: Tensor
    total: Tensor
    weighted: Tensor


def combine(maxima: Tensor, totals: Tensor, weighted: Tensor) -> RowSums:
    """Combine row sums over several parts of the columns, [parts, …] each, into row sums over all columns."""
    maximum = maxima.amax(0)
    shift = maxima - maximum
    factor = shift.exp()
    return RowSums(maximum, (factor * totals).sum(0), (factor * (weighted + shift * totals)).sum(0))


def add_at(block: Tensor, columns: slice, positions: Tensor, values: Tensor) -> None:
    """Add values [n, k] at columns `positions` [n, k] of a tile, where they lie in its block `columns`."""
    if not block.shape[1]:
        return
    is_inside = (positions >= columns.start) & (positions < columns.stop)
    index = torch.where(is_inside, positions - columns.start, 0)
    block.scatter_add_(1, index, torch.where(is_inside, values, 0.0).to(block.dtype))
