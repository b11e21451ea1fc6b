"""One tile on one side's top K ids and a tail bucket with the remaining mass (docs/method.md, section 2).

The head's columns are removed from the tiles before the row sums, which then describe the tail. The rest of
the computation is on [n, K + 1], small enough for float64. With P_tail the student's mass in the tail and p f
of the buckets as in `divergences`, a column v outside the head has the gradient

    dD/dz_v = (p_v / P_tail) ((p f)_tail - P_tail Σ p f)

where p_v / P_tail is computed as a softmax over the tail: exact also where P_tail is too small for fp32.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from typing_extensions import override

from megatron_srpo.vocab_parallel.divergence import divergence_terms, top_ids
from megatron_srpo.vocab_parallel.kernels.base import (
    FLOOR,
    ColumnBlock,
    GradTerms,
    Statistics,
    StatisticsGrad,
    WriteLogits,
    add_at,
    combine,
)
from megatron_srpo.vocab_parallel.kernels.exact import ExactKernel
from megatron_srpo.vocab_parallel.shard import all_reduce, gather, local_columns


class TopKKernel(ExactKernel):
    """A kernel for top K and tail; tiles without a teacher are computed as in `ExactKernel`.

    Collectives per distilled tile: all-gathers of the ranks' top ids and logits [n, K] and of [4, 2, n], and
    an all-reduce of [2, n, K]. Memory: the tiles and [n, K].
    """

    @override
    def statistics(
        self,
        tiles: list[Tensor],
        write: WriteLogits,
        targets: Tensor | None,
        while_waiting: Callable[[], None],
    ) -> Statistics:
        self.has_head = len(tiles) == 2
        if not self.has_head:
            return super().statistics(tiles, write, targets, while_waiting)
        dtype = tiles[0].dtype
        for index, tile in enumerate(tiles):
            write(index, slice(0, tile.shape[1]))
        local = tiles[0].new_zeros(4, 2, len(tiles[0]))
        self._target_logits(tiles, targets, local[3])
        head = self._take_head(tiles)
        self.ops.row_sums(tiles, _keep_tiles, local[:3])
        gathered = gather(local, self.shard, while_waiting).double()
        maxima, totals, weighted, target_logits = gathered.unbind(1)
        tail = combine(maxima, totals, weighted)
        parts = torch.cat([head, tail.maximum[..., None]], dim=2).movedim(2, 0)  # [K + 1, 2, n]
        part_totals, part_weighted = torch.ones_like(parts), torch.zeros_like(parts)
        part_totals[-1], part_weighted[-1] = tail.total, tail.weighted
        maximum, total, all_weighted = combine(parts, part_totals, part_weighted)
        log_total = total.log()
        self.entropy = log_total[0] - all_weighted[0] / total[0]
        logprob = torch.zeros_like(total)
        if targets is not None:
            logprob = target_logits.sum(0) - maximum - log_total
        tail_logit = tail.maximum - maximum + tail.total.log()
        buckets = torch.cat([head - maximum[..., None], tail_logit[..., None]], dim=2) - log_total[..., None]
        terms, self.pf = divergence_terms(buckets[0], buckets[1], self.divergence)
        self.logp, self.targets = buckets[0], targets
        self.tail_maximum, self.tail_total = tail.maximum.to(dtype), tail.total.to(dtype)
        return Statistics(logprob[0].to(dtype), self.entropy.to(dtype), terms.sum(1).to(dtype))

    def _take_head(self, tiles: list[Tensor]) -> Tensor:
        """Return the head's logits [2, n, K]; its columns in the tiles become -inf."""
        chooser = tiles[0] if self.divergence.support == "student_topk" else tiles[1]
        self.ids = top_ids(chooser, self.divergence.top_k, self.shard)
        self.is_local, self.columns = local_columns(self.ids, self.shard)
        head = tiles[0].new_zeros(2, *self.ids.shape)
        if self.shard.width:
            # ids of other shards point to column 0, which a minimum with +inf leaves unchanged
            removed = torch.where(self.is_local, FLOOR, torch.inf).to(tiles[0].dtype)
            for tile, values in zip(tiles, head, strict=True):
                values.copy_(torch.where(self.is_local, tile.gather(1, self.columns).clamp(min=FLOOR), 0.0))
                tile.scatter_reduce_(1, self.columns, removed, "amin")
        return all_reduce(head, self.shard.group).double()

    @override
    def logits_grad(self, grads: StatisticsGrad) -> Iterable[ColumnBlock]:
        if not self.has_head:
            return super().logits_grad(grads)
        target_grad, entropy_grad, divergence_grad = grads
        p, dtype = self.logp.exp(), self.tail_total.dtype
        if target_grad is None:
            target_grad = torch.zeros_like(self.tail_total[0])
        bucket_grad = -target_grad[:, None] * p
        plogp_scale = None
        if entropy_grad is not None:
            bucket_grad -= entropy_grad[:, None] * p * (self.logp + self.entropy[:, None])
            # within the tail, log p = log (p / P_tail) + log P_tail
            plogp_scale = (-entropy_grad * p[:, -1]).to(dtype)
        if divergence_grad is not None:
            mean_f = 0.0 if self.divergence.formula.mean_is_zero else self.pf.sum(1, keepdim=True)
            bucket_grad += divergence_grad[:, None] * (self.pf - p * mean_f)
        target_columns = self.target_columns
        if self.targets is not None:
            is_target = self.ids == self.targets[:, None]
            bucket_grad[:, :-1] += target_grad[:, None] * is_target
            target_columns = torch.where(is_target.any(1), -1, target_columns)
        p_scale = bucket_grad[:, -1].to(dtype).contiguous()
        terms = GradTerms(target_columns, target_grad, p_scale, plogp_scale=plogp_scale)
        return self._with_head(self.ops.gradient(terms, self.tail_maximum, self.tail_total), bucket_grad)

    def _with_head(self, blocks: Iterable[ColumnBlock], bucket_grad: Tensor) -> Iterator[ColumnBlock]:
        """Add the gradient of the head's columns, which is 0 in the blocks."""
        head_columns = torch.where(self.is_local, self.columns, -1)
        for columns, gradient in blocks:
            add_at(gradient, columns, head_columns, bucket_grad[:, :-1])
            yield columns, gradient


def _keep_tiles(index: int, columns: slice) -> None:
    """Write nothing: the tiles are complete."""
