"""SDPO (arXiv 2601.20802): self-distillation on every sample with a teacher (docs/method.md, section 2)."""

from typing import Literal

from pydantic import PositiveFloat
from typing_extensions import override

from megatron_srpo.algorithm.settings import Algorithm


class SDPO(Algorithm):
    """Distil every sample that has a teacher, correct or not; give all others weight 0."""

    name: Literal["sdpo"] = "sdpo"
    lr: PositiveFloat = 1e-5

    @override
    def branch_weights(self, correct: bool, has_teacher: bool) -> tuple[float, float]:
        return 0.0, float(has_teacher)
