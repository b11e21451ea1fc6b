"""Student–teacher divergences on one tile of log-probabilities, with closed-form gradients (METHOD.md §2).

p is the student, q the teacher, both normalised over the full vocabulary. Every divergence here has the
gradient

    dD/dz_v = p_v (f_v - Σ_u p_u f_u)

with respect to the student's logits z, where f is its log-ratio: log p - log q for KL(p‖q), 1 - q/p for
KL(q‖p), and (1-α)(log p - log m) for JSD_α. Constants in f drop out; with these, f is exactly 0 where p = q.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.vocab_parallel.shard import VocabShard, all_reduce, gather

Support = Literal["full", "student_topk", "teacher_topk", "sampled"]


class Divergence(NamedTuple):
    """Which divergence, on which support.

    name: "jsd" = (1-α) KL(p‖m) + α KL(q‖m), m = (1-α)p + αq; "forward" = KL(q‖p); "reverse" = KL(p‖q).
    support: "full" is exact. "student_topk" and "teacher_topk" keep the `top_k` likeliest ids of one side and
    put the rest
        of both distributions into one tail bucket: a lower bound. "sampled" knows only the target y, drawn
        from p: D = log p(y) - log q(y), with the gradient D · d log p(y)/dz, both unbiased estimates of
        KL(p‖q)'s.
    """

    name: Literal["jsd", "forward", "reverse"] = "jsd"
    alpha: float = 0.5
    support: Support = "full"
    top_k: int = 100

    @property
    def problem(self) -> str | None:
        """What is wrong with this combination, or None."""
        if self.name not in ("jsd", "forward", "reverse") or self.support not in Support.__args__:
            return f"divergence: {self.name!r} on {self.support!r}: expected jsd, forward or reverse on one of {Support.__args__}"
        if self.name == "jsd" and not 0 < self.alpha < 1:
            return f"divergence: alpha {self.alpha}: expected 0 < α < 1 (the limits are 0; KL is forward and reverse)"
        if self.support == "sampled" and self.name != "reverse":
            return f"divergence: {self.name} on sampled tokens: one sample estimates the reverse KL only"
        if self.support.endswith("topk") and self.top_k < 1:
            return f"divergence: top_k {self.top_k}: expected at least 1"
        return None


def on_tile(logp: Tensor, logq: Tensor, divergence: Divergence, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """D and its gradient on the full support or on a top K with its tail.

    Args:
        logp, logq: [n, width] this rank's columns of log p and log q (any width, also 0).

    Returns:
        D [n] and dD/dz [n, width]. Collectives: one of [2, n] on the full support; else two all-gathers of
        [n, K] a rank, and all-reduces of [2, n, K] and twice [2, n]. Memory: about six times the size of
        `logp`.
    """
    if divergence.support == "full" or divergence.top_k >= shard.vocab_size:
        terms, pf = addends(logp, logq, divergence)
        value, mean = all_reduce(torch.stack([terms.sum(1), pf.sum(1)]), shard.group)
        if divergence.name == "forward":
            mean.zero_()  # Σ p - Σ q, without its rounding
        return value, pf - logp.exp() * mean[:, None]
    return _with_tail(logp, logq, divergence, shard)


def addends(logp: Tensor, logq: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Per-column addends of D, and p·f, both shaped like `logp`; exact zeros where log p = log q or p = q =
    0.
    """
    p, q = logp.exp(), logq.exp()
    difference = torch.where(logp == logq, torch.zeros_like(logp), logq - logp)  # not -inf - -inf
    if divergence.name == "forward":
        return _times(q, difference), p - q
    if divergence.name == "reverse":
        pf = _times(p, -difference)
        return pf, pf
    # log m from the larger of the two: log m - log p = log(1 + α (q/p - 1)), which is exact near q = p
    ratio = torch.expm1(-difference.abs())
    over_p = torch.where(
        difference > 0,
        -difference - torch.log1p((1 - divergence.alpha) * ratio),
        -torch.log1p(divergence.alpha * ratio),
    )  # log p - log m
    over_q = torch.where(
        difference > 0,
        -torch.log1p((1 - divergence.alpha) * ratio),
        difference - torch.log1p(divergence.alpha * ratio),
    )  # log q - log m
    pf = (1 - divergence.alpha) * _times(p, over_p)
    return pf + divergence.alpha * _times(q, over_q), pf


def _times(probability: Tensor, log: Tensor) -> Tensor:
    """probability · log with 0 · inf = 0: what nobody can choose adds nothing."""
    return torch.where(probability == 0, torch.zeros_like(log), probability * log)


def _with_tail(
    logp: Tensor, logq: Tensor, divergence: Divergence, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    ids = top_ids(logp if divergence.support == "student_topk" else logq, divergence.top_k, shard)
    local = ids - shard.start
    mine = (local >= 0) & (local < logp.shape[1])
    p = logp.exp()
    if logp.shape[1]:
        column = local.clamp(0, logp.shape[1] - 1)
        chosen = torch.stack([logp.gather(1, column), logq.gather(1, column)]).masked_fill(~mine, 0.0)
        in_head = torch.zeros_like(logp).scatter_add_(1, column, mine.to(logp.dtype)).bool()
    else:
        chosen, in_head = logp.new_zeros(2, *ids.shape), torch.zeros_like(logp).bool()
    all_reduce(chosen, shard.group)
    tails = log_sum_exp(torch.stack([logp, logq]).masked_fill(in_head, -math.inf), shard.group)
    buckets = torch.cat([chosen, tails[..., None]], dim=2)  # [2, n, K + 1]
    terms, pf = addends(buckets[0], buckets[1], divergence)
    mean = pf.sum(1, keepdim=True)
    share = (logp - tails[0][:, None].clamp(min=-1e30)).exp()  # of the tail, which may hold nothing at all
    gradient = share * pf[:, -1:]
    if logp.shape[1]:
        head = torch.zeros_like(logp).scatter_add_(1, column, pf[:, :-1] * mine)
        gradient = torch.where(in_head, head, gradient)
    return terms.sum(1), gradient - p * mean


def log_sum_exp(logs: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Over the last dimension of all shards' columns, which may be none here.

    Two all-reduces of the result's shape.
    """
    largest = logs.amax(-1) if logs.shape[-1] else logs.new_full(logs.shape[:-1], -math.inf)
    largest = all_reduce(largest, group, dist.ReduceOp.MAX).clamp(min=-1e30)
    total = all_reduce((logs - largest[..., None]).exp().sum(-1), group)
    return largest + total.log()


def top_ids(logs: Tensor, k: int, shard: VocabShard) -> Tensor:
    """[n, k] ids of the k likeliest tokens over all shards, the same on every rank."""
    rows, width = logs.shape
    values, columns = logs.topk(min(k, width), dim=1) if width else (logs, logs.long())
    if not shard.is_split:
        return columns + shard.start
    short = k - values.shape[1]  # shards may be narrower than k: all-gather wants equal shapes
    values = torch.nn.functional.pad(values, (0, short), value=-math.inf)
    ids = torch.nn.functional.pad(columns + shard.start, (0, short), value=-1)
    by_row = lambda gathered: gathered.transpose(0, 1).reshape(rows, -1)  # noqa: E731
    # -inf columns of the vocabulary tie with the padding: real ids go first
    everyone = by_row(gather(values, shard)).clamp(min=torch.finfo(values.dtype).min / 2)
    all_ids = by_row(gather(ids, shard))
    best = everyone.masked_fill(all_ids < 0, -math.inf).topk(k, dim=1).indices
    return all_ids.gather(1, best)
