"""Per-token loss terms and entropy weights (docs/method.md, sections 1–3), in plain torch on [T] vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.algorithm.settings import Algorithm


class TokenTerms(NamedTuple):
    """Inputs of the objective for T policy tokens, [T] each; the weights include the loss's 1/denominator."""

    advantage: Tensor
    policy_weight: Tensor  # z^GRPO
    distillation_weight: Tensor  # z^SDPO · w
    engine_logprob: Tensor  # log π_roll
    old_logprob: Tensor | None  # log π_old; None if the policy has not changed since sampling

    def rows(self, rows: slice | Tensor) -> TokenTerms:
        """Return the terms of some of the tokens, given by a slice or by indices."""
        old = None if self.old_logprob is None else self.old_logprob[rows]
        return TokenTerms(*(field[rows] for field in self[:4]), old_logprob=old)


def truncated_importance(old_logprob: Tensor, engine_logprob: Tensor, cap: float | None) -> Tensor:
    """Return ρ = min(π_old / π_roll, cap), [T], detached; ones if `cap` is None."""
    if cap is None:
        return torch.ones_like(old_logprob)
    return (old_logprob - engine_logprob).detach().exp().clamp(max=cap)


def _ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """Return π_θ/π_old, [T], limited to e^±20: fp32 would overflow, and weight 0 times infinity is NaN."""
    return (logprob - old_logprob).clamp(-20.0, 20.0).exp()


def policy_term(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, algorithm: Algorithm) -> Tensor:
    """Return -min(w A, clip(w, 1 - ε_low, 1 + ε_high) A) with w = π_θ/π_old, [T].

    With dual clip c, the loss of a token with A < 0 is at most -c·A (docs/method.md, section 1).
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
    """Return the weighted sum of both losses over the tokens, a scalar (docs/method.md, section 3).

        Σ_t policy_weight · ρ · policy_term + distillation_weight · ρ · min(sg[π_θ/π_old], cap) · divergence

    Args:
        logprob: [T] log π_θ(y_t) of the sampled tokens, with gradient.
        divergence: [T] between student and teacher, with gradient; None if no token is distilled.
        terms: Advantages, weights and earlier log-probs of the same T tokens, without gradient.
        algorithm: Supplies the clip limits and the cap of ρ and of π_θ/π_old.
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


def entropy_weights(
    teacher_entropy: Tensor, beta: float, mean: Tensor | float = 1.0, cap: float | None = None
) -> Tensor:
    """Weight each distilled token by the teacher's certainty (docs/method.md, section 3).

    Args:
        teacher_entropy: [D] over the full vocabulary, in nats.
        beta: Sharpness; 0 gives weight 1 everywhere.
        mean: Mean of exp(-beta · entropy) over Ω, all distilled tokens of the optimizer batch on all ranks.
        cap: Upper bound of the weights, applied last.

    Returns:
        [D] float64, detached, with mean 1 over Ω. In fp32 they would underflow from beta · entropy = 104.
    """
    weights = torch.exp(-beta * teacher_entropy.detach().double()) / mean
    return weights if cap is None else weights.clamp(max=cap)
