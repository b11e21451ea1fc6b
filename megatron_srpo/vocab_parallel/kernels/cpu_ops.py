"""`TileOps` on a CPU: in place in the logits' tiles, a few rows at a time, while they are in cache.

A pass over an entire tile in fresh memory costs a page fault per 4 KiB and DRAM bandwidth; a row of 152,000
fp32 columns (600 KB) stays in L2 and L3 during all operations on it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.divergences import CpuBlock
from megatron_srpo.vocab_parallel.kernels.base import FLOOR, TINY, GradTerms

_BLOCK_ELEMENTS = 1 << 17  # elements processed together: several short rows, or one long one


class CpuTileOps:
    """`TileOps` for fp32 and float64 tiles, with three rows (or blocks of short ones) of scratch memory."""

    gradient_is_separate = False

    def __init__(self, width: int, dtype: torch.dtype, divergence: Divergence):
        self.divergence = divergence
        self.block_rows = max(1, _BLOCK_ELEMENTS // max(width, 1))
        self.scratch = torch.empty(3, self.block_rows, width, dtype=dtype)

    def _blocks(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.block_rows):
            yield slice(start, min(start + self.block_rows, count))

    def row_sums(self, tiles: list[Tensor], sums: Tensor) -> None:
        """Fill `sums` (see `TileOps`); leave z - m in the tiles, with m the maximum over local columns."""
        self.tiles, self.local_maximum, self.distilled = tiles, sums[0], False
        sums[0] = FLOOR
        if not tiles[0].shape[1]:
            return
        for index, tile in enumerate(tiles):
            for rows in self._blocks(len(tile)):
                block = tile[rows]
                maximum = torch.amax(block.clamp_(min=FLOOR), 1, out=sums[0, index, rows])
                exponential = torch.exp(block.sub_(maximum[:, None]), out=self.scratch[0, : len(block)])
                torch.sum(exponential, 1, out=sums[1, index, rows])
                if index == 0:
                    torch.sum(exponential.mul_(block), 1, out=sums[2, 0, rows])

    def divergence_sums(self, tiles: list[Tensor], maximum: Tensor, total: Tensor) -> Tensor:
        """Return the sums (see `TileOps`); leave p·f in the student's tile and p in the teacher's."""
        self.distilled = True
        scale, shift = self._normalizers(maximum, total)
        sums = tiles[0].new_zeros(2, len(tiles[0]))
        for rows in self._blocks(len(tiles[0])):
            x, y = tiles[0][rows], tiles[1][rows]  # log p = x - shift, p = scale · exp x
            q, *free = self.scratch[:, : len(x)]
            torch.exp(y, out=q).mul_(scale[1, rows])
            difference = shift[0, rows] - shift[1, rows]
            block = CpuBlock(x, y, q, (free[0], free[1]), scale[0, rows], difference, sums[1, rows])
            self.divergence.formula.on_cpu(block, self.divergence.alpha)
            torch.sum(x, 1, out=sums[0, rows])
        return sums

    def _normalizers(self, maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, shift), [tiles, n, 1] each: p = scale · exp x, log p = x - shift, x = z - m."""
        above = maximum - self.local_maximum
        return ((-above).exp() / total)[..., None], (above + total.log())[..., None]

    def gradient(self, terms: GradTerms, maximum: Tensor, total: Tensor) -> Tensor:
        """Write the gradient into the student's tile, and return that."""
        gradient = self.tiles[0]
        p_scale = terms.p_scale[:, None]
        pf_scale = None if terms.pf_scale is None else terms.pf_scale[:, None]
        plogp_scale = None if terms.plogp_scale is None else terms.plogp_scale[:, None]
        scale, shift = (of_tiles[0] for of_tiles in self._normalizers(maximum, total))
        for rows in self._blocks(len(gradient)):
            x = gradient[rows]
            plogp, exponential, _ = self.scratch[:, : len(x)]
            if self.distilled:
                p = self.tiles[1][rows]
                if plogp_scale is not None:
                    torch.clamp(p, min=TINY, out=plogp).log_().mul_(p).mul_(plogp_scale[rows])
                if pf_scale is None:
                    torch.mul(p, p_scale[rows], out=x)
                else:
                    x.mul_(pf_scale[rows]).addcmul_(p, p_scale[rows])
            else:
                if plogp_scale is not None:
                    torch.exp(x, out=exponential)
                    torch.sub(x, shift[rows], out=plogp).mul_(exponential)
                    plogp.mul_(scale[rows] * plogp_scale[rows])
                x.exp_().mul_(scale[rows] * p_scale[rows])
            if plogp_scale is not None:
                x.add_(plogp)
        if gradient.shape[1]:
            is_local, columns = terms.target_columns >= 0, terms.target_columns.clamp(min=0)
            gradient.scatter_add_(1, columns[:, None], (terms.target_grad * is_local)[:, None])
        return gradient
