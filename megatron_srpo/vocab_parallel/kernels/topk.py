"""One tile of tokens on the top K of one side and a tail bucket with the rest of the mass (METHOD.md §2,
paper parity).

The head's columns are taken out of the tiles before the passes, which so sum up the tail; what remains is
mathematics on [n, K + 1], little enough to be done in float64. With P_tail the student's mass in the tail and
p f of the buckets as in `divergence.py`, a column v outside the head has the gradient

    dD/dz_v = (p_v / P_tail) ((p f)_tail - P_tail Σ p f)

where p_v / P_tail is a softmax of its own: exact also where P_tail is too small for fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import addends, top_ids
from megatron_srpo.vocab_parallel.kernels.exact import FLOOR, ExactKernel, combine
from megatron_srpo.vocab_parallel.shard import all_reduce, gather, local_columns


class TailKernel(ExactKernel):
    """As `ExactKernel`, with D on the support of `divergence`; tokens without a teacher take its way.

    Collectives a distilled tile: all-gathers of the ranks' top ids and logits [n, K] and of [4, 2, n], an
    all-reduce of [2, n, K]. Memory: the tiles and [n, K].
    """

    def statistics(
        self, tiles: list[Tensor], targets: Tensor | None, meanwhile: Callable[[], None]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `ExactKernel.statistics`."""
        self.has_head = len(tiles) == 2
        if not self.has_head:
            return super().statistics(tiles, targets, meanwhile)
        local = tiles[0].new_zeros(4, 2, len(tiles[0]))
        self._target_logits(tiles, targets, local[3])
        head = self._take_head(tiles)
        self.passes.row_sums(tiles, local[:3])
        maxima, totals, weighted, targeted = gather(local, self.shard, meanwhile).double().unbind(1)
        tail_maximum, tail_total, tail_weighted = combine(maxima, totals, weighted)
        parts = torch.cat([head, tail_maximum[..., None]], dim=2).movedim(2, 0)  # [K + 1, 2, n]
        ones, zeros = torch.ones_like(parts), torch.zeros_like(parts)
        ones[-1], zeros[-1] = tail_total, tail_weighted
        maximum, total, all_weighted = combine(parts, ones, zeros)
        log_total = total.log()
        self.entropy = log_total[0] - all_weighted[0] / total[0]
        logprob = targeted.sum(0) - maximum - log_total if targets is not None else torch.zeros_like(total)
        tail = tail_maximum - maximum + tail_total.log()
        buckets = torch.cat([head - maximum[..., None], tail[..., None]], dim=2) - log_total[..., None]
        terms, self.pf = addends(*buckets, self.divergence)
        self.logp, self.targets = buckets[0], targets
        self.tail_maximum, self.tail_total = tail_maximum.to(tiles[0].dtype), tail_total.to(tiles[0].dtype)
        return tuple(values.to(tiles[0].dtype) for values in (logprob[0], self.entropy, terms.sum(1)))

    def _take_head(self, tiles: list[Tensor]) -> Tensor:
        """Logits [2, n, K] of the head; in the tiles, its columns become -inf."""
        self.ids = top_ids(
            tiles[0 if self.divergence.support == "student_topk" else 1], self.divergence.top_k, self.shard
        )
        self.mine, self.columns = local_columns(self.ids, self.shard)
        head = tiles[0].new_zeros(2, *self.ids.shape)
        if self.shard.width:
            out = torch.where(self.mine, FLOOR, torch.inf).to(tiles[0].dtype)
            for tile, values in zip(tiles, head, strict=True):
                values.copy_(torch.where(self.mine, tile.gather(1, self.columns).clamp(min=FLOOR), 0.0))
                tile.scatter_reduce_(
                    1, self.columns, out, "amin"
                )  # columns that are not ours point at 0, and leave it alone
        return all_reduce(head, self.shard.group).double()

    def logits_grad(
        self, logprob_grad: Tensor | None, entropy_grad: Tensor | None, divergence_grad: Tensor | None
    ) -> Tensor:
        """See `ExactKernel.logits_grad`."""
        if not self.has_head:
            return super().logits_grad(logprob_grad, entropy_grad, divergence_grad)
        p, dtype = self.logp.exp(), self.tail_total.dtype
        target = torch.zeros_like(self.tail_total[0]) if logprob_grad is None else logprob_grad
        of_bucket = -target[:, None] * p
        of_plogp = None
        if entropy_grad is not None:
            of_bucket -= entropy_grad[:, None] * p * (self.logp + self.entropy[:, None])
            of_plogp = (-entropy_grad * p[:, -1]).to(
                dtype
            )  # within the tail: log p = log (p / P_tail) + log P_tail
        if divergence_grad is not None:
            mean = 0.0 if self.divergence.name == "forward" else self.pf.sum(1, keepdim=True)
            of_bucket += divergence_grad[:, None] * (self.pf - p * mean)
        column = self.column
        if self.targets is not None:
            is_target = self.ids == self.targets[:, None]
            of_bucket[:, :-1] += target[:, None] * is_target
            column = torch.where(is_target.any(1), -1, column)
        scales = (None, of_bucket[:, -1].to(dtype).contiguous(), of_plogp)
        gradient = self.passes.gradient(scales, self.tail_maximum, self.tail_total, column, target)
        if self.shard.width:
            values = torch.where(self.mine, of_bucket[:, :-1], 0.0).to(gradient.dtype)
            gradient.scatter_add_(1, self.columns, values)
        return gradient
