"""The tile on a CPU: two logits buffers made once, every elementwise pass over one row at a time, while it is in cache.

A pass over a whole tile in fresh memory costs a page fault every 4 KiB and the bandwidth of DRAM; a row of 152,000 fp32
columns (600 KB) stays in L2 and L3 through all the operations on it. Same interface and results as `ReferenceKernel`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.shard import VocabShard, all_reduce, own_columns

_ROW_NUMBERS = 1 << 17  # elements handled together: several short rows, or one long one
_TINY = 1e-37  # log m of a column that neither student nor teacher can choose: its weight is 0, its log only must be finite
_FLOOR = -1e30  # stands for logits of -inf


class CpuKernel:
    """For contiguous fp32 or float64 inputs and the full support. Holds two tiles [tile_tokens, width] and three rows."""

    def __init__(
        self, weight: Tensor, teacher_weight: Tensor | None, shard: VocabShard, kind: Divergence, temperature: float, tile_tokens: int
    ):
        width = shard.width
        self.weight = weight[:width]
        self.teacher_weight = None if teacher_weight is None else teacher_weight[:width]
        self.shard, self.kind, self.temperature = shard, kind, temperature
        self.rows = max(1, _ROW_NUMBERS // max(width, 1))
        self.student = weight.new_empty(tile_tokens, width)
        self.teacher = weight.new_empty(tile_tokens if teacher_weight is not None else 0, width)
        self.scratch = weight.new_empty(3, self.rows, width)

    def statistics(self, hidden: Tensor, teacher_hidden: Tensor | None, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `ReferenceKernel.statistics`; three all-reduces with a teacher, two without."""
        count, width = len(hidden), self.shard.width
        tiles = [torch.mm(hidden, self.weight.t(), out=self.student[:count])]
        if teacher_hidden is not None:
            tiles.append(torch.mm(teacher_hidden, self.teacher_weight.t(), out=self.teacher[:count]))
        maxima = hidden.new_full((len(tiles), count), _FLOOR)
        for tile, maximum in zip(tiles, maxima, strict=True):
            for rows in self._blocks(count):
                block = tile[rows]
                if self.temperature != 1.0:
                    block.div_(self.temperature)
                if width:
                    torch.amax(block.clamp_(min=_FLOOR), 1, out=maximum[rows])
        all_reduce(maxima, self.shard.group, dist.ReduceOp.MAX)
        sums = hidden.new_zeros(len(tiles) + 2, count)  # Σ exp of each, Σ exp·z and the target's logit of the student
        for number, (tile, maximum) in enumerate(zip(tiles, maxima, strict=True)):
            for rows in self._blocks(count):
                block = tile[rows].sub_(maximum[rows, None])
                exponential = torch.exp(block, out=self.scratch[0, : len(block)])
                torch.sum(exponential, 1, out=sums[number, rows])
                if number == 0:
                    torch.sum(exponential.mul_(block), 1, out=sums[-2, rows])
        if targets is not None and width:
            mine, column = own_columns(targets, self.shard)
            sums[-1] = tiles[0].gather(1, column[:, None])[:, 0] * mine
        *totals, weighted, target = all_reduce(sums, self.shard.group)
        self.targets, self.log_total = targets, [total.log() for total in totals]
        entropy = self.log_total[0] - weighted / totals[0]
        logprob = target if targets is None else target - self.log_total[0]
        return logprob, entropy, self._divergence(count) if teacher_hidden is not None else None

    def _blocks(self, count: int):
        return (slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows))

    def _divergence(self, count: int) -> Tensor:
        """D [n]. Leaves p·f in the student's tile and p in the teacher's (see `divergence.py` for f)."""
        sums = self.student.new_empty(2, count)  # Σ p f, and for the JSD Σ q (log q - log m); forward KL: its own sum
        kind, alpha = self.kind.kind, self.kind.alpha
        for rows in self._blocks(count):
            logp = self.student[rows].sub_(self.log_total[0][rows, None])
            logq = self.teacher[rows].sub_(self.log_total[1][rows, None])
            p, q, logm = (buffer[: len(logp)] for buffer in self.scratch)
            torch.exp(logp, out=p)
            torch.exp(logq, out=q)
            if kind == "jsd":
                torch.mul(p, 1 - alpha, out=logm).add_(q, alpha=alpha).clamp_(min=_TINY).log_()
                torch.sum(logq.sub_(logm).mul_(q), 1, out=sums[1, rows])
                logp.sub_(logm).mul_(p)
            elif kind == "reverse":
                logp.sub_(logq).mul_(p)
            else:
                torch.sum(logq.sub_(logp).mul_(q), 1, out=sums[1, rows])
                torch.neg(q, out=logp)
            torch.sum(logp, 1, out=sums[0, rows])
            logq.copy_(p)
        if kind == "reverse":
            sums[1].zero_()
        all_reduce(sums, self.shard.group)
        self.mean = sums[0]
        return {"jsd": (1 - alpha) * sums[0] + alpha * sums[1], "reverse": sums[0], "forward": sums[1]}[kind]

    def logits_grad(self, logprob_grad: Tensor, divergence_grad: Tensor | None) -> Tensor:
        """See `ReferenceKernel.logits_grad`. The result lives in the student's tile, until the next `statistics`."""
        count = len(logprob_grad)
        gradient = self.student[:count]
        logprob_grad = logprob_grad / self.temperature
        if divergence_grad is not None:
            scale = divergence_grad / self.temperature * ((1 - self.kind.alpha) if self.kind.kind == "jsd" else 1.0)
            of_p = -(scale * self.mean + logprob_grad)
        for rows in self._blocks(count):
            block = gradient[rows]
            if divergence_grad is None:
                block.sub_(self.log_total[0][rows, None]).exp_().mul_(-logprob_grad[rows, None])
            else:
                block.mul_(scale[rows, None]).addcmul_(self.teacher[rows], of_p[rows, None])
        if self.shard.width:
            mine, column = own_columns(self.targets, self.shard)
            gradient.scatter_add_(1, column[:, None], (logprob_grad * mine)[:, None])
        return gradient
