"""Sample-Routed Policy Optimization (arXiv 2604.02288, section 3)."""

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat
from typing_extensions import override

from megatron_srpo.algorithm.settings import Algorithm


class SRPO(Algorithm):
    """Distil failed samples that have a teacher; train all others on their group advantage."""

    # The share of distilled samples starts near 0.4 and falls (docs/method.md, section 4).
    expected_distilled_share: ClassVar[float] = 0.25

    name: Literal["srpo"] = "srpo"
    lr: PositiveFloat = 5e-6
    entropy_beta: NonNegativeFloat = 1.0

    @override
    def branch_weights(self, correct: bool, has_teacher: bool) -> tuple[float, float]:
        distilled = float(not correct and has_teacher)
        return 1.0 - distilled, distilled
