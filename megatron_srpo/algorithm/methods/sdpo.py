"""SDPO (arXiv 2601.20802), the baseline: self-distillation on every sample that has a correct sibling
(METHOD.md §2).
"""

from typing import Literal

from pydantic import PositiveFloat

from megatron_srpo.algorithm.settings import Algorithm


class SDPO(Algorithm):
    """Right or wrong, a sample is corrected toward the teacher; samples without a teacher are left out of
    the loss.
    """

    name: Literal["sdpo"] = "sdpo"
    lr: PositiveFloat = 1e-5

    def branch_weights(self, correct: bool, has_teacher: bool) -> tuple[float, float]:
        """z^SDPO = m; a sample without a teacher counts neither above nor below the fraction line, as in the
        SDPO code.
        """
        return 0.0, float(has_teacher)
