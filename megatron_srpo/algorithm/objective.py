"""Per-token loss terms and entropy weights (METHOD.md §1–3) on [T] vectors: plain torch, differentiated by
autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.algorithm.settings import Algorithm


class TokenTerms(NamedTuple):
    """What the objective knows of T response tokens; all [T], the loss's numerators already divided by its
    denominator.

    old_logprob: log π_old, or None when the policy has not moved since the batch was sampled (one optimizer
    step).
    """

    advantage: Tensor
    policy_weight: Tensor
    distillation_weight: Tensor
    engine_logprob: Tensor
    old_logprob: Tensor | None

    def rows(self, rows: slice) -> TokenTerms:
        """The same for some of the tokens."""
        return TokenTerms(*(None if field is None else field[rows] for field in self))


def truncated_importance(old_logprob: Tensor, engine_logprob: Tensor, cap: float | None) -> Tensor:
    """ρ = min(π_old / π_roll, cap), [T], detached; ones when `cap` is None."""
    if cap is None:
        return torch.ones_like(old_logprob)
    return (old_logprob - engine_logprob).detach().exp().clamp(max=cap)


def _ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """π_θ/π_old, [T], held within e^±20: beyond, fp32 would overflow and 0 · inf make NaN of tokens that
    weigh nothing.
    """
    return (logprob - old_logprob).clamp(-20.0, 20.0).exp()


def policy_term(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, algorithm: Algorithm) -> Tensor:
    """- min(w A, clip(w, 1 - ε_low, 1 + ε_high) A) with w = π_θ/π_old, [T]; with dual clip c, at most -c·A
    where A < 0.
    """
    ratio = _ratio(logprob, old_logprob)
    clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if algorithm.dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -algorithm.dual_clip * advantage), loss)
    return loss


def routed_objective(
    logprob: Tensor, divergence: Tensor | None, terms: TokenTerms, algorithm: Algorithm
) -> Tensor:
    """Σ_t policy_weight · ρ · ℓ^GRPO + distillation_weight · ρ · min(sg[w], cap) · ℓ^SDPO, a scalar; without
    a cap ρ and sg[w] are 1.

    Args:
        logprob: [T] log π_θ(y_t) of the sampled tokens, with gradient.
        divergence: [T] student–teacher divergence, with gradient; None when none of these tokens is
            distilled.
    """
    old = logprob.detach() if terms.old_logprob is None else terms.old_logprob
    importance = truncated_importance(old, terms.engine_logprob, algorithm.importance_cap)
    loss = (terms.policy_weight * importance * policy_term(logprob, old, terms.advantage, algorithm)).sum()
    if divergence is not None:
        weight = terms.distillation_weight * importance
        if algorithm.importance_cap is not None:
            weight = weight * _ratio(logprob.detach(), old).clamp(max=algorithm.importance_cap)
        loss = loss + (weight * divergence).sum()
    return loss


def raw_entropy_weights(teacher_entropy: Tensor, beta: float) -> Tensor:
    """w̃ = exp(-β H), [T] float64 (in fp32 all would be 0 from β H = 104 on), from the teacher's
    full-vocabulary entropies in nats.
    """
    return torch.exp(-beta * teacher_entropy.detach().double())


def entropy_weights(raw: Tensor, mean: Tensor, cap: float | None = None) -> Tensor:
    """w = w̃ / mean over Ω, [T]; Ω is every distilled token of the optimizer batch on all ranks, so `mean`
    is given.
    """
    weights = raw / mean
    return weights if cap is None else weights.clamp(max=cap)
