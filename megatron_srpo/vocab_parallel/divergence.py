"""A divergence on its support: value and gradient on a tile of log-probs (docs/method.md, section 2)."""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.vocab_parallel.divergences import Formula, formula, names
from megatron_srpo.vocab_parallel.shard import VocabShard, all_reduce, gather, local_columns

Support = Literal["full", "student_topk", "teacher_topk", "sampled"]


class Divergence(NamedTuple):
    """A divergence and the support on which it is computed.

    Attributes:
        name: A module of `divergences`.
        alpha: Parameter of jsd, unused by the others.
        support: "full" is exact. "student_topk" and "teacher_topk" keep one side's `top_k` likeliest ids and
            put the rest of both distributions into one tail bucket, which gives a lower bound. "sampled" uses
            only the target y, drawn from p: D = log p(y) - log q(y) with the gradient D · d log p(y)/dz, both
            unbiased estimates for KL(p‖q).
        top_k: K, the number of ids in the head.
    """

    name: str = "jsd"
    alpha: float = 0.5
    support: Support = "full"
    top_k: int = 100

    @property
    def formula(self) -> Formula:
        """The value and gradient formulas of this divergence."""
        return formula(self.name)

    def has_tail(self, vocab_size: int) -> bool:
        """Return True if ids outside the top K form a tail bucket."""
        return self.support.endswith("topk") and self.top_k < vocab_size

    def validate(self) -> None:
        """Raise ValueError if the fields are out of range or contradict each other."""
        if self.name not in names() or self.support not in get_args(Support):
            expected = f"expected one of {names()} on one of {get_args(Support)}"
            raise ValueError(f"divergence: {self.name!r} on {self.support!r}: {expected}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"divergence: alpha {self.alpha}: expected 0 < α < 1 (forward, reverse are KL)")
        if self.support == "sampled" and self.name != "reverse":
            raise ValueError(f"divergence: {self.name} on sampled tokens: expected reverse")
        if self.support.endswith("topk") and self.top_k < 1:
            raise ValueError(f"divergence: top_k {self.top_k}: expected at least 1")


def divergence_on_tile(
    logp: Tensor, logq: Tensor, divergence: Divergence, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Compute D [n] and dD/dz [n, width] from [n, width] log p and log q, on the full support or a top K.

    Collectives: one all-reduce of [2, n] on the full support; with a tail, two all-gathers of [n, K] per rank
    and all-reduces of [2, n, K] and twice [2, n]. Memory: about six times the size of `logp`.
    """
    if divergence.has_tail(shard.vocab_size):
        return _with_tail(logp, logq, divergence, shard)
    terms, pf = divergence_terms(logp, logq, divergence)
    value, mean = all_reduce(torch.stack([terms.sum(1), pf.sum(1)]), shard.group)
    if divergence.formula.mean_is_zero:
        mean.zero_()
    return value, pf - logp.exp() * mean[:, None]


def divergence_terms(logp: Tensor, logq: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Return each column's term of D and its p·f, shaped like `logp`; exactly 0 where p = q, also for 0."""
    p, q = logp.exp(), logq.exp()
    difference = torch.where(logp == logq, torch.zeros_like(logp), logq - logp)  # not -inf - -inf
    return divergence.formula.terms(p, q, difference, divergence.alpha)


def _with_tail(
    logp: Tensor, logq: Tensor, divergence: Divergence, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    ids = top_ids(logp if divergence.support == "student_topk" else logq, divergence.top_k, shard)
    is_local, columns = local_columns(ids, shard)
    p = logp.exp()
    if shard.width:
        head = torch.stack([logp.gather(1, columns), logq.gather(1, columns)]).masked_fill(~is_local, 0.0)
        in_head = torch.zeros_like(logp).scatter_add_(1, columns, is_local.to(logp.dtype)).bool()
    else:
        head, in_head = logp.new_zeros(2, *ids.shape), torch.zeros_like(logp).bool()
    all_reduce(head, shard.group)
    tails = log_sum_exp(torch.stack([logp, logq]).masked_fill(in_head, -math.inf), shard.group)
    buckets = torch.cat([head, tails[..., None]], dim=2)  # [2, n, K + 1]
    terms, pf = divergence_terms(buckets[0], buckets[1], divergence)
    mean = pf.sum(1, keepdim=True)
    share = (logp - tails[0][:, None].clamp(min=-1e30)).exp()  # p_v / P_tail; the tail may be empty
    gradient = share * pf[:, -1:]
    if shard.width:
        head_gradient = torch.zeros_like(logp).scatter_add_(1, columns, pf[:, :-1] * is_local)
        gradient = torch.where(in_head, head_gradient, gradient)
    return terms.sum(1), gradient - p * mean


def log_sum_exp(logs: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Reduce the last dimension over all shards' columns, of which this rank may have none.

    Collectives: two all-reduces.
    """
    largest = logs.amax(-1) if logs.shape[-1] else logs.new_full(logs.shape[:-1], -math.inf)
    largest = all_reduce(largest, group, dist.ReduceOp.MAX).clamp(min=-1e30)
    total = all_reduce((logs - largest[..., None]).exp().sum(-1), group)
    return largest + total.log()


def top_ids(logs: Tensor, k: int, shard: VocabShard) -> Tensor:
    """Return [n, k] ids of the k likeliest tokens over all shards, the same on every rank."""
    rows, width = logs.shape
    values, columns = logs.topk(min(k, width), dim=1) if width else (logs, logs.long())
    if not shard.is_split:
        return columns + shard.start
    padding = (0, k - values.shape[1])  # shards may be narrower than k: all-gather needs equal shapes
    values = torch.nn.functional.pad(values, padding, value=-math.inf)
    ids = torch.nn.functional.pad(columns + shard.start, padding, value=-1)
    all_values = gather(values, shard).transpose(0, 1).reshape(rows, -1)
    all_ids = gather(ids, shard).transpose(0, 1).reshape(rows, -1)
    # real ids must win against the padding, also those with log-prob -inf
    all_values = all_values.clamp(min=torch.finfo(values.dtype).min / 2)
    best = all_values.masked_fill(all_ids < 0, -math.inf).topk(k, dim=1).indices
    return all_ids.gather(1, best)
