"""The elementwise passes on a CPU: in place in the logits' tiles, a few rows at a time, while they are in
cache.

A pass over a whole tile in fresh memory costs a page fault every 4 KiB and the bandwidth of DRAM; a row of
152,000 fp32 columns (600 KB) stays in L2 and L3 through all the operations on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.kernels.exact import FLOOR

_ROW_NUMBERS = 1 << 17  # elements handled together: several short rows, or one long one
_TINY = 1e-37  # for logarithms of 0 and of 0/0, where the factor before them is 0


class CpuPasses:
    """For fp32 and float64 tiles.

    Extra memory: three rows (or as many short ones as make `_ROW_NUMBERS` elements).
    """

    name = "CPU, row by row in cache"
    gradient_is_separate = False

    def __init__(self, width: int, dtype: torch.dtype, divergence: Divergence):
        self.divergence = divergence
        self.rows = max(1, _ROW_NUMBERS // max(width, 1))
        self.scratch = torch.empty(3, self.rows, width, dtype=dtype)

    def _blocks(self, count: int):
        return (slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows))

    def row_sums(self, tiles: list[Tensor], sums: Tensor) -> None:
        """See `Passes`. Leaves z - m in the tiles, m the maximum of these columns."""
        self.tiles, self.own_maximum, self.distilled = tiles, sums[0], False
        sums[0] = FLOOR
        if not tiles[0].shape[1]:
            return
        for number, tile in enumerate(tiles):
            for rows in self._blocks(len(tile)):
                block = tile[rows]
                maximum = torch.amax(block.clamp_(min=FLOOR), 1, out=sums[0, number, rows])
                exponential = torch.exp(block.sub_(maximum[:, None]), out=self.scratch[0, : len(block)])
                torch.sum(exponential, 1, out=sums[1, number, rows])
                if number == 0:
                    torch.sum(exponential.mul_(block), 1, out=sums[2, 0, rows])

    def divergence_sums(self, tiles: list[Tensor], maximum: Tensor, total: Tensor) -> Tensor:
        """See `Passes`. Leaves p·f in the student's tile and p in the teacher's."""
        self.distilled = True
        scale, shift = self._normalisers(maximum, total)
        sums = tiles[0].new_zeros(2, len(tiles[0]))
        name, alpha = self.divergence.name, self.divergence.alpha
        for rows in self._blocks(len(tiles[0])):
            x, y = tiles[0][rows], tiles[1][rows]  # log p = x - shift, p = scale · exp x
            q, m, p = (buffer[: len(x)] for buffer in self.scratch)
            torch.exp(y, out=q).mul_(scale[1, rows])
            if name == "jsd":  # log(p / m), not log p - log m: exactly 0 where p = q
                terms, p = p, torch.exp(x, out=y).mul_(scale[0, rows])
                torch.lerp(p, q, alpha, out=m).add_(_TINY)
                torch.add(q, _TINY, out=terms).div_(m).log_().mul_(q)
                torch.sum(terms, 1, out=sums[1, rows])
                torch.add(p, _TINY, out=x).div_(m).log_().mul_(p)
            else:
                torch.exp(x, out=p).mul_(scale[0, rows])
                difference = shift[0, rows] - shift[1, rows]
                if name == "reverse":
                    x.sub_(y).sub_(difference).mul_(p)
                else:
                    torch.sum(y.sub_(x).add_(difference).mul_(q), 1, out=sums[1, rows])
                    torch.sub(p, q, out=x)
                y.copy_(p)
            torch.sum(x, 1, out=sums[0, rows])
        return sums

    def _normalisers(self, maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift), [tiles, n, 1] each: p = scale · exp x and log p = x - shift for the x = z - m left
        in the tiles.
        """
        above = maximum - self.own_maximum
        return ((-above).exp() / total)[..., None], (above + total.log())[..., None]

    def gradient(
        self,
        scales: tuple[Tensor | None, Tensor, Tensor | None],
        maximum: Tensor,
        total: Tensor,
        column: Tensor,
        of_target: Tensor,
    ) -> Tensor:
        """See `Passes`. In the student's tile."""
        gradient = self.tiles[0]
        of_pf, of_p, of_plogp = (None if scale is None else scale[:, None] for scale in scales)
        scale, shift = (of_tiles[0] for of_tiles in self._normalisers(maximum, total))
        for rows in self._blocks(len(gradient)):
            x, plogp = gradient[rows], self.scratch[0, : len(gradient[rows])]
            if self.distilled:
                p = self.tiles[1][rows]
                if of_plogp is not None:
                    torch.clamp(p, min=_TINY, out=plogp).log_().mul_(p).mul_(of_plogp[rows])
                if of_pf is None:
                    torch.mul(p, of_p[rows], out=x)
                else:
                    x.mul_(of_pf[rows]).addcmul_(p, of_p[rows])
            else:
                if of_plogp is not None:
                    torch.sub(x, shift[rows], out=plogp).mul_(
                        torch.exp(x, out=self.scratch[1, : len(x)])
                    ).mul_(scale[rows] * of_plogp[rows])
                x.exp_().mul_(scale[rows] * of_p[rows])
            if of_plogp is not None:
                x.add_(plogp)
        if gradient.shape[1]:
            gradient.scatter_add_(1, column.clamp(min=0)[:, None], (of_target * (column >= 0))[:, None])
        return gradient
