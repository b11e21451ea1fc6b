"""What a kernel computes for one tile of tokens, and the elementwise operations it needs of a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

FLOOR = -1e30  # replaces logits of -inf: a probability of exactly 0, without NaN
TINY = 1e-37  # for logarithms of 0 and of 0/0, where the factor before them is 0


class Statistics(NamedTuple):
    """Per-token results in fp32 (float64 for float64 inputs); zeros for ignored tokens.

    logprob: [T] of the target ids. entropy: [T] of the student, nats. divergence: [D], of the first D tokens;
    None on a tile without a teacher.
    """

    logprob: Tensor
    entropy: Tensor
    divergence: Tensor | None


class StatisticsGrad(NamedTuple):
    """Gradients of a scalar with respect to a tile's statistics, [n] each; None for zeros."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    divergence: Tensor | None = None


class GradTerms(NamedTuple):
    """The logit gradient p_scale · p + pf_scale · p·f + plogp_scale · p·log p + target_grad at the targets.

    Contiguous [n] each; None where the term is absent. target_columns: -1 in rows without a local target.
    """

    target_columns: Tensor
    target_grad: Tensor
    p_scale: Tensor
    pf_scale: Tensor | None = None
    plogp_scale: Tensor | None = None


class Kernel(Protocol):
    """Statistics of one tile at a time, and the gradient of its logits.

    gradient_is_separate: the gradient stays valid while the next tile's logits are written.
    """

    gradient_is_separate: bool

    def statistics(
        self, tiles: list[Tensor], targets: Tensor | None, while_waiting: Callable[[], None]
    ) -> Statistics:
        """Compute the statistics of one tile.

        Args:
            tiles: [n, width] logits of the student and, to distil, the teacher; overwritten.
            targets: [n] token ids; without them the log-probs are zeros.
            while_waiting: Called once during each collective.
        """
        ...

    def logits_grad(self, grads: StatisticsGrad) -> Tensor:
        """Return the [n, width] gradient with respect to the last tile's student logits.

        It is valid until the next gradient, and until the next statistics unless `gradient_is_separate`.
        """
        ...


class TileOps(Protocol):
    """Elementwise work on `tiles` ([student] or [student, teacher], [n, width] each), which it may overwrite.

    maximum, total: [tiles, n]; p = exp(z - maximum) / total over all ranks' columns. In fp32 that is three
    times as exact as the exponential of z - maximum - log total, whose roundings are of numbers larger than
    the differences of interest.
    """

    gradient_is_separate: bool

    def row_sums(self, tiles: list[Tensor], sums: Tensor) -> None:
        """Fill sums [3, tiles, n] with m = max z, Σ exp(z - m) and the student's Σ exp(z - m)(z - m)."""

    def divergence_sums(self, tiles: list[Tensor], maximum: Tensor, total: Tensor) -> Tensor:
        """Return [2, n]: Σ p·f (without JSD's 1-α), and the teacher's Σ q (log q - log m or log p).

        The second is computed for JSD and forward KL only.
        """
        ...

    def gradient(self, terms: GradTerms, maximum: Tensor, total: Tensor) -> Tensor:
        """Return the [n, width] gradient of the student's logits."""
        ...
