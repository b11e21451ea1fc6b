"""The SRPO paper's ablation: GRPO and SDPO mixed on every sample, not routed (docs/method.md, section 3)."""

from typing import Literal

from pydantic import Field, PositiveFloat

from megatron_srpo.algorithm.settings import Algorithm


class AdvantageMix(Algorithm):
    """λ · GRPO on every sample plus (1 - λ) · SDPO on every sample with a teacher."""

    name: Literal["advantage_mix"] = "advantage_mix"
    lr: PositiveFloat = 5e-6
    mix_lambda: float = Field(default=0.9, ge=0, le=1, description="λ, the share of GRPO")

    def branch_weights(self, correct: bool, has_teacher: bool) -> tuple[float, float]:
        return self.mix_lambda, (1.0 - self.mix_lambda) * has_teacher
