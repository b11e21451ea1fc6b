"""The SRPO paper's ablation: both losses on every sample instead of routing (docs/method.md, section 3)."""

from typing import Literal

from pydantic import Field, PositiveFloat
from typing_extensions import override

from megatron_srpo.algorithm.settings import Algorithm


class AdvantageMix(Algorithm):
    """Train every sample on λ · GRPO and, if it has a teacher, on (1 - λ) · SDPO as well."""

    name: Literal["advantage_mix"] = "advantage_mix"
    lr: PositiveFloat = 5e-6
    mix_lambda: float = Field(default=0.9, ge=0, le=1, description="λ, the weight of the GRPO loss")

    @override
    def branch_weights(self, correct: bool, has_teacher: bool) -> tuple[float, float]:
        return self.mix_lambda, (1.0 - self.mix_lambda) * has_teacher
