"""`TileOps` as Triton kernels: each reads a tile once, with one program per row (the gradient: per block).

Only the tiles themselves are kept between kernels: p, q and m are recomputed, which costs less than storing
them. With TRITON_INTERPRET=1 the kernels run on a CPU, as in the tests on machines without a GPU.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.kernels import base
from megatron_srpo.vocab_parallel.kernels.base import ColumnBlock, GradTerms, WriteLogits

FLOOR, TINY = tl.constexpr(base.FLOOR), tl.constexpr(base.TINY)
JSD, REVERSE, FORWARD, NONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_DIVERGENCES = {"jsd": 0, "reverse": 1, "forward": 2}
_BLOCK, _WARPS = 4096, 8


class TritonTileOps:
    """`TileOps` for fp32 tiles; holds a gradient [tile_tokens, width] in the dtype and device of `like`."""

    gradient_is_separate = True

    def __init__(self, tile_tokens: int, width: int, divergence: Divergence, like: Tensor):
        self.divergence = divergence
        self.gradient_buffer = like.new_empty(tile_tokens, width)

    def row_sums(self, tiles: list[Tensor], write: WriteLogits, sums: Tensor) -> None:
        """Fill the tiles and `sums` (see `TileOps`)."""
        self.tiles = tiles
        for index, tile in enumerate(tiles):
            write(index, slice(0, tile.shape[1]))
        for index, tile in enumerate(tiles):
            rows, constants = sums[:, index], _LAUNCH | {"WEIGHTED": index == 0}
            sizes = (rows.stride(0), tile.shape[1], tile.stride(0))
            _launch(_row_sums, (len(tile),), tile, rows, *sizes, **constants)

    def divergence_sums(self, tiles: list[Tensor], maximum: Tensor, total: Tensor) -> Tensor:
        """Return the sums (see `TileOps`); the tiles are unchanged."""
        student, teacher = tiles
        sums = student.new_empty(2, len(student))
        sizes, constants = (len(student), student.shape[1], student.stride(0)), self._constants()
        arguments = (student, teacher, maximum, total, sums, *sizes)
        _launch(_divergence_sums, (len(student),), *arguments, **constants)
        return sums

    def gradient(self, terms: GradTerms, maximum: Tensor, total: Tensor) -> list[ColumnBlock]:
        """Return the gradient as one block in a separate buffer, in the model's dtype."""
        student, teacher = self.tiles[0], self.tiles[-1]
        gradient = self.gradient_buffer[: len(student)]
        columns, target_grad, p_scale, pf_scale, plogp_scale = terms
        constants = self._constants() | {"ENTROPY": plogp_scale is not None}
        if pf_scale is None:
            pf_scale, constants["DIVERGENCE"] = p_scale, NONE.value
        if plogp_scale is None:
            plogp_scale = p_scale
        vectors = (maximum, total, pf_scale, p_scale, plogp_scale, columns, target_grad)
        sizes = (len(student), student.shape[1], student.stride(0), gradient.stride(0))
        grid = (len(student), triton.cdiv(max(student.shape[1], 1), _BLOCK))
        arguments = (student, teacher, gradient, *vectors, *sizes)
        _launch(_gradient, grid, *arguments, **constants)
        return [(slice(0, gradient.shape[1]), gradient)]

    def _constants(self) -> dict[str, Any]:
        divergence = _DIVERGENCES.get(self.divergence.name, NONE.value)
        return {"ALPHA": self.divergence.alpha, "DIVERGENCE": divergence, **_LAUNCH}


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


_LAUNCH: dict[str, Any] = {"BLOCK": _BLOCK, "num_warps": _WARPS}


@triton.jit
def _load(row_start, columns, width):
    """Load logits, with FLOOR for -inf and past the end of the row; NaN stays NaN."""
    z = tl.load(row_start + columns, mask=columns < width, other=FLOOR)
    return tl.where(z < FLOOR, FLOOR, z)


@triton.jit
def _row_sums(logits, sums, sums_stride, width, stride, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Store one row's m = max z, Σ exp(z - m) and Σ exp(z - m)(z - m), rescaled whenever m grows."""
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * stride
    maximum = tl.full((), FLOOR, tl.float32)
    total, weighted = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(row_start, columns, width)
        larger = tl.maximum(maximum, tl.max(z, 0))
        shift = maximum - larger
        exponential = tl.where(columns < width, tl.exp(z - larger), 0.0)
        if WEIGHTED:
            weighted = tl.exp(shift) * (weighted + shift * total) + tl.sum(exponential * (z - larger), 0)
        total = tl.exp(shift) * total + tl.sum(exponential, 0)
        maximum = larger
    tl.store(sums + row, maximum)
    tl.store(sums + sums_stride + row, total)
    tl.store(sums + 2 * sums_stride + row, weighted)


@triton.jit
def _divergence_terms(x, y, p, q, shift, ALPHA: tl.constexpr, DIVERGENCE: tl.constexpr):
    """Return p·f (without JSD's 1-α) and the teacher's term; log p - log q = x - y - shift.

    log(p/m) instead of log p - log m: exactly 0 where p = q.
    """
    if DIVERGENCE == JSD:
        m = p + ALPHA * (q - p) + TINY
        student_term = p * tl.log(tl.div_rn(p + TINY, m))
        teacher_term = q * tl.log(tl.div_rn(q + TINY, m))
    elif DIVERGENCE == REVERSE:
        student_term = p * (x - y - shift)
        teacher_term = student_term
    else:
        student_term = p - q
        teacher_term = q * (y - x + shift)
    return student_term, teacher_term


@triton.jit
def _divergence_sums(
    student,
    teacher,
    maximum,
    total,
    sums,
    count,
    width,
    stride,
    ALPHA: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    max_p, max_q = tl.load(maximum + row), tl.load(maximum + count + row)
    total_p, total_q = tl.load(total + row), tl.load(total + count + row)
    shift = tl.log(total_p) - tl.log(total_q)
    sum_student, sum_teacher = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _load(student + row * stride, columns, width) - max_p
        y = _load(teacher + row * stride, columns, width) - max_q
        p = tl.where(columns < width, tl.div_rn(tl.exp(x), total_p), 0.0)
        q = tl.where(columns < width, tl.div_rn(tl.exp(y), total_q), 0.0)
        student_term, teacher_term = _divergence_terms(x, y, p, q, shift, ALPHA, DIVERGENCE)
        sum_student += tl.sum(student_term, 0)
        sum_teacher += tl.sum(teacher_term, 0)
    tl.store(sums + row, sum_student)
    tl.store(sums + count + row, sum_teacher)


@triton.jit
def _gradient(
    student,
    teacher,
    gradient,
    maximum,
    total,
    pf_scale,
    p_scale,
    plogp_scale,
    target_columns,
    target_grad,
    count,
    width,
    stride,
    gradient_stride,
    ALPHA: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total_p = tl.load(total + row)
    x = _load(student + row * stride, columns, width) - tl.load(maximum + row)
    p = tl.div_rn(tl.exp(x), total_p)
    result = p * tl.load(p_scale + row)
    if DIVERGENCE != NONE:
        total_q = tl.load(total + count + row)
        y = _load(teacher + row * stride, columns, width) - tl.load(maximum + count + row)
        q = tl.div_rn(tl.exp(y), total_q)
        student_term, _ = _divergence_terms(x, y, p, q, tl.log(total_p) - tl.log(total_q), ALPHA, DIVERGENCE)
        result += student_term * tl.load(pf_scale + row)
    if ENTROPY:
        result += p * (x - tl.log(total_p)) * tl.load(plogp_scale + row)
    # add the target's gradient before the sum is rounded to bf16
    result += tl.where(columns == tl.load(target_columns + row), tl.load(target_grad + row), 0.0)
    result = result.to(gradient.dtype.element_ty)
    tl.store(gradient + row * gradient_stride + columns, result, mask=columns < width)
