"""One pass over the vocabulary for everything the loss needs, from hidden states, tile by tile.

For each tile of tokens: logits of this rank's vocabulary shard → statistics (log-prob, entropy, divergence) with at most
three small all-reduces → the caller's objective on those per-token vectors, differentiated by autograd → the closed-form
gradient of the tile's logits → accumulated into dHidden and dWeight. Nothing of size [tokens, vocabulary] outlives a
tile and nothing is computed twice: four matrix products a distilled token, three otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.vocab_parallel import divergence as divergences
from megatron_srpo.vocab_parallel.divergence import Divergence, all_reduce

TILE_BYTES = 64 * 2**20  # of one fp32 logits tile; a few of them live at once

# objective(rows, logprob [n], divergence [n] or None) -> scalar; differentiable in both vectors
Objective = Callable[[slice, Tensor, Tensor | None], Tensor]


class VocabShard(NamedTuple):
    """This rank's columns of the vocabulary: ids start … start + width - 1. Padded columns are not counted in `width`.

    group: the tensor-parallel ranks that hold the other columns; None when this rank holds them all.
    """

    start: int
    width: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_rank(cls, rank: int, padded_width: int, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """The shard of tensor-parallel rank `rank` when every rank holds `padded_width` rows of the output matrix."""
        start = min(rank * padded_width, vocab_size)
        return cls(start, min(padded_width, vocab_size - start), vocab_size, group)


class Statistics(NamedTuple):
    """Per-token results, [T] in fp32 (or the inputs' float64), without gradient.

    logprob: of the target ids. entropy: of the student, nats. divergence: [D], of the first D tokens.
    """

    logprob: Tensor
    entropy: Tensor
    divergence: Tensor


def fused_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    shard: VocabShard,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    divergence: Divergence = Divergence(),  # noqa: B008  (immutable)
    temperature: float = 1.0,
    tile_tokens: int | None = None,
) -> tuple[Tensor, Statistics]:
    """Σ over tiles of `objective`, with gradients to `hidden` and `weight` computed in the same pass.

    Args:
        hidden: [T, H] final hidden states; the first D tokens are the distilled ones.
        weight: [padded_width, H] this rank's rows of the output matrix.
        targets: [T] token ids, in 0 … vocab_size - 1.
        teacher_hidden, teacher_weight: [D, H] and [padded_width, H], detached; None when D = 0.
        temperature: both models' logits are divided by it.

    Returns:
        The scalar loss (identical on every tensor-parallel rank) and the statistics. The gradient to `hidden` is this
        rank's share: the caller sums it over the tensor-parallel ranks, as the backward of its gather or copy.
    """
    tile_tokens = tile_tokens or max(16, TILE_BYTES // (4 * weight.shape[0]))
    call = _Call(targets, objective, shard, teacher_hidden, teacher_weight, divergence, temperature, tile_tokens)
    loss, logprob, entropy, divergence_values = _FusedObjective.apply(hidden, weight, call)
    return loss, Statistics(logprob, entropy, divergence_values)


@torch.no_grad()
def score(hidden: Tensor, weight: Tensor, targets: Tensor | None, shard: VocabShard, *, temperature: float = 1.0) -> Statistics:
    """Log-probabilities of `targets` (zeros when None) and entropies, [T], without gradient: teacher and old-policy scoring."""
    tile_tokens = max(16, TILE_BYTES // (4 * weight.shape[0]))
    results = [hidden.new_empty(2, 0, dtype=_wide(hidden.dtype))]
    for start in range(0, hidden.shape[0], tile_tokens):
        rows = slice(start, start + tile_tokens)
        logits = _logits(hidden[rows], weight, shard, temperature)
        _, entropies, logprob = _log_softmax([logits], None if targets is None else targets[rows], shard)
        results.append(torch.stack([logprob, entropies[0]]))
    logprob, entropy = torch.cat(results, dim=1)
    return Statistics(logprob, entropy, entropy.new_empty(0))


class _Call(NamedTuple):
    targets: Tensor
    objective: Objective
    shard: VocabShard
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    divergence: Divergence
    temperature: float
    tile_tokens: int

    def tiles(self, tokens: int) -> Iterator[tuple[slice, bool]]:
        """Row ranges and whether they are distilled: no tile straddles the border."""
        distilled = 0 if self.teacher_hidden is None else self.teacher_hidden.shape[0]
        for first, last, is_distilled in ((0, distilled, True), (distilled, tokens, False)):
            for start in range(first, last, self.tile_tokens):
                yield slice(start, min(start + self.tile_tokens, last)), is_distilled


class _FusedObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, call: _Call):
        needs_gradient = any(ctx.needs_input_grad)
        wide = _wide(hidden.dtype)
        tokens = hidden.shape[0]
        loss = hidden.new_zeros((), dtype=wide)
        logprob, entropy = hidden.new_zeros(2, tokens, dtype=wide)
        distilled = 0 if call.teacher_hidden is None else call.teacher_hidden.shape[0]
        divergence = hidden.new_zeros(distilled, dtype=wide)
        hidden_grad = torch.zeros_like(hidden) if needs_gradient else None
        weight_grad = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_gradient else None
        for rows, is_distilled in call.tiles(tokens):
            tile = _Tile(hidden[rows], weight, rows, is_distilled, call)
            logprob[rows], entropy[rows] = tile.logprob, tile.entropy
            if is_distilled:
                divergence[rows] = tile.divergence
            tile_loss, logits_grad = tile.evaluate(call)
            loss += tile_loss
            if needs_gradient:
                width = call.shard.width
                narrow = logits_grad.to(hidden.dtype)
                hidden_grad[rows] = narrow @ weight[:width]
                weight_grad[:width] += narrow.t() @ hidden[rows]
        if needs_gradient:
            ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        ctx.mark_non_differentiable(logprob, entropy, divergence)
        return loss, logprob, entropy, divergence

    @staticmethod
    def backward(ctx, loss_grad: Tensor, *_):
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * loss_grad, weight_grad * loss_grad, None


class _Tile:
    """Statistics of one tile, kept as long as its gradient needs them."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: slice, is_distilled: bool, call: _Call):
        self.rows, self.targets = rows, call.targets[rows]
        logits = [_logits(hidden, weight, call.shard, call.temperature)]
        if is_distilled:
            logits.append(_logits(call.teacher_hidden[rows], call.teacher_weight, call.shard, call.temperature))
        logps, entropies, self.logprob = _log_softmax(logits, self.targets, call.shard)
        self.logp, self.entropy, self.divergence = logps[0], entropies[0], None
        if is_distilled:
            shard, kind = call.shard, call.divergence
            if kind.top_k is None:
                result = divergences.full(*logps, kind, shard.group)
            else:
                result = divergences.top_k(*logps, kind, shard.start, shard.vocab_size, shard.group)
            self.divergence, self.divergence_grad = result

    def evaluate(self, call: _Call) -> tuple[Tensor, Tensor]:
        """The objective of this tile and its gradient with respect to the tile's raw logits, [n, width]."""
        with torch.enable_grad():
            logprob = self.logprob.detach().requires_grad_()
            divergence = None if self.divergence is None else self.divergence.detach().requires_grad_()
            loss = call.objective(self.rows, logprob, divergence)
            inputs = [logprob] if divergence is None else [logprob, divergence]
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        # d log p(y) / dz = 1[y] - p
        logits_grad = self.logp.exp().mul_(-gradients[0][:, None])
        mine, column = _own_columns(self.targets, call.shard)
        if call.shard.width:
            logits_grad.scatter_add_(1, column[:, None], (gradients[0] * mine)[:, None])
        if divergence is not None:
            logits_grad.addcmul_(self.divergence_grad, gradients[1][:, None])
        return loss.detach(), logits_grad.div_(call.temperature)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    """[n, width] logits of the real columns, upcast here and not before."""
    logits = (hidden @ weight[: shard.width].t()).to(_wide(hidden.dtype))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _own_columns(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Which targets this shard holds, and their columns (0 for the others)."""
    column = targets - shard.start
    mine = (column >= 0) & (column < shard.width)
    return mine, column * mine


def _log_softmax(logits: list[Tensor], targets: Tensor | None, shard: VocabShard) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """log softmax over all shards of each tensor, their entropies, and the first one's log-probability of the targets.

    Two all-reduces in all: the row maxima, then sums of exponentials, entropies' numerators and target logits.
    """
    empty = shard.width == 0
    maxima = torch.stack([z.new_full((z.shape[0],), -math.inf) if empty else z.amax(1) for z in logits])
    all_reduce(maxima, shard.group, dist.ReduceOp.MAX)
    shifted = [z.sub_(m[:, None]) for z, m in zip(logits, maxima, strict=True)]
    sums = []
    for z in shifted:
        exponentials = z.exp()
        sums += [exponentials.sum(1), exponentials.mul_(z.clamp(min=-1e30)).sum(1)]  # 0 · -inf would be NaN
    target_logit = torch.zeros_like(maxima[0])
    if targets is not None and not empty:
        mine, column = _own_columns(targets, shard)
        target_logit = torch.where(mine, shifted[0].gather(1, column[:, None])[:, 0], target_logit)
    *sums, target_logit = all_reduce(torch.stack([*sums, target_logit]), shard.group)
    log_sums = [total.log() for total in sums[0::2]]
    entropies = [log_sum - weighted / total for log_sum, weighted, total in zip(log_sums, sums[1::2], sums[0::2], strict=True)]
    logps = [z.sub_(log_sum[:, None]) for z, log_sum in zip(shifted, log_sums, strict=True)]
    return logps, entropies, target_logit if targets is None else target_logit - log_sums[0]
