"""Settings shared by all training methods; a method is a subclass in a module of `methods/`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_srpo.data.validation import refuse_booleans
from megatron_srpo.vocab_parallel.divergences import names

if TYPE_CHECKING:
    _DivergenceName = str
else:
    _DivergenceName = Literal[names()]


class Algorithm(BaseModel):
    """Settings of a training method. A subclass sets its paper's defaults and defines `branch_weights`.

    A field declared again in a subclass loses the limits set here: repeat them in its type (PositiveFloat).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    registered: ClassVar[dict[str, type[Algorithm]]] = {}  # subclasses with a Literal `name`
    uses_teacher: ClassVar[bool] = True
    expected_distilled_share: ClassVar[float] = 1.0  # share of the response tokens, for `srpo plan`

    name: str
    lr: float = Field(gt=0, description="the paper's learning rate, used when optimizer.lr is null")
    mini_batch_prompts: int | None = Field(
        default=None, gt=0, description="prompts per optimizer step; null: the entire batch"
    )

    advantage_std: bool = Field(
        default=False, description="divide advantages by the group's std (ddof 1, eps 1e-6)"
    )
    clip_low: float = Field(
        default=0.2, ge=0, lt=1, description="ratio clipped to [1 - clip_low, 1 + clip_high]"
    )
    clip_high: float = Field(default=0.28, ge=0, description="see clip_low")
    dual_clip: float | None = Field(
        default=3.0, gt=1, description="c: the loss of a token with A < 0 is at most -c·A; null: off"
    )
    importance_cap: float | None = Field(
        default=2.0,
        gt=0,
        description="cap of π_old/π_roll (TIS) and, in the distillation loss, of π_θ/π_old; null: off",
    )
    loss_aggregation: Literal["token_mean", "seq_mean"] = Field(
        default="token_mean",
        description="token_mean: one denominator for all tokens; seq_mean: mean of per-sequence means",
    )

    divergence: _DivergenceName = Field(
        default="jsd",
        description="between student p and teacher q; jsd: Jensen–Shannon with divergence_alpha;"
        " forward: KL(q‖p); reverse: KL(p‖q)",
    )
    divergence_alpha: float = Field(default=0.5, gt=0, lt=1, description="α of jsd: m = (1-α)p + αq")
    divergence_support: Literal["full", "student_topk", "teacher_topk", "sampled"] = Field(
        default="full",
        description="full: exact; student_topk, teacher_topk: one side's top K ids and one tail bucket"
        " for the rest; sampled: only the response's token (needs divergence: reverse)",
    )
    divergence_topk: int = Field(default=100, gt=0, description="K of student_topk and teacher_topk")
    entropy_beta: float = Field(
        default=0.0, ge=0, description="β of the token weight w = exp(-β H) / mean; 0: no weighting"
    )
    entropy_weight_cap: float | None = Field(
        default=None, gt=0, description="upper bound of the normalised w; null: none"
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for name in get_args(cls.model_fields["name"].annotation):
            if name in cls.registered:
                raise TypeError(f"algorithm {name!r} is both {cls.registered[name]} and {cls}")
            cls.registered[name] = cls

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans(cls, given: Any) -> Any:
        return refuse_booleans(cls, given)

    @model_validator(mode="after")
    def _sampled_support_needs_reverse_kl(self):
        if self.divergence_support == "sampled" and self.divergence != "reverse":
            problem = f"sampled tokens estimate the reverse KL only, not {self.divergence}"
            raise ValueError(f"algorithm.divergence_support: {problem}; set algorithm.divergence: reverse")
        return self

    def branch_weights(self, correct: bool, has_teacher: bool) -> tuple[float, float]:
        """Return (z^GRPO, z^SDPO), the weights of one sample's two losses.

        Args:
            correct: c_i: the sample's reward is at least 0.5.
            has_teacher: m_i: a correct sibling's solution (or feedback) fits into a teacher's prompt.
        """
        raise NotImplementedError
