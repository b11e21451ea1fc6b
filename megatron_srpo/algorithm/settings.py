"""What every algorithm has in common: its switches and its paper's defaults.

A new algorithm is a subclass in a new file.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Algorithm(BaseModel):
    """Settings shared by all algorithms. A subclass names itself, sets its paper's defaults and says who
    learns from what.

    A field declared again in a subclass loses the limits set here: repeat them in its type (PositiveFloat,
    …).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    lr: float = Field(gt=0, description="the paper's learning rate, used when optimizer.lr is not given")
    mini_batch_prompts: int | None = Field(
        None, gt=0, description="prompts per optimizer step; null: the whole batch at once"
    )

    advantage_std: bool = Field(
        False, description="divide the advantage by the group's standard deviation (ddof 1, eps 1e-6)"
    )
    clip_low: float = Field(
        0.2, ge=0, lt=1, description="the ratio is clipped to [1 - clip_low, 1 + clip_high]"
    )
    clip_high: float = Field(0.28, ge=0)
    dual_clip: float | None = Field(
        3.0, gt=1, description="c: the loss of a negative advantage is at most -c·A; null: no bound"
    )
    importance_cap: float | None = Field(
        2.0,
        gt=0,
        description="cap of π_old/π_roll (TIS) and of π_θ/π_old in the distillation; null: no importance correction",
    )
    loss_aggregation: Literal["token_mean", "seq_mean"] = Field(
        "token_mean",
        description="one denominator for all tokens; seq_mean averages per-sequence means, as the SDPO code",
    )

    divergence: Literal["jsd", "forward", "reverse"] = Field(
        "jsd", description="student p, teacher q: jsd(α), KL(q‖p), KL(p‖q)"
    )
    divergence_alpha: float = Field(0.5, gt=0, lt=1, description="α of jsd: m = (1-α)p + αq")
    divergence_support: Literal["full", "student_topk", "teacher_topk", "sampled"] = Field(
        "full",
        description="full: exact; student_topk, teacher_topk: the likeliest K ids of one side and one tail bucket;"
        " sampled: the response's own token (divergence: reverse)",
    )
    divergence_topk: int = Field(100, gt=0, description="K of student_topk and teacher_topk")
    entropy_beta: float = Field(0.0, ge=0, description="β of w = exp(-β H) / mean; 0: no weighting")
    entropy_weight_cap: float | None = Field(
        None, gt=0, description="optional upper bound of w, applied after normalisation"
    )

    @model_validator(mode="after")
    def _one_sample_estimates_the_reverse_kl(self):
        if self.divergence_support == "sampled" and self.divergence != "reverse":
            raise ValueError(
                f"algorithm.divergence_support: sampled tokens estimate the reverse KL only, not {self.divergence};"
                " set algorithm.divergence: reverse"
            )
        return self

    @property
    def distils(self) -> bool:
        """Whether a teacher is needed at all."""
        return True

    def branch_weights(self, correct: bool, has_teacher: bool) -> tuple[float, float]:
        """(z^GRPO, z^SDPO) of one sample.

        Args:
            correct: c_i, the sample's reward is at least 0.5.
            has_teacher: m_i, another correct rollout of the same prompt exists and its demonstration fits.
        """
        raise TypeError(f"{type(self).__name__} does not say how it routes samples")
