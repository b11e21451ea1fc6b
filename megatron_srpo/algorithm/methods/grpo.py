"""GRPO, the baseline: group-relative policy gradient on every sample (METHOD.md §1)."""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from megatron_srpo.algorithm.settings import Algorithm


class GRPO(Algorithm):
    """Several optimizer steps per rollout batch, in mini-batches of 8 prompts; no teacher."""

    name: Literal["grpo"] = "grpo"
    lr: PositiveFloat = 1e-6
    mini_batch_prompts: PositiveInt | None = 8

    @property
    def distils(self) -> bool:
        """GRPO has no teacher."""
        return False

    def branch_weights(self, correct: bool, has_teacher: bool) -> tuple[float, float]:
        """z^GRPO = 1 for every sample."""
        return 1.0, 0.0
