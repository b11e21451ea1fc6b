"""The elementwise passes as Triton kernels: each reads a tile once, one program a row (a block of a row for
the gradient).

Nothing is kept between them but the tiles themselves: p, q and m are worked out anew, which costs less than
storing them. Under TRITON_INTERPRET=1 they run on a CPU, which is how tests see them where there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.kernels.exact import FLOOR as _FLOOR

FLOOR = tl.constexpr(_FLOOR)
TINY = tl.constexpr(1e-37)  # for logarithms of 0 and of 0/0, where the factor before them is 0
JSD, REVERSE, FORWARD, NONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_KINDS = {"jsd": 0, "reverse": 1, "forward": 2}
_BLOCK, _WARPS = 4096, 8


class TritonPasses:
    """For fp32 tiles.

    Extra memory: the gradient, [tile_tokens, width] in the dtype its products are made in.
    """

    name = "Triton"
    gradient_is_separate = True

    def __init__(
        self, tile_tokens: int, width: int, dtype: torch.dtype, divergence: Divergence, device: torch.device
    ):
        self.divergence = divergence
        self.gradient_buffer = torch.empty(tile_tokens, width, dtype=dtype, device=device)

    def row_sums(self, tiles: list[Tensor], sums: Tensor) -> None:
        """See `Passes`."""
        self.tiles, self.distilled = tiles, False
        for number, tile in enumerate(tiles):
            rows = sums[:, number]
            _row_sums[(len(tile),)](
                tile, rows, rows.stride(0), tile.shape[1], tile.stride(0), WEIGHTED=number == 0, **_LAUNCH
            )

    def divergence_sums(self, tiles: list[Tensor], maximum: Tensor, total: Tensor) -> Tensor:
        """See `Passes`."""
        self.distilled, (student, teacher) = True, tiles
        sums = student.new_empty(2, len(student))
        _divergence_sums[(len(student),)](
            student,
            teacher,
            maximum,
            total,
            sums,
            len(student),
            student.shape[1],
            student.stride(0),
            ALPHA=self.divergence.alpha,
            KIND=_KINDS[self.divergence.name],
            **_LAUNCH,
        )
        return sums

    def gradient(
        self,
        scales: tuple[Tensor | None, Tensor, Tensor | None],
        maximum: Tensor,
        total: Tensor,
        column: Tensor,
        of_target: Tensor,
    ) -> Tensor:
        """See `Passes`. In a buffer of its own."""
        student, of_pf, of_p, of_plogp = self.tiles[0], *scales
        gradient = self.gradient_buffer[: len(student)]
        _gradient[(len(student), triton.cdiv(max(student.shape[1], 1), _BLOCK))](
            student,
            self.tiles[-1],
            gradient,
            maximum,
            total,
            of_p if of_pf is None else of_pf,
            of_p,
            of_p if of_plogp is None else of_plogp,
            column,
            of_target,
            len(student),
            student.shape[1],
            student.stride(0),
            gradient.stride(0),
            ALPHA=self.divergence.alpha,
            KIND=3 if of_pf is None else _KINDS[self.divergence.name],
            ENTROPY=of_plogp is not None,
            **_LAUNCH,
        )
        return gradient


_LAUNCH = {"BLOCK": _BLOCK, "num_warps": _WARPS}


@triton.jit
def _load(row_start, columns, width):
    """Logits with -inf and what lies beyond the row as FLOOR; NaN stays NaN."""
    z = tl.load(row_start + columns, mask=columns < width, other=FLOOR)
    return tl.where(z < FLOOR, FLOOR, z)


@triton.jit
def _row_sums(logits, sums, sums_stride, width, stride, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """One row's running maximum m, Σ exp(z - m) and Σ exp(z - m)(z - m), rescaled whenever m grows."""
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * stride
    maximum, total, weighted = (
        tl.full((), FLOOR, tl.float32),
        tl.full((), 0.0, tl.float32),
        tl.full((), 0.0, tl.float32),
    )
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
def _log_ratios(x, y, p, q, shift, ALPHA: tl.constexpr, KIND: tl.constexpr):
    """p·f (without JSD's 1-α), and the teacher's addend. log(p/m) and not log p - log m: exactly 0 where p =
    q.

    log p - log q = x - y - shift.
    """
    if KIND == JSD:
        m = p + ALPHA * (q - p) + TINY
        of_student = p * tl.log(tl.div_rn(p + TINY, m))
        of_teacher = q * tl.log(tl.div_rn(q + TINY, m))
    elif KIND == REVERSE:
        of_student = p * (x - y - shift)
        of_teacher = of_student
    else:
        of_student = p - q
        of_teacher = q * (y - x + shift)
    return of_student, of_teacher


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
    KIND: tl.constexpr,
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
        of_student, of_teacher = _log_ratios(x, y, p, q, shift, ALPHA, KIND)
        sum_student += tl.sum(of_student, 0)
        sum_teacher += tl.sum(of_teacher, 0)
    tl.store(sums + row, sum_student)
    tl.store(sums + count + row, sum_teacher)


@triton.jit
def _gradient(
    student,
    teacher,
    gradient,
    maximum,
    total,
    of_pf,
    of_p,
    of_plogp,
    column,
    of_target,
    count,
    width,
    stride,
    gradient_stride,
    ALPHA: tl.constexpr,
    KIND: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total_p = tl.load(total + row)
    x = _load(student + row * stride, columns, width) - tl.load(maximum + row)
    p = tl.div_rn(tl.exp(x), total_p)
    result = p * tl.load(of_p + row)
    if KIND != NONE:
        total_q = tl.load(total + count + row)
        y = _load(teacher + row * stride, columns, width) - tl.load(maximum + count + row)
        q = tl.div_rn(tl.exp(y), total_q)
        of_student, _ = _log_ratios(x, y, p, q, tl.log(total_p) - tl.log(total_q), ALPHA, KIND)
        result += of_student * tl.load(of_pf + row)
    if ENTROPY:
        result += p * (x - tl.log(total_p)) * tl.load(of_plogp + row)
    result += tl.where(
        columns == tl.load(column + row), tl.load(of_target + row), 0.0
    )  # before it is rounded to bf16
    tl.store(
        gradient + row * gradient_stride + columns, result.to(gradient.dtype.element_ty), mask=columns < width
    )
