"""One tile on the full vocabulary: the collectives, and the algebra around the elementwise operations.

With z the student's logits, p = softmax z, q the teacher's softmax, H the entropy of p, y the target, and D
the divergence with its log-ratio f (see `divergences`), the gradient of any function of log p(y), H and D is

    dL/dz_v = g_logp (1[v = y] - p_v) - g_H p_v (log p_v + H) + g_D p_v (f_v - Σ_u p_u f_u)

`TileOps` does the work on [n, width]. This module handles only vectors of length n, with at most two
collectives per tile: all ranks' row sums (local maximum, Σ exp, Σ exp·z and the target's logit, from which
each rank computes the softmax over all columns), then all ranks' parts of the divergence.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.kernels.base import (
    FLOOR,
    ColumnBlock,
    GradTerms,
    Statistics,
    StatisticsGrad,
    TileOps,
    WriteLogits,
    combine,
)
from megatron_srpo.vocab_parallel.shard import VocabShard, gather, local_columns


class ExactKernel:
    """A kernel for the full support or the sampled token.

    Attributes:
        gradient_is_separate: The gradient remains valid while the next tile's logits are written.
    """

    def __init__(self, ops: TileOps, shard: VocabShard, divergence: Divergence):
        self.ops, self.shard, self.divergence = ops, shard, divergence
        self.gradient_is_separate = ops.gradient_is_separate

    def statistics(
        self,
        tiles: list[Tensor],
        write: WriteLogits,
        targets: Tensor | None,
        while_waiting: Callable[[], None],
    ) -> Statistics:
        """Compute the statistics of one tile.

        Args:
            tiles: [n, width] buffers for the student and, if distilled, for the teacher; overwritten.
            write: Writes columns of the logits to a tile.
            targets: [n] token ids; if None, the log-probs are zeros.
            while_waiting: Called once during each collective.
        """
        local = tiles[0].new_zeros(4, len(tiles), len(tiles[0]))
        self.ops.row_sums(tiles, write, local[:3])
        self._target_logits(tiles, targets, local[3])
        maxima, totals, weighted, target_logits = gather(local, self.shard, while_waiting).unbind(1)
        self.maximum, self.total, weighted = combine(maxima, totals, weighted)  # [tiles, n] each
        log_total = self.total.log()
        self.entropy = log_total[0] - weighted[0] / self.total[0]
        logprob = torch.zeros_like(self.maximum)
        if targets is not None:
            logprob = target_logits.sum(0) - self.maximum - log_total
        divergence = None
        if len(tiles) == 2:
            divergence = self._divergence(tiles, logprob, while_waiting)
        return Statistics(logprob[0], self.entropy, divergence)

    def _target_logits(self, tiles: list[Tensor], targets: Tensor | None, logits: Tensor) -> None:
        """Fill `logits` [tiles, n] with those of targets in this shard; the others remain 0."""
        self.target_columns = tiles[0].new_full((len(tiles[0]),), -1, dtype=torch.int64)
        if targets is not None and self.shard.width:
            is_local, columns = local_columns(targets, self.shard)
            self.target_columns = torch.where(is_local, columns, -1)
            for tile, logit in zip(tiles, logits, strict=True):
                own = tile.gather(1, columns[:, None])[:, 0].clamp(min=FLOOR)
                logit.copy_(torch.where(is_local, own, 0.0))

    def _divergence(self, tiles: list[Tensor], logprob: Tensor, while_waiting: Callable[[], None]) -> Tensor:
        if self.divergence.support == "sampled":
            self.log_ratio = logprob[0] - logprob[1]
            return self.log_ratio
        sums = self.ops.divergence_sums(tiles, self.maximum, self.total)
        student_sum, teacher_sum = gather(sums, self.shard, while_waiting).sum(0)
        formula = self.divergence.formula
        self.mean_f = torch.zeros_like(student_sum) if formula.mean_is_zero else student_sum
        return formula.value(student_sum, teacher_sum, self.divergence.alpha)

    def logits_grad(self, grads: StatisticsGrad) -> Iterable[ColumnBlock]:
        """Return the gradient of the last tile's student logits, by columns; valid until the next tile."""
        target_grad, entropy_grad, divergence_grad = grads
        if target_grad is None:
            target_grad = torch.zeros_like(self.entropy)
        if divergence_grad is not None and self.divergence.support == "sampled":
            target_grad, divergence_grad = target_grad + divergence_grad * self.log_ratio, None
        p_scale, pf_scale, plogp_scale = -target_grad, None, None
        if entropy_grad is not None:
            p_scale, plogp_scale = p_scale - entropy_grad * self.entropy, -entropy_grad
        if divergence_grad is not None:
            pf_scale = divergence_grad * self.divergence.formula.pf_weight(self.divergence.alpha)
            p_scale = p_scale - pf_scale * self.mean_f
        terms = GradTerms(self.target_columns, target_grad, p_scale, pf_scale, plogp_scale)
        return self.ops.gradient(terms, self.maximum, self.total)
