"""reverse: KL(p‖q), so f = log p - log q."""

import torch
from torch import Tensor
from typing_extensions import override

from megatron_srpo.vocab_parallel.divergences import CpuBlock, Formula
from megatron_srpo.vocab_parallel.kernels.base import times


class ReverseKL(Formula):
    """The reverse KL divergence; its gradient is p (log p - log q - KL)."""

    has_cpu_form = True

    @override
    def terms(self, p: Tensor, q: Tensor, difference: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        pf = times(p, -difference)
        return pf, pf

    @override
    def on_cpu(self, block: CpuBlock, alpha: float) -> None:
        torch.mul(block.log_ratio(), block.p, out=block.negative_pf)

    @override
    def value(self, student_sum: Tensor, teacher_sum: Tensor, alpha: float) -> Tensor:
        return student_sum


FORMULA = ReverseKL()
