"""Numbers that one training step's updates report."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_srpo.data import histogram as quantiles


@dataclass
class UpdateReport:
    """One training step's updates. `sums` are token sums over all ranks (see `_SUMS`), `gap_max` the largest
    log-prob gap.

    teacher_entropies: of all distilled tokens, counted as in algorithm/quantiles.py.
    teacher_distances: ‖θ - θ'‖ / ‖θ‖ before and after the teacher followed; None without a teacher that has
    weights of its own.
    """

    losses: list[float]
    grad_norms: list[float]
    moved: list[bool]
    lr: float
    sums: dict[str, float]
    gap_max: float
    teacher_entropies: list[float] = field(default_factory=lambda: [0.0] * quantiles.BINS)
    teacher_distances: tuple[float, float] | None = None

    @property
    def skipped_updates(self) -> list[tuple[float, float]]:
        """(loss, gradient norm) of the updates that were not made."""
        return [
            (loss, norm)
            for loss, norm, moved in zip(self.losses, self.grad_norms, self.moved, strict=True)
            if not moved
        ]

    def skipped_in_a_row(self, before: int) -> int:
        """Skipped updates since the last one made, when `before` had been skipped before this step."""
        for moved in self.moved:
            before = 0 if moved else before + 1
        return before
