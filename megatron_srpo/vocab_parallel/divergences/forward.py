"""forward: KL(q‖p), so f = 1 - q/p."""

import torch
from torch import Tensor
from typing_extensions import override

from megatron_srpo.vocab_parallel.divergences import CpuBlock, Formula
from megatron_srpo.vocab_parallel.kernels.base import times


class ForwardKL(Formula):
    """The forward KL divergence; its gradient is p - q."""

    mean_is_zero = True
    has_cpu_form = True

    @override
    def terms(self, p: Tensor, q: Tensor, difference: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        return times(q, difference), p - q

    @override
    def on_cpu(self, block: CpuBlock, alpha: float) -> None:
        torch.sum(block.log_ratio().mul_(block.q), 1, out=block.teacher_sum)
        torch.sub(block.q, block.p, out=block.negative_pf)

    @override
    def value(self, student_sum: Tensor, teacher_sum: Tensor, alpha: float) -> Tensor:
        return teacher_sum


FORMULA = ForwardKL()
