"""One pass over the vocabulary for everything the loss needs, from hidden states, tile by tile.

For each tile of tokens: logits of this rank's vocabulary shard → statistics (log-prob, entropy, divergence) →
the caller's objective on those per-token vectors, differentiated by autograd → the closed-form gradient of
the tile's logits → accumulated into dHidden and dWeight. Nothing of size [tokens, vocabulary] outlives a tile
and nothing is computed twice: four matrix products a distilled token, three otherwise.

Memory, for any number of tokens: two tiles [tile_tokens, width] in fp32 (one without a teacher) and, on CUDA,
one in the model's dtype; and an fp32 dWeight, unless the caller has one to add to (`weight_grad`).
Collectives a tile, exact: one all-gather of [4, 2, n] fp32, and [2, n] for a divergence; on CUDA they travel
while the products of the tile before are made. One all-gather of ten integers a call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.kernels.cpu import CpuPasses
from megatron_srpo.vocab_parallel.kernels.exact import ExactKernel
from megatron_srpo.vocab_parallel.kernels.reference import ReferenceKernel
from megatron_srpo.vocab_parallel.kernels.topk import TailKernel
from megatron_srpo.vocab_parallel.logits import Rows, Student, Teacher
from megatron_srpo.vocab_parallel.shard import VocabShard, accumulation_dtype, check_consistent

MEMORY = {
    "cpu": 320 * 2**20,
    "cuda": 2 * 2**30,
}  # bytes of the tiles of logits, where the caller does not say
IGNORED = -100  # torch's own ignore_index


class Statistics(NamedTuple):
    """Per-token results in fp32 (or the inputs' float64). Zeros for ignored tokens.

    logprob: [T] of the target ids. entropy: [T] of the student, nats. divergence: [D], of the first D tokens.
    """

    logprob: Tensor
    entropy: Tensor
    divergence: Tensor | None


# objective(rows, statistics of those tokens) -> scalar; differentiable in all three, divergence is None
# without a teacher
Objective = Callable[[Rows, Statistics], Tensor]


class PassInputs(NamedTuple):
    """What is computed: see `fused_objective` for the fields. needs: names of fields that must not be None
    here.
    """

    student: Student
    targets: Tensor | None
    shard: VocabShard
    teacher: Teacher | None = None
    divergence: Divergence = Divergence()
    temperature: float = 1.0
    tile_tokens: int | None = None
    memory: int | None = None
    needs: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.student.tensor)

    @property
    def distilled(self) -> int:
        """D, the number of distilled tokens."""
        return 0 if self.teacher is None else len(self.teacher.tensor)

    def what_does_not_fit(self) -> str | None:
        """The first thing wrong with this rank's arguments, naming the argument, what it is and what was
        expected.
        """
        own, teacher, targets = self.student.tensor, self.teacher, self.targets
        if problem := self.student.problem("", self.shard) or self.divergence.problem:
            return problem
        if missing := [name for name in self.needs if getattr(self, name) is None]:
            return f"{missing[0]}: None; expected {'[T] int64 ids' if missing[0] == 'targets' else 'Logits, a Projection or a InterpolatedLogits'}"
        if self.temperature <= 0:
            return f"temperature {self.temperature}: expected more than 0"
        if teacher is not None:
            if problem := teacher.problem("teacher", self.shard):
                return problem
            if (
                self.distilled > self.tokens
                or teacher.tensor.device != own.device
                or accumulation_dtype(teacher.tensor.dtype) != accumulation_dtype(own.dtype)
            ):
                given = (
                    f"teacher of {self.distilled} tokens ({teacher.tensor.dtype}, {teacher.tensor.device})"
                )
                return f"{given}: expected at most {self.tokens}, in a dtype like {own.dtype}, on {own.device}, as the student's"
        if targets is None:
            needs = teacher is not None and self.divergence.support == "sampled"
            return "targets: None, but the sampled support needs them" if needs else None
        if targets.shape != own.shape[:1] or targets.dtype != torch.int64 or targets.device != own.device:
            given = f"targets {list(targets.shape)} ({targets.dtype}, {targets.device})"
            return f"{given}: expected [{self.tokens}] int64 on {own.device}"
        outside = targets[((targets < 0) | (targets >= self.shard.vocab_size)) & (targets != IGNORED)]
        if len(outside):
            span = f"ids from {int(outside.min())} to {int(outside.max())}"
            return f"targets: {span} at {len(outside)} places; the vocabulary has {self.shard.vocab_size} ({IGNORED}: ignored)"
        return None


def fused_objective(
    student: Student,
    targets: Tensor,
    objective: Objective,
    shard: VocabShard,
    *,
    weight_grad: Tensor | None = None,
    **options,
) -> tuple[Tensor, Statistics]:
    """Σ over tiles of `objective`, with the gradients to the student's tensors computed in the same pass.

    Args:
        student: `Projection` (hidden [T, H], weight [padded_width, H]) or `Logits` ([T, padded_width]), bf16,
            fp32 or
            float64. The first D tokens are the distilled ones.
        targets: [T] token ids, in 0 … vocab_size - 1, or `IGNORED`: such tokens take no part and cost
            nothing.
        objective: called once a tile with the tile's tokens (a slice or their indices) and their statistics.
        weight_grad: [padded_width, H] fp32 (Megatron's `main_grad`). When given, dWeight is added to it in
            this call,
            weight (which need not require a gradient) gets none, and the scalar must be differentiated with a
            gradient of exactly 1.
        teacher: a source of D tokens' logits, to which no gradient flows; None when nothing is distilled.
        divergence: which; needed with a teacher only.
        temperature: both models' logits are divided by it.
        tile_tokens, memory: tokens a tile, or the bytes that tiles may take together (default by device:
        `MEMORY`).

    Raises:
        ValueError: shapes, dtypes, devices, process group or shards that do not fit, or a target outside the
            vocabulary.
            When one tensor-parallel rank raises, all do.

    Returns:
        The scalar loss (identical on every tensor-parallel rank) and the statistics, without gradient. The
        gradient to `hidden` is this rank's share: the caller sums it over the tensor-parallel ranks, as the
        backward of its gather or copy.
    """
    sweep = TiledPass(PassInputs(student, targets, shard, **options), weight_grad)
    loss, *statistics = _FusedObjective.apply(sweep, objective, weight_grad, *student)
    return loss, Statistics(*statistics)


@torch.no_grad()
def score(source: Teacher, targets: Tensor | None, shard: VocabShard, **options) -> Statistics:
    """Log-probabilities of `targets` (zeros when None) and entropies, [T], without gradient: teacher and
    old-policy scoring.

    Options and errors: see `fused_objective`. One product a token (two for a `InterpolatedLogits`).
    """
    return TiledPass(PassInputs(source, targets, shard, **options)).all_statistics()


class TiledPass:
    """One sweep over a problem's tokens: its tiles' buffers, its kernel, and the products still to be made."""

    def __init__(self, problem: PassInputs, weight_grad: Tensor | None = None):
        own, shard, targets = problem.student.tensor, problem.shard, problem.targets
        wrong = problem.what_does_not_fit() or _weight_grad_problem(problem.student, weight_grad)
        self.problem, self.dtype, self.kept = problem, accumulation_dtype(own.dtype), None
        if wrong is None and targets is not None and (targets == IGNORED).any():
            self.kept = (targets != IGNORED).nonzero()[:, 0]
        self.distilled = (
            problem.distilled if self.kept is None else int((self.kept < problem.distilled).sum())
        )
        self.tokens = problem.tokens if self.kept is None else len(self.kept)
        same = {"tokens": problem.tokens, "tokens of the teacher": problem.distilled}
        same |= {"tokens not ignored": self.tokens, "distilled tokens not ignored": self.distilled}
        same |= {
            "bits a number": 8 * self.dtype.itemsize,
            "memory or tile_tokens": problem.tile_tokens or problem.memory or 0,
        }
        widest = check_consistent(wrong, shard, same, own.device)
        tile_tokens = problem.tile_tokens or _tile_tokens(
            problem.memory or MEMORY.get(own.device.type, MEMORY["cpu"]), widest, own
        )
        self.tile_tokens = max(1, min(tile_tokens, self.tokens))
        buffers = 2 if self.distilled else 1
        self.buffers = [
            torch.empty(self.tile_tokens, shard.width, dtype=self.dtype, device=own.device)
            for _ in range(buffers)
        ]
        self.kernel = _kernel(self.tile_tokens, shard, problem.divergence, own)
        self.pending: list[Callable[[], None]] = []

    def tiles(self, distilled_only: bool = False) -> Iterator[tuple[Rows, bool]]:
        """The tokens of each tile and whether they are distilled: no tile straddles the border."""
        parts = (
            (0, self.distilled, True),
            (self.distilled, self.distilled if distilled_only else self.tokens, False),
        )
        for first, last, is_distilled in parts:
            if last > first:
                count = -(-(last - first) // self.tile_tokens)
                size = -(-(last - first) // count)  # tiles of one size, not full ones and a rest
                for start in range(first, last, size):
                    rows = slice(start, min(start + size, last))
                    yield rows if self.kept is None else self.kept[rows], is_distilled

    def empty_statistics(self) -> Statistics:
        """Zeros, to be filled tile by tile."""
        device = self.problem.student.tensor.device
        lengths = (self.problem.tokens, self.problem.tokens, self.problem.distilled)
        return Statistics(*(torch.zeros(length, dtype=self.dtype, device=device) for length in lengths))

    def all_statistics(self, distilled_only: bool = False) -> Statistics:
        """Of all tiles, without gradient."""
        statistics = self.empty_statistics()
        for rows, is_distilled in self.tiles(distilled_only):
            self.statistics(rows, is_distilled, statistics)
        return statistics

    def statistics(self, rows: Rows, is_distilled: bool, into: Statistics) -> Statistics:
        """Of one tile; also stored where they belong in `into`."""
        problem = self.problem
        sources = [problem.student, problem.teacher] if is_distilled else [problem.student]
        count = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        tiles = [buffer[:count] for buffer in self.buffers[: len(sources)]]
        if not self.kernel.gradient_is_separate:
            self.make_products()
        for source, tile in zip(sources, tiles, strict=True):
            source.write(rows, tile, 1.0 / problem.temperature)
        targets = None if problem.targets is None else problem.targets[rows]
        found = Statistics(*self.kernel.statistics(tiles, targets, self.make_one_product))
        for values, place in zip(found, into, strict=True):
            if values is not None:
                place[rows] = values
        return found

    def logits_grad(self, gradients: tuple[Tensor | None, ...]) -> Tensor:
        """Of the last tile, [n, width] in the dtype its products are made in, from the gradients of its
        statistics.
        """
        self.make_products()
        scale = 1.0 / self.problem.temperature
        gradient = self.kernel.logits_grad(*(None if g is None else g * scale for g in gradients))
        return gradient.to(self.problem.student.tensor.dtype) if gradient.is_cuda else gradient

    def make_one_product(self) -> None:
        """Something for the device to do while a collective is under way."""
        if self.pending:
            self.pending.pop(0)()

    def make_products(self) -> None:
        """All that are left of the tile before."""
        while self.pending:
            self.make_one_product()


def _weight_grad_problem(student: Student, weight_grad: Tensor | None) -> str | None:
    if weight_grad is None:
        return None
    weight = getattr(student, "weight", None)
    if weight is None:
        return "weight_grad: given, but the student's logits come without a weight"
    if (
        weight_grad.shape != weight.shape
        or weight_grad.dtype != accumulation_dtype(weight.dtype)
        or weight_grad.device != weight.device
    ):
        given = f"weight_grad {list(weight_grad.shape)} ({weight_grad.dtype}, {weight_grad.device})"
        return f"{given}: expected {list(weight.shape)} ({accumulation_dtype(weight.dtype)}, {weight.device})"
    return None


def _tile_tokens(memory: int, width: int, own: Tensor) -> int:
    """Tokens a tile such that two fp32 tiles, and on CUDA a gradient, fit into `memory` bytes; at least 16."""
    number_bytes = 2 * accumulation_dtype(own.dtype).itemsize + (own.dtype.itemsize if own.is_cuda else 0)
    tokens = max(16, memory // (number_bytes * max(width, 1)))
    return (
        tokens - tokens % 128 if own.is_cuda and tokens >= 128 else tokens
    )  # whole tiles of the matrix products


def _kernel(
    tile_tokens: int, shard: VocabShard, divergence: Divergence, own: Tensor
) -> ExactKernel | ReferenceKernel:
    """The fastest kernel for these inputs."""
    name = kernel_name(own.device, own.dtype)
    if name == ReferenceKernel.name:
        return ReferenceKernel(shard, divergence)
    if own.device.type == "cpu":
        passes = CpuPasses(shard.width, accumulation_dtype(own.dtype), divergence)
    else:
        from megatron_srpo.vocab_parallel.kernels.triton import TritonPasses

        passes = TritonPasses(tile_tokens, shard.width, own.dtype, divergence, own.device)
    has_tail = divergence.support.endswith("topk") and divergence.top_k < shard.vocab_size
    return (TailKernel if has_tail else ExactKernel)(passes, shard, divergence)


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What computes the tiles of inputs like these, in words for the log."""
    if device.type == "cpu":
        return CpuPasses.name
    has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return "Triton" if has_triton and dtype != torch.float64 else ReferenceKernel.name


class _FusedObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sweep: TiledPass, objective: Objective, weight_grad: Tensor | None, *student: Tensor):
        needed = ctx.needs_input_grad[3:]
        collector = sweep.problem.student.gradients(needed, weight_grad) if any(needed) else None
        loss = torch.zeros((), dtype=sweep.dtype, device=student[0].device)
        statistics = sweep.empty_statistics()
        overlaps = sweep.kernel.gradient_is_separate and sweep.problem.shard.is_split
        for rows, is_distilled in sweep.tiles():
            of_tile = sweep.statistics(rows, is_distilled, statistics)
            tile_loss, gradients = _differentiate(objective, rows, of_tile)
            loss += tile_loss
            if collector is not None:
                sweep.pending = collector.products(rows, sweep.logits_grad(gradients))
                if not overlaps:
                    sweep.make_products()
        sweep.make_products()
        ctx.gradients = collector and collector.results()
        ctx.must_be_one = weight_grad is not None
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx, loss_grad: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None  # ours alone, so scaled in place: no second [V, H]
        if gradients is None:
            raise RuntimeError(
                "fused_objective: its gradients were made with it and have been handed out; call it again"
            )
        if ctx.must_be_one:
            torch._assert_async(loss_grad == 1)  # dWeight is in weight_grad already
        elif loss_grad.is_cuda or loss_grad != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(loss_grad)
        return None, None, None, *gradients


def _differentiate(
    objective: Objective, rows: Rows, statistics: Statistics
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The objective of one tile, and its gradients with respect to the statistics; None for what it does not
    use.
    """
    with torch.enable_grad():
        leaves = Statistics(
            *(None if values is None else values.detach().requires_grad_() for values in statistics)
        )
        loss = objective(rows, leaves)
        inputs = [leaf for leaf in leaves if leaf is not None]
        gradients = (
            torch.autograd.grad(loss, inputs, allow_unused=True)
            if loss.requires_grad
            else (None,) * len(inputs)
        )
    return loss.detach(), (*gradients, None)[:3]
