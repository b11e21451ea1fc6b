"""The tile, written plainly: any device, dtype and divergence. Faster kernels are tested against it."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.vocab_parallel import divergence as divergences
from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.shard import VocabShard, all_reduce, own_columns, wide


class ReferenceKernel:
    """Statistics of one tile of tokens at a time, and the gradient of its logits.

    Keeps what the gradient needs of the last tile: log p, log q and dD/dz, [n, width] each, freshly allocated.
    """

    def __init__(self, weight: Tensor, teacher_weight: Tensor | None, shard: VocabShard, kind: Divergence, temperature: float):
        self.weight, self.teacher_weight = weight, teacher_weight
        self.shard, self.kind, self.temperature = shard, kind, temperature

    def statistics(self, hidden: Tensor, teacher_hidden: Tensor | None, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """log p(target), entropy of p and D (None without a teacher), [n] each, of tokens `hidden` [n, H].

        Without targets the log-probabilities are zeros. All-reduces: two, and those of the divergence.
        """
        logits = [self._logits(hidden, self.weight)]
        if teacher_hidden is not None:
            logits.append(self._logits(teacher_hidden, self.teacher_weight))
        logps, entropy, logprob = _log_softmax(logits, targets, self.shard)
        self.targets, self.logp, divergence = targets, logps[0], None
        if teacher_hidden is not None:
            shard, kind = self.shard, self.kind
            if kind.top_k is None:
                divergence, self.divergence_grad = divergences.full(*logps, kind, shard.group)
            else:
                divergence, self.divergence_grad = divergences.top_k(*logps, kind, shard.start, shard.vocab_size, shard.group)
        return logprob, entropy, divergence

    def logits_grad(self, logprob_grad: Tensor, divergence_grad: Tensor | None) -> Tensor:
        """[n, width] gradient with respect to the raw logits of the last tile, from those of its statistics, [n]."""
        gradient = self.logp.exp().mul_(-logprob_grad[:, None])  # d log p(y) / dz = 1[y] - p
        mine, column = own_columns(self.targets, self.shard)
        if self.shard.width:
            gradient.scatter_add_(1, column[:, None], (logprob_grad * mine)[:, None])
        if divergence_grad is not None:
            gradient.addcmul_(self.divergence_grad, divergence_grad[:, None])
        return gradient.div_(self.temperature)

    def _logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[n, width] logits of the real columns, upcast here and not before."""
        logits = (hidden @ weight[: self.shard.width].t()).to(wide(hidden.dtype))
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)


def _log_softmax(logits: list[Tensor], targets: Tensor | None, shard: VocabShard) -> tuple[list[Tensor], Tensor, Tensor]:
    """log softmax over all shards of each tensor; the first one's entropy and log-probability of the targets.

    Two all-reduces in all: the row maxima, then sums of exponentials, the entropy's numerator and target logits.
    """
    empty = shard.width == 0
    maxima = torch.stack([z.new_full((z.shape[0],), -math.inf) if empty else z.amax(1) for z in logits])
    all_reduce(maxima, shard.group, dist.ReduceOp.MAX)
    shifted = [z.sub_(m[:, None]) for z, m in zip(logits, maxima, strict=True)]
    exponentials = [z.exp() for z in shifted]
    weighted = exponentials[0].mul(shifted[0].clamp(min=-1e30)).sum(1)  # 0 · -inf would be NaN
    target_logit = torch.zeros_like(maxima[0])
    if targets is not None and not empty:
        mine, column = own_columns(targets, shard)
        target_logit = torch.where(mine, shifted[0].gather(1, column[:, None])[:, 0], target_logit)
    sums = torch.stack([*(e.sum(1) for e in exponentials), weighted, target_logit])
    *totals, weighted, target_logit = all_reduce(sums, shard.group)
    logps = [z.sub_(total.log()[:, None]) for z, total in zip(shifted, totals, strict=True)]
    entropy = totals[0].log() - weighted / totals[0]
    return logps, entropy, target_logit if targets is None else target_logit - totals[0].log()
