"""One tile of tokens on the full vocabulary: what is said between ranks, and the algebra around the
elementwise passes.

With z the student's logits, p = softmax z, q the teacher's, H the entropy of p, y the target, D the
divergence with its log-ratio f (see `divergence.py`), the gradient of any function of log p(y), H and D is

    dL/dz_v = g_logp (1[v = y] - p_v) - g_H p_v (log p_v + H) + g_D p_v (f_v - Σ_u p_u f_u)

The passes over [n, width] are a device's: `CpuPasses`, `TritonPasses`. Here are only vectors of length n, and
at most two collectives a tile: every rank's row sums (its own maximum, Σ exp, Σ exp·z and the target's logit,
from which any rank works out the softmax over all columns), then every rank's part of the divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.shard import VocabShard, gather, local_columns

FLOOR = -1e30  # stands for logits of -inf: a probability of exactly 0, without NaN


class Passes(Protocol):
    """The elementwise work on a tile. `tiles` are [student] or [student, teacher], [n, width] each; they may
    be overwritten.

    name: for the log. gradient_is_separate: the gradient outlives the next tile's logits.
    """

    name: str
    gradient_is_separate: bool

    def row_sums(self, tiles: list[Tensor], sums: Tensor) -> None:
        """Fill sums [3, tiles, n] with m = max z, Σ exp(z - m) and, for the student, Σ exp(z - m)(z - m) of
        these columns.
        """

    def divergence_sums(self, tiles: list[Tensor], maximum: Tensor, total: Tensor) -> Tensor:
        """[2, n] Σ p f (without JSD's 1-α) and, for JSD and forward KL, the teacher's Σ q (log q - log m or
        p).

        maximum, total: [tiles, n]; p = exp(z - maximum) / total over all ranks' columns. In fp32 that is
        three times as exact as the exponential of z - maximum - log total, whose roundings are of numbers
        larger than the differences of interest.
        """

    def gradient(
        self,
        scales: tuple[Tensor | None, Tensor, Tensor | None],
        maximum: Tensor,
        total: Tensor,
        column: Tensor,
        of_target: Tensor,
    ) -> Tensor:
        """[n, width] a · p f + b · p + c · p log p for contiguous scales (a, b, c), plus `of_target` in each
        row's `column` (-1: in none).

        a is None without a divergence, c where the entropy has no gradient. maximum, total: as above.
        """


class ExactKernel:
    """Statistics of one tile at a time and the gradient of its logits, on the full support or the sampled
    token.
    """

    def __init__(self, passes: Passes, shard: VocabShard, divergence: Divergence):
        self.passes, self.shard, self.divergence = passes, shard, divergence
        self.name, self.gradient_is_separate = passes.name, passes.gradient_is_separate

    def statistics(
        self, tiles: list[Tensor], targets: Tensor | None, meanwhile: Callable[[], None]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """log p(target) (zeros without targets), entropy of p, and D (None without a teacher), [n] each.

        Args:
            tiles: [n, width] logits of the student and, to distil, the teacher; overwritten.
            meanwhile: called while each collective is under way.
        """
        local = tiles[0].new_zeros(4, len(tiles), len(tiles[0]))
        self._target_logits(tiles, targets, local[3])
        self.passes.row_sums(tiles, local[:3])
        maxima, totals, weighted, targeted = gather(local, self.shard, meanwhile).unbind(
            1
        )  # [ranks, tiles, n] each
        maximum, total, weighted = combine(maxima, totals, weighted)
        log_total = total.log()
        self.maximum, self.total = maximum, total
        self.entropy = log_total[0] - weighted[0] / total[0]
        logprob = targeted.sum(0) - maximum - log_total if targets is not None else torch.zeros_like(maximum)
        return (
            logprob[0],
            self.entropy,
            self._divergence(tiles, logprob, meanwhile) if len(tiles) == 2 else None,
        )

    def _target_logits(self, tiles: list[Tensor], targets: Tensor | None, logits: Tensor) -> None:
        """Fill logits [tiles, n] with the targets' where this shard has them (else they stay 0), and
        remember their columns.
        """
        self.column = tiles[0].new_full((len(tiles[0]),), -1, dtype=torch.int64)
        if targets is not None and self.shard.width:
            mine, column = local_columns(targets, self.shard)
            self.column = torch.where(mine, column, -1)
            for tile, logit in zip(tiles, logits, strict=True):
                logit.copy_(torch.where(mine, tile.gather(1, column[:, None])[:, 0].clamp(min=FLOOR), 0.0))

    def _divergence(self, tiles: list[Tensor], logprob: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        if self.divergence.support == "sampled":
            self.log_ratio = logprob[0] - logprob[1]
            return self.log_ratio
        sums = self.passes.divergence_sums(tiles, self.maximum, self.total)
        of_student, of_teacher = gather(sums, self.shard, meanwhile).sum(0)
        alpha = self.divergence.alpha
        if self.divergence.name == "jsd":
            self.mean = of_student
            return (1 - alpha) * of_student + alpha * of_teacher
        if self.divergence.name == "reverse":
            self.mean = of_student
            return of_student
        self.mean = torch.zeros_like(of_student)  # Σ p - Σ q, without its rounding
        return of_teacher

    def logits_grad(
        self, logprob_grad: Tensor | None, entropy_grad: Tensor | None, divergence_grad: Tensor | None
    ) -> Tensor:
        """[n, width] gradient with respect to the last tile's logits, from those of its statistics, [n] or
        None for zeros.

        It lives in the passes' buffers until the next gradient, and only until the next statistics where it
        is not separate.
        """
        target = torch.zeros_like(self.entropy) if logprob_grad is None else logprob_grad
        if divergence_grad is not None and self.divergence.support == "sampled":
            target, divergence_grad = target + divergence_grad * self.log_ratio, None
        of_p, of_pf, of_plogp = -target, None, None
        if entropy_grad is not None:
            of_p, of_plogp = of_p - entropy_grad * self.entropy, -entropy_grad
        if divergence_grad is not None:
            of_pf = (
                divergence_grad * (1 - self.divergence.alpha)
                if self.divergence.name == "jsd"
                else divergence_grad
            )
            of_p = of_p - of_pf * self.mean
        return self.passes.gradient((of_pf, of_p, of_plogp), self.maximum, self.total, self.column, target)


def combine(maxima: Tensor, totals: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums of several parts of the columns, [parts, …] each, as those of all: m, Σ exp(z - m), Σ exp(z -
    m)(z - m).
    """
    maximum = maxima.amax(0)
    shift = maxima - maximum
    factor = shift.exp()
    return maximum, (factor * totals).sum(0), (factor * (weighted + shift * totals)).sum(0)
