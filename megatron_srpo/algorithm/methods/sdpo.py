"""SDPO (arXiv 2601.20802): self-distillation on every sample with a teacher (docs/method.md, section 2)."""

from typing import Literal

from pydantic import PositiveFloat

from megatron_srpo.algorithm.settings import Algorithm


class SDPO(Algorithm):
    """Distil every sample that has a teacher, correct or not; leave the others out of the loss."""

    name: Literal["sdpo"] = "sdpo"
    lr: PositiveFloat = 1e-5

    def branch_weights(self, correct: bool, has_teacher: bool) -> tuple[float, float]:
        return 0.0, float(has_teacher)
