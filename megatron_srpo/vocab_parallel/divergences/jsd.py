"""jsd: (1-α) KL(p‖m) + α KL(q‖m) with m = (1-α)p + αq, so f = (1-α)(log p - log m)."""

import torch
from torch import Tensor
from typing_extensions import override

from megatron_srpo.vocab_parallel.divergences import CpuBlock, Formula
from megatron_srpo.vocab_parallel.kernels.base import TINY, times


class JensenShannon(Formula):
    """The Jensen–Shannon divergence of weight α; at most ln 2 for α = ½."""

    has_cpu_form = True

    @override
    def terms(self, p: Tensor, q: Tensor, difference: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        # log m from the larger of p and q: log m - log p = log(1 + α (q/p - 1)), which is exact near q = p
        ratio = torch.expm1(-difference.abs())
        from_p = torch.log1p(alpha * ratio)  # log m - log p where p is the larger
        from_q = torch.log1p((1 - alpha) * ratio)  # log m - log q where q is the larger
        p_over_m = torch.where(difference > 0, -difference - from_q, -from_p)  # log p - log m
        q_over_m = torch.where(difference > 0, -from_q, difference - from_p)  # log q - log m
        pf = (1 - alpha) * times(p, p_over_m)
        return pf + alpha * times(q, q_over_m), pf

    @override
    def on_cpu(self, block: CpuBlock, alpha: float) -> None:
        # log(m/p) = log1p(α (q - p) / p) and log(m/q) = log1p((1-α) (p - q) / q): exactly 0 where p = q
        p, q, difference, zero = block.p, block.q, block.negative_pf, block.p.new_zeros(())
        torch.sub(q, p, out=difference)
        from_q = torch.clamp(q, min=TINY, out=block.y)
        torch.addcdiv(zero, difference, from_q, value=alpha - 1, out=from_q).log1p_().mul_(q)
        torch.sum(from_q, 1, out=block.teacher_sum).neg_()
        at_least_tiny = torch.clamp(p, min=TINY, out=block.x)
        torch.addcdiv(zero, difference, at_least_tiny, value=alpha, out=difference).log1p_().mul_(p)

    @override
    def pf_weight(self, alpha: float) -> float:
        return 1 - alpha

    @override
    def value(self, student_sum: Tensor, teacher_sum: Tensor, alpha: float) -> Tensor:
        return (1 - alpha) * student_sum + alpha * teacher_sum


FORMULA = JensenShannon()
