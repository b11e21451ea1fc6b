"""GRPO, the baseline: group-relative policy gradient on every sample (docs/method.md, section 1)."""

from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt
from typing_extensions import override

from megatron_srpo.algorithm.settings import Algorithm


class GRPO(Algorithm):
    """Train every sample on its group advantage, without a teacher; one optimizer step per 8 prompts."""

    uses_teacher: ClassVar[bool] = False
    expected_distilled_share: ClassVar[float] = 0.0

    name: Literal["grpo"] = "grpo"
    lr: PositiveFloat = 1e-6
    mini_batch_prompts: PositiveInt | None = 8

    @override
    def branch_weights(self, correct: bool, has_teacher: bool) -> tuple[float, float]:
        return 1.0, 0.0
