"""Results of one training step's optimizer updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.data.histogram import BINS


class TokenSums(NamedTuple):
    """Sums over the policy tokens that were computed, the last six over distilled tokens; float64, in nats.

    Attributes:
        loss: Terms of the objective, each divided by the optimizer batch's denominator.
        tokens: Number of policy tokens, trained or scored.
        trained: Number of those whose sample has a gradient.
        gap: |log π_old - log π_roll|.
        clipped: Number of tokens whose importance weight was above its cap.
        importance: Capped importance weights.
        weight: Entropy weights.
        entropy_counts: Teacher entropies by bin (`data.histogram`), [BINS].
    """

    loss: Tensor
    tokens: Tensor
    trained: Tensor
    entropy: Tensor
    gap: Tensor
    clipped: Tensor
    importance: Tensor
    distilled: Tensor
    divergence: Tensor
    teacher_entropy: Tensor
    weight: Tensor
    weight_squared: Tensor
    entropy_counts: Tensor

    @property
    def vector(self) -> Tensor:
        """All sums as one float64 vector, the inverse of `from_vector`; vectors can be added."""
        return torch.cat([torch.stack(self[:-1]), self.entropy_counts])

    @classmethod
    def zeros(cls, device: torch.device | None = None) -> Tensor:
        """Return the vector for no tokens."""
        return torch.zeros(len(cls._fields) - 1 + BINS, dtype=torch.float64, device=device)

    @classmethod
    def from_vector(cls, vector: Tensor) -> TokenSums:
        """Split a vector, see `vector`."""
        scalars = vector[:-BINS].unbind()
        return cls(*scalars, entropy_counts=vector[-BINS:])


class OptimizerUpdate(NamedTuple):
    """One optimizer update, the same on every rank.

    Attributes:
        grad_norm: Global gradient norm before clipping.
        applied: False if the update was skipped because loss or gradient norm was not finite.
        sums: Token sums over all ranks, on the CPU.
        gap_max: Largest |log π_old - log π_roll| of any token, in nats.
    """

    loss: float
    grad_norm: float
    applied: bool
    sums: TokenSums
    gap_max: float


class UpdateReport(NamedTuple):
    """One training step's updates.

    Attributes:
        lr: Learning rate of the updates.
        teacher_distances: ‖θ - θ'‖ / ‖θ‖ before and after the teacher's update; None without a teacher, or if
            the teacher is the live policy.
    """

    updates: Sequence[OptimizerUpdate]
    lr: float
    teacher_distances: tuple[float, float] | None

    @property
    def losses(self) -> list[float]:
        """The loss of each update."""
        return [update.loss for update in self.updates]

    @property
    def grad_norms(self) -> list[float]:
        """The global gradient norm of each update, before clipping."""
        return [update.grad_norm for update in self.updates]

    @property
    def applied(self) -> list[bool]:
        """False for each update that was skipped."""
        return [update.applied for update in self.updates]

    @property
    def sums(self) -> TokenSums:
        """Token sums over all updates."""
        total = TokenSums.zeros()
        for update in self.updates:
            total += update.sums.vector
        return TokenSums.from_vector(total)

    @property
    def gap_max(self) -> float:
        """Largest |log π_old - log π_roll| of any token, in nats; 0 without updates."""
        return max((update.gap_max for update in self.updates), default=0.0)

    @property
    def skipped_updates(self) -> list[OptimizerUpdate]:
        """The updates that were not applied."""
        return [update for update in self.updates if not update.applied]

    def skipped_in_a_row(self, before: int) -> int:
        """Count the skipped updates since the last applied one; `before` were skipped before this step."""
        for applied in self.applied:
            before = 0 if applied else before + 1
        return before
