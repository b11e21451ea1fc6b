"""`TileOps` on a CPU: in place in the logits' tiles, in blocks that stay in cache.

A tile is written and read in blocks of columns: the row sums follow each block's matrix product, and each
block's gradient precedes its two products, while the block is in L3. Elementwise work is done on a few rows
of a block at a time, whose intermediate results stay in L2.

exp is computed by exp2, which torch vectorises: with the multiplication it takes a third of exp's time.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.divergences import CpuBlock
from megatron_srpo.vocab_parallel.kernels.base import (
    FLOOR,
    TINY,
    ColumnBlock,
    GradTerms,
    WriteLogits,
    add_at,
    combine,
)

_BLOCK_COLUMNS = 8192  # columns of a tile processed together, for products of full speed
_LOG2_E = math.log2(math.e)
_PART_ELEMENTS = 1 << 16  # elements processed together, enough to hide torch's overhead of a call


class CpuTileOps:
    """`TileOps` for fp32 and float64 tiles, with three parts of scratch memory."""

    gradient_is_separate = False

    def __init__(self, width: int, dtype: torch.dtype, divergence: Divergence):
        self.divergence, self.width = divergence, width
        self.part_rows = _PART_ELEMENTS // max(1, min(width, _BLOCK_COLUMNS))
        self.scratch = torch.empty(3, self.part_rows, min(width, _BLOCK_COLUMNS), dtype=dtype)

    def _blocks(self) -> Iterator[slice]:
        """Yield the blocks of columns."""
        for start in range(0, self.width, _BLOCK_COLUMNS):
            yield slice(start, min(start + _BLOCK_COLUMNS, self.width))

    def _parts(self, count: int, columns: slice) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Yield some of a block's `count` rows, and three scratch tensors of the part's shape."""
        width = columns.stop - columns.start
        for start in range(0, count, self.part_rows):
            rows = slice(start, min(start + self.part_rows, count))
            yield rows, self.scratch[:, : rows.stop - start, :width].unbind()

    def row_sums(self, tiles: list[Tensor], write: WriteLogits, sums: Tensor) -> None:
        """Write the tiles and fill `sums` (see `TileOps`); logits of -inf become `FLOOR`."""
        self.tiles, self.distilled = tiles, False
        sums[0] = FLOOR
        if not self.width:
            return
        of_blocks = []
        for columns in self._blocks():
            of_blocks.append(torch.zeros_like(sums))
            for index, tile in enumerate(tiles):
                write(index, columns)
                self._block_sums(tile, columns, of_blocks[-1][:, index], needs_weighted=index == 0)
        for values, combined in zip(sums, combine(*torch.stack(of_blocks, 1)), strict=True):
            values.copy_(combined)

    def _block_sums(self, tile: Tensor, columns: slice, sums: Tensor, needs_weighted: bool) -> None:
        for rows, (x, exponential, _) in self._parts(len(tile), columns):
            z = tile[rows, columns].clamp_(min=FLOOR)
            maximum = torch.amax(z, 1, out=sums[0, rows])
            _exp(torch.sub(z, maximum[:, None], out=x), exponential)
            torch.sum(exponential, 1, out=sums[1, rows])
            if needs_weighted:
                torch.sum(exponential.mul_(x), 1, out=sums[2, rows])

    def divergence_sums(self, tiles: list[Tensor], maximum: Tensor, total: Tensor) -> Tensor:
        """Return the sums (see `TileOps`); leave -p·f in the student's tile and p in the teacher's."""
        self.distilled = True
        maximum, scale = maximum[..., None], total.reciprocal()[..., None]
        difference = (total[0] / total[1]).log()[:, None]
        sums = tiles[0].new_zeros(2, len(tiles[0]))
        student_sum, teacher_sum = torch.zeros_like(sums)
        for columns in self._blocks():
            for rows, (x, y, q) in self._parts(len(tiles[0]), columns):
                student, teacher = tiles[0][rows, columns], tiles[1][rows, columns]
                torch.sub(student, maximum[0, rows], out=x)
                torch.sub(teacher, maximum[1, rows], out=y)
                _exp(y, q).mul_(scale[1, rows])
                p = _exp(x, teacher).mul_(scale[0, rows])
                block = CpuBlock(p, q, x, y, difference[rows], student, teacher_sum[rows])
                self.divergence.formula.on_cpu(block, self.divergence.alpha)
                torch.sum(student, 1, out=student_sum[rows])
                sums[:, rows] += torch.stack([-student_sum[rows], teacher_sum[rows]])
        return sums

    def gradient(self, terms: GradTerms, maximum: Tensor, total: Tensor) -> Iterator[ColumnBlock]:
        """Write the gradient into the student's tile, and yield it by blocks."""
        for columns in self._blocks():
            block = self.tiles[0][:, columns]
            for rows, (x, y, _) in self._parts(len(block), columns):
                p_scale = terms.p_scale[rows, None]
                pf_scale = None if terms.pf_scale is None else terms.pf_scale[rows, None]
                plogp_scale = None if terms.plogp_scale is None else terms.plogp_scale[rows, None]
                if self.distilled:
                    p = self.tiles[1][rows, columns]
                    _distilled_gradient(block[rows], p, x, p_scale, pf_scale, plogp_scale)
                else:
                    own = maximum[0, rows, None], total[0, rows, None]
                    _gradient(block[rows], x, y, *own, p_scale, plogp_scale)
            add_at(block, columns, terms.target_columns[:, None], terms.target_grad[:, None])
            yield columns, block


def _exp(x: Tensor, out: Tensor) -> Tensor:
    return torch.mul(x, _LOG2_E, out=out).exp2_()


def _distilled_gradient(
    pf: Tensor,
    p: Tensor,
    scratch: Tensor,
    p_scale: Tensor,
    pf_scale: Tensor | None,
    plogp_scale: Tensor | None,
) -> None:
    """Write the gradient (see `GradTerms`) to `pf`, which holds -p·f; the scales are [n, 1]."""
    if pf_scale is None:
        torch.mul(p, p_scale, out=pf)
    else:
        pf.mul_(-pf_scale).addcmul_(p, p_scale)
    if plogp_scale is not None:
        pf.add_(torch.clamp(p, min=TINY, out=scratch).log_().mul_(p).mul_(plogp_scale))


def _gradient(
    z: Tensor,
    x: Tensor,
    p: Tensor,
    maximum: Tensor,
    total: Tensor,
    p_scale: Tensor,
    plogp_scale: Tensor | None,
) -> None:
    """Write the gradient (see `GradTerms`) to `z`, which holds the logits; `x` and `p` are scratch memory."""
    _exp(torch.sub(z, maximum, out=x), p).div_(total)
    torch.mul(p, p_scale, out=z)
    if plogp_scale is not None:
        z.add_(x.sub_(total.log()).mul_(p).mul_(plogp_scale))
