"""Student–teacher divergences on one tile of log-probabilities, with closed-form gradients (METHOD.md §2).

p is the student, q the teacher, both normalised over the full vocabulary. Every divergence here has the gradient

    dD/dz_v = p_v (f_v - Σ_u p_u f_u)

with respect to the student's logits z, where f is its log-ratio: log p - log q for KL(p‖q), -q/p for KL(q‖p), and
(1-α)(log p - log m) for JSD_α. The constant terms of dD/dp drop out of it.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.vocab_parallel.shard import all_reduce


class Divergence(NamedTuple):
    """Which divergence, on which support.

    kind: "jsd" = (1-α) KL(p‖m) + α KL(q‖m), m = (1-α)p + αq; "forward" = KL(q‖p); "reverse" = KL(p‖q).
    top_k: None for the full vocabulary, else the student's top K ids and one tail bucket with the rest of the mass.
    """

    kind: Literal["jsd", "forward", "reverse"] = "jsd"
    alpha: float = 0.5
    top_k: int | None = None


def _terms(logp: Tensor, logq: Tensor, kind: Divergence) -> tuple[Tensor, Tensor]:
    """Per-column addends of D, and p·f, both shaped like `logp`. Columns where p = q = 0 give zeros."""
    p, q = logp.exp(), logq.exp()
    if kind.kind == "forward":
        return q * _difference(logq, logp), -q
    if kind.kind == "reverse":
        pf = p * _difference(logp, logq)
        return pf, pf
    logm = torch.logaddexp(logp + math.log1p(-kind.alpha), logq + math.log(kind.alpha))
    pf = (1 - kind.alpha) * p * _difference(logp, logm)
    return pf + kind.alpha * q * _difference(logq, logm), pf


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b with -inf - -inf = 0: a column that nobody can choose adds nothing."""
    return torch.where(a == -math.inf, torch.zeros_like(a), a - b)


def full(logp: Tensor, logq: Tensor, kind: Divergence, group) -> tuple[Tensor, Tensor]:
    """D over the full vocabulary and its gradient.

    Args:
        logp, logq: [n, width] this rank's columns of log p and log q (any width, also 0).

    Returns:
        D [n] and dD/dz [n, width]. One all-reduce of [2, n].
    """
    terms, pf = _terms(logp, logq, kind)
    sums = all_reduce(torch.stack([terms.sum(1), pf.sum(1)]), group)
    return sums[0], pf - logp.exp() * sums[1, :, None]


def top_k(logp: Tensor, logq: Tensor, kind: Divergence, start: int, vocab_size: int, group) -> tuple[Tensor, Tensor]:
    """D over the student's top K ids and a tail bucket, and its gradient; K >= vocabulary is the full divergence.

    Args:
        logp, logq: [n, width] this rank's columns, the first of which is id `start`.

    Returns:
        D [n] and dD/dz [n, width]. Two all-gathers of [n, K] a rank, and all-reduces of [2, n, K] and
        twice [2, n].
    """
    if kind.top_k >= vocab_size:
        return full(logp, logq, kind, group)
    ids = _global_top_ids(logp, kind.top_k, start, group)
    local = ids - start
    mine = (local >= 0) & (local < logp.shape[1])
    p = logp.exp()
    if logp.shape[1]:
        column = local.clamp(0, logp.shape[1] - 1)
        chosen = torch.stack([logp.gather(1, column), logq.gather(1, column)]) * mine
        in_head = torch.zeros_like(logp).scatter_add_(1, column, mine.to(logp.dtype)).bool()
    else:
        chosen, in_head = logp.new_zeros(2, *ids.shape), torch.zeros_like(logp).bool()
    all_reduce(chosen, group)
    tails = _log_sum_exp(torch.stack([logp, logq]).masked_fill(in_head, -math.inf), group)
    buckets = torch.cat([chosen, tails[..., None]], dim=2)  # [2, n, K + 1]
    terms, pf = _terms(buckets[0], buckets[1], kind)
    mean = pf.sum(1, keepdim=True)
    gradient = (logp - tails[0][:, None]).exp() * pf[:, -1:]
    if logp.shape[1]:
        head = torch.zeros_like(logp).scatter_add_(1, column, pf[:, :-1] * mine)
        gradient = torch.where(in_head, head, gradient)
    return terms.sum(1), gradient - p * mean


def _log_sum_exp(logs: Tensor, group) -> Tensor:
    largest = logs.amax(-1) if logs.shape[-1] else logs.new_full(logs.shape[:-1], -math.inf)
    largest = all_reduce(largest, group, dist.ReduceOp.MAX).clamp(min=-1e30)
    total = all_reduce((logs - largest[..., None]).exp().sum(-1), group)
    return largest + total.log()


def _global_top_ids(logp: Tensor, k: int, start: int, group) -> Tensor:
    """[n, k] ids of the k most likely tokens over all shards, the same on every rank."""
    rows, width = logp.shape
    values, columns = logp.topk(min(k, width), dim=1) if width else (logp, logp.long())
    if group is None or dist.get_world_size(group) == 1:
        return columns + start
    short = k - values.shape[1]  # shards may be narrower than k: all-gather wants equal shapes
    values = torch.nn.functional.pad(values, (0, short), value=-math.inf).contiguous()
    ids = torch.nn.functional.pad(columns + start, (0, short), value=-1).contiguous()
    world = dist.get_world_size(group)
    all_values, all_ids = values.new_empty(world * rows, k), ids.new_empty(world * rows, k)
    dist.all_gather_into_tensor(all_values, values, group=group)
    dist.all_gather_into_tensor(all_ids, ids, group=group)
    by_row = lambda gathered: gathered.view(world, rows, k).transpose(0, 1).reshape(rows, world * k)  # noqa: E731
    best = by_row(all_values).topk(k, dim=1).indices
    return by_row(all_ids).gather(1, best)
