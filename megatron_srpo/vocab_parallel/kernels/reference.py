"""One tile in plain torch, for any device and dtype; the faster kernels are tested against it."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence, divergence_on_tile
from megatron_srpo.vocab_parallel.kernels.base import ColumnBlock, Statistics, StatisticsGrad, WriteLogits
from megatron_srpo.vocab_parallel.shard import VocabShard, all_reduce, local_columns


class ReferenceKernel:
    """A kernel that keeps log p, log q and dD/dz of the last tile.

    Collectives per tile: two all-reduces, and those of `divergence_on_tile`.
    """

    gradient_is_separate = True

    def __init__(self, shard: VocabShard, divergence: Divergence):
        self.shard, self.divergence = shard, divergence

    def statistics(
        self,
        tiles: list[Tensor],
        write: WriteLogits,
        targets: Tensor | None,
        while_waiting: Callable[[], None],
    ) -> Statistics:
        """Compute the statistics of one tile (see `ExactKernel`); `while_waiting` is not used."""
        for index, tile in enumerate(tiles):
            write(index, slice(0, tile.shape[1]))
        logps, self.entropy, logprobs = _log_softmax(tiles, targets, self.shard)
        self.targets, self.logp, divergence = targets, logps[0], None
        if len(tiles) == 2 and self.divergence.support == "sampled":
            divergence = logprobs[0] - logprobs[1]
            self.divergence_grad = divergence[:, None] * self._logprob_grad(torch.ones_like(divergence))
        elif len(tiles) == 2:
            on_tile = divergence_on_tile(logps[0], logps[1], self.divergence, self.shard)
            divergence, self.divergence_grad = on_tile
        return Statistics(logprobs[0], self.entropy, divergence)

    def logits_grad(self, grads: StatisticsGrad) -> list[ColumnBlock]:
        """Return the gradient of the last tile's student logits as one block."""
        gradient = torch.zeros_like(self.logp)
        if grads.logprob is not None:
            gradient = self._logprob_grad(grads.logprob)
        if grads.entropy is not None:
            p, logp = self.logp.exp(), self.logp.clamp(min=-1e30)
            gradient.addcmul_(p * (logp + self.entropy[:, None]), -grads.entropy[:, None])
        if grads.divergence is not None:
            gradient.addcmul_(self.divergence_grad, grads.divergence[:, None])
        return [(slice(0, gradient.shape[1]), gradient)]

    def _logprob_grad(self, scale: Tensor) -> Tensor:
        """Return scale · (1[v = y] - p_v), [n, width]."""
        gradient = self.logp.exp().mul_(-scale[:, None])
        if self.targets is not None and self.shard.width:
            is_local, columns = local_columns(self.targets, self.shard)
            gradient.scatter_add_(1, columns[:, None], (scale * is_local)[:, None])
        return gradient


def _log_softmax(
    logits: list[Tensor], targets: Tensor | None, shard: VocabShard
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Compute log softmax over all shards, the first tensor's entropy, and the log-probs of the targets.

    Collectives: two all-reduces, of the row maxima, then of the sums of exponentials, the entropy's
    numerator and the target logits.
    """
    empty = shard.width == 0
    maxima = torch.stack([z.new_full((len(z),), -math.inf) if empty else z.amax(1) for z in logits])
    all_reduce(maxima, shard.group, dist.ReduceOp.MAX)
    shifted = [z - m[:, None] for z, m in zip(logits, maxima, strict=True)]
    exponentials = [z.exp() for z in shifted]
    weighted = exponentials[0].mul(shifted[0].clamp(min=-1e30)).sum(1)  # 0 · -inf would be NaN
    target_logits = torch.zeros_like(maxima)
    if targets is not None and not empty:
        is_local, columns = local_columns(targets, shard)
        for z, logit in zip(shifted, target_logits, strict=True):
            logit.copy_(z.gather(1, columns[:, None])[:, 0].masked_fill(~is_local, 0.0))
    sums = all_reduce(torch.stack([*(e.sum(1) for e in exponentials), weighted, *target_logits]), shard.group)
    totals, weighted, target_logits = sums[: len(logits)], sums[len(logits)], sums[len(logits) + 1 :]
    logps = [z.sub_(total.log()[:, None]) for z, total in zip(shifted, totals, strict=True)]
    entropy = totals[0].log() - weighted / totals[0]
    if targets is None:
        return logps, entropy, list(torch.zeros_like(target_logits))
    return logps, entropy, [logit - total.log() for logit, total in zip(target_logits, totals, strict=True)]
