"""Sample-Routed Policy Optimization (arXiv 2604.02288 §3)."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat

from megatron_srpo.algorithm.settings import Algorithm


class SRPO(Algorithm):
    """Failed samples with a correct sibling are distilled, everything else gets GRPO; uncertain teacher
    tokens count less.
    """

    name: Literal["srpo"] = "srpo"
    lr: PositiveFloat = 5e-6
    entropy_beta: NonNegativeFloat = 1.0

    def branch_weights(self, correct: bool, has_teacher: bool) -> tuple[float, float]:
        """z^SDPO = (1 - c) m, z^GRPO = 1 - z^SDPO."""
        distilled = float(not correct and has_teacher)
        return 1.0 - distilled, distilled
