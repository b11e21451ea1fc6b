"""Compute everything the loss needs in one pass over the vocabulary, from hidden states, tile by tile.

For each tile of tokens: logits of this rank's shard → statistics (log-prob, entropy, divergence) → the
caller's objective on these vectors, differentiated by autograd → the closed-form gradient of the logits →
accumulated into dHidden and dWeight. No [tokens, vocabulary] tensor outlives its tile, and nothing is
computed twice: four matrix products per distilled token, three for any other.

Memory, for any number of tokens: two tiles [tile_tokens, width] in fp32 (one without a teacher) and, on CUDA,
one in the model's dtype; and an fp32 dWeight, unless the caller supplies one (`weight_grad`).
Collectives per tile on the full support: one all-gather of [4, 2, n] fp32, and of [2, n] for a divergence; on
CUDA they overlap with the matrix products of the previous tile. Per call: one all-gather of ten integers.
"""

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.kernels.base import Statistics, StatisticsGrad
from megatron_srpo.vocab_parallel.kernels.choice import KernelName, create_kernel
from megatron_srpo.vocab_parallel.logits import (
    InterpolatedLogits,
    LogitsGradient,
    ProjectionGradient,
    Rows,
    Student,
    Teacher,
)
from megatron_srpo.vocab_parallel.shard import VocabShard, accumulation_dtype, check_consistent

MEMORY = {"cpu": 320 * 2**20, "cuda": 2 * 2**30}  # default bytes of the tiles of logits, by device
_HUGE_PAGE = 2 * 2**20  # bytes
IGNORED = -100  # torch's own ignore_index

# objective(rows, statistics of those tokens) -> scalar, differentiable in all three
Objective = Callable[[Rows, Statistics], Tensor]


class PassInputs(NamedTuple):
    """The arguments of one pass (see `fused_objective`); `required` names the optional fields it needs."""

    student: Teacher
    targets: Tensor | None
    shard: VocabShard
    teacher: Teacher | None = None
    divergence: Divergence = Divergence()
    temperature: float = 1.0
    tile_tokens: int | None = None
    memory: int | None = None
    required: tuple[str, ...] = ()
    kernel: KernelName | None = None

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return len(self.student.tensor)

    @property
    def distilled(self) -> int:
        """D, the number of leading tokens that have a teacher."""
        return 0 if self.teacher is None else len(self.teacher.tensor)

    def validate(self) -> None:
        """Raise ValueError for this rank's first argument that is missing, invalid or inconsistent."""
        self.student.validate("", self.shard)
        self.divergence.validate()
        expected = {"targets": "[T] int64 ids", "teacher": "Logits, a Projection or InterpolatedLogits"}
        for name in self.required:
            if getattr(self, name) is None:
                raise ValueError(f"{name}: None; expected {expected[name]}")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}: expected more than 0")
        if self.teacher is not None:
            self._validate_teacher(self.teacher)
        if self.targets is not None:
            self._validate_targets(self.targets)
        elif self.teacher is not None and self.divergence.support == "sampled":
            raise ValueError("targets: None, but the sampled support needs them")

    def _validate_teacher(self, teacher: Teacher) -> None:
        teacher.validate("teacher", self.shard)
        student, given = self.student.tensor, teacher.tensor
        same_dtype = accumulation_dtype(given.dtype) == accumulation_dtype(student.dtype)
        if self.distilled > self.tokens or given.device != student.device or not same_dtype:
            expected = f"expected at most {self.tokens}, in a dtype like {student.dtype}, on {student.device}"
            found = f"teacher of {self.distilled} tokens ({given.dtype}, {given.device})"
            raise ValueError(f"{found}: {expected}, as the student's")

    def _validate_targets(self, targets: Tensor) -> None:
        device, vocab_size = self.student.tensor.device, self.shard.vocab_size
        if targets.shape != (self.tokens,) or targets.dtype != torch.int64 or targets.device != device:
            found = f"targets {list(targets.shape)} ({targets.dtype}, {targets.device})"
            raise ValueError(f"{found}: expected [{self.tokens}] int64 on {device}")
        outside = targets[((targets < 0) | (targets >= vocab_size)) & (targets != IGNORED)]
        if len(outside):
            found = f"ids from {int(outside.min())} to {int(outside.max())} at {len(outside)} positions"
            expected = f"expected 0 … {vocab_size - 1}, or {IGNORED} to ignore a token"
            raise ValueError(f"targets: {found}; {expected}")


def fused_objective(
    student: Student,
    targets: Tensor,
    objective: Objective,
    shard: VocabShard,
    *,
    weight_grad: Tensor | None = None,
    **options,
) -> tuple[Tensor, Statistics]:
    """Sum `objective` over all tiles and compute the gradients of the student's tensors in the same pass.

    Args:
        student: `Projection` or `Logits` of T tokens in bf16, fp32 or float64, the D distilled ones first.
        targets: [T] int64 token ids in 0 … vocab_size - 1, or `IGNORED` for tokens to skip.
        objective: Called once per tile with the tile's tokens (a slice or indices) and their statistics;
            returns a scalar.
        shard: This rank's slice of the vocabulary.
        weight_grad: [padded_width, H] fp32 (Megatron's `main_grad`). If given, dWeight is added to it instead
            of being returned to autograd; the loss must then be differentiated with a gradient of exactly 1.
        **options: `teacher`, source of D tokens' logits, to which no gradient flows, or None; `divergence`
            between student and teacher; `temperature`, by which both models' logits are divided;
            `tile_tokens`, or `memory` in bytes of all tiles together (default by device: `MEMORY`);
            `kernel`, "cpu", "triton" or "reference" instead of the fastest one.

    Returns:
        The scalar loss, identical on every tensor-parallel rank, and the statistics, without gradient. The
        gradient to `hidden` is this rank's share, for the caller to sum over the tensor-parallel ranks.

    Raises:
        ValueError: On all tensor-parallel ranks together, for invalid or inconsistent arguments or shards.
    """
    tiled_pass = TiledPass(PassInputs(student, targets, shard, **options), weight_grad)
    loss, *statistics = _FusedObjective.apply(tiled_pass, objective, weight_grad, *student)
    return loss, Statistics(*statistics)


@torch.no_grad()
def score(source: Teacher, targets: Tensor | None, shard: VocabShard, **options) -> Statistics:
    """Compute log-probs of `targets` (zeros if None) and entropies, [T], without gradient.

    For options and errors see `fused_objective`.
    """
    return TiledPass(PassInputs(source, targets, shard, **options)).all_statistics()


class TiledPass:
    """One pass over the tokens: tile buffers, kernel, and pending matrix products."""

    def __init__(self, inputs: PassInputs, weight_grad: Tensor | None = None):
        error, self.kept = None, None
        try:
            inputs.validate()
            _validate_weight_grad(inputs.student, weight_grad)
            self.kept = _kept_tokens(inputs.targets)
        except ValueError as exception:
            error = exception
        self.inputs, self.like = inputs, inputs.student.tensor
        self.dtype = accumulation_dtype(self.like.dtype)
        self.tokens, self.distilled = inputs.tokens, inputs.distilled
        if self.kept is not None:
            self.tokens, self.distilled = len(self.kept), int((self.kept < inputs.distilled).sum())
        settings = {
            "tokens": inputs.tokens,
            "tokens of the teacher": inputs.distilled,
            "tokens not ignored": self.tokens,
            "distilled tokens not ignored": self.distilled,
            "bits a number": 8 * self.dtype.itemsize,
            "memory or tile_tokens": inputs.tile_tokens or inputs.memory or 0,
        }
        widest = check_consistent(error, inputs.shard, settings, self.like.device)
        tile_tokens = inputs.tile_tokens or _tile_tokens(inputs.memory, widest, self.like)
        kinds = (self.distilled, self.tokens - self.distilled)
        tile_tokens = max(1, *(_even_size(tokens, tile_tokens) for tokens in kinds))
        self.tile_tokens, shape = tile_tokens, (tile_tokens, inputs.shard.width)
        count = 2 if self.distilled else 1
        self.buffers = [_empty_tile(shape, self.dtype, self.like.device) for _ in range(count)]
        self.kernel = create_kernel(inputs.kernel, tile_tokens, inputs.shard, inputs.divergence, self.like)
        self.pending_products: Iterator[Callable[[], None]] = iter(())

    def tiles(self, distilled_only: bool = False) -> Iterator[tuple[Rows, bool]]:
        """Yield each tile's tokens and True if they are distilled; no tile mixes the two kinds."""
        for rows in self._even_tiles(0, self.distilled):
            yield rows, True
        if not distilled_only:
            for rows in self._even_tiles(self.distilled, self.tokens):
                yield rows, False

    def _even_tiles(self, first: int, last: int) -> Iterator[Rows]:
        """Cut tokens into tiles of (nearly) equal size instead of full tiles and a small remainder."""
        if last <= first:
            return
        size = _even_size(last - first, self.tile_tokens)
        for start in range(first, last, size):
            rows = slice(start, min(start + size, last))
            yield rows if self.kept is None else self.kept[rows]

    def empty_statistics(self) -> Statistics:
        """Return zeros for all T and D tokens."""
        lengths = (self.inputs.tokens, self.inputs.tokens, self.inputs.distilled)
        return Statistics(*(self.like.new_zeros(length, dtype=self.dtype) for length in lengths))

    def all_statistics(self, distilled_only: bool = False) -> Statistics:
        """Compute the statistics of all tiles, without gradient."""
        statistics = self.empty_statistics()
        for rows, is_distilled in self.tiles(distilled_only):
            self.tile_statistics(rows, is_distilled, statistics)
        return statistics

    def tile_statistics(self, rows: Rows, is_distilled: bool, into: Statistics) -> Statistics:
        """Compute the statistics of one tile, and store them in its rows of `into`."""
        inputs = self.inputs
        sources = [inputs.student]
        if is_distilled and inputs.teacher is not None:
            sources.append(inputs.teacher)
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        tiles = [buffer[:count] for buffer in self.buffers[: len(sources)]]
        scale = 1.0 / inputs.temperature

        def write(index: int, columns: slice) -> None:
            sources[index].write(rows, columns, tiles[index][:, columns], scale)

        targets = None if inputs.targets is None else inputs.targets[rows]
        statistics = self.kernel.statistics(tiles, write, targets, self.compute_one_product)
        for values, all_values in zip(statistics, into, strict=True):
            if values is not None and all_values is not None:
                all_values[rows] = values
        return statistics

    def accumulate_grad(
        self, rows: Rows, grads: StatisticsGrad, into: LogitsGradient | ProjectionGradient
    ) -> None:
        """Accumulate the gradient of the last tile's logits, given those of its statistics.

        Matrix products that can overlap with the collectives of the next tile remain pending.
        """
        self.finish_products()
        scale = 1.0 / self.inputs.temperature
        scaled = StatisticsGrad(*(None if grad is None else grad * scale for grad in grads))
        blocks = self.kernel.logits_grad(scaled)
        if self.kernel.gradient_is_separate:
            dtype = self.like.dtype if self.like.is_cuda else self.dtype  # of the products
            blocks = [(columns, gradient.to(dtype)) for columns, gradient in blocks]
        self.pending_products = into.products(rows, blocks)
        if not (self.kernel.gradient_is_separate and self.inputs.shard.is_split):
            self.finish_products()

    def compute_one_product(self) -> None:
        """Compute one pending product of the previous tile, if any, while a collective runs."""
        if product := next(self.pending_products, None):
            product()

    def finish_products(self) -> None:
        """Compute the remaining matrix products of the previous tile."""
        for product in self.pending_products:
            product()


def _kept_tokens(targets: Tensor | None) -> Tensor | None:
    """Return the indices of the tokens that are not ignored, or None if no token is ignored."""
    if targets is None or not (targets == IGNORED).any():
        return None
    return (targets != IGNORED).nonzero()[:, 0]


def _validate_weight_grad(student: Teacher, weight_grad: Tensor | None) -> None:
    if weight_grad is None:
        return
    weight = getattr(student, "weight", None)
    if weight is None:
        raise ValueError("weight_grad: given, but the student's logits come without a weight")
    shape, dtype, device = weight.shape, accumulation_dtype(weight.dtype), weight.device
    if weight_grad.shape != shape or weight_grad.dtype != dtype or weight_grad.device != device:
        found = f"weight_grad {list(weight_grad.shape)} ({weight_grad.dtype}, {weight_grad.device})"
        raise ValueError(f"{found}: expected {list(shape)} ({dtype}, {device})")


def _even_size(tokens: int, largest: int) -> int:
    """Return the size of tiles if `tokens` are cut into the fewest tiles of at most `largest`."""
    return -(-tokens // max(1, -(-tokens // largest)))


def _tile_tokens(memory: int | None, width: int, like: Tensor) -> int:
    """Return the number of tokens whose tiles (two fp32, on CUDA also a gradient) fit into `memory`, ≥ 16."""
    memory = memory or MEMORY.get(like.device.type, MEMORY["cpu"])
    bytes_per_column = 2 * accumulation_dtype(like.dtype).itemsize
    if like.is_cuda:
        bytes_per_column += like.dtype.itemsize
    tokens = max(16, memory // (bytes_per_column * max(width, 1)))
    if like.is_cuda and tokens >= 128:
        return tokens - tokens % 128  # a multiple of the matrix products' own tile size
    return tokens


def _empty_tile(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a tile, for a CPU in huge pages where the system has them.

    The tiles of a call are new memory; in pages of 4 KiB, page faults take a fiftieth of the loss's time.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    if device.type != "cpu" or size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class _FusedObjective(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx, tiled_pass: TiledPass, objective: Objective, weight_grad: Tensor | None, *student):
        source, needed = tiled_pass.inputs.student, ctx.needs_input_grad[3:]
        assert not isinstance(source, InterpolatedLogits)
        collector = source.gradients(needed, weight_grad) if any(needed) else None
        loss = student[0].new_zeros((), dtype=tiled_pass.dtype)
        statistics = tiled_pass.empty_statistics()
        for rows, is_distilled in tiled_pass.tiles():
            tile_statistics = tiled_pass.tile_statistics(rows, is_distilled, statistics)
            tile_loss, grads = _differentiate(objective, rows, tile_statistics)
            loss += tile_loss
            if collector is not None:
                tiled_pass.accumulate_grad(rows, grads, collector)
        tiled_pass.finish_products()
        ctx.gradients = None if collector is None else collector.results()
        ctx.must_be_one = weight_grad is not None
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    @override
    def backward(ctx, loss_grad: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None  # sole owner: scaled in place, without a second [V, H]
        if gradients is None:
            raise RuntimeError("fused_objective: backward ran already and freed the gradients; call it again")
        if ctx.must_be_one:
            # dWeight has been added to weight_grad already
            torch._assert_async(loss_grad == 1)  # pyright: ignore[reportPrivateImportUsage]
        elif loss_grad.is_cuda or loss_grad != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(loss_grad)
        return None, None, None, *gradients


def _differentiate(objective: Objective, rows: Rows, statistics: Statistics) -> tuple[Tensor, StatisticsGrad]:
    """Evaluate the objective on one tile and its gradients; None for statistics it does not use."""
    with torch.enable_grad():
        leaves = [values.detach().requires_grad_() for values in statistics if values is not None]
        loss = objective(rows, Statistics(*leaves, *[None] * (3 - len(leaves))))
        grads = ()
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), StatisticsGrad(*grads)
