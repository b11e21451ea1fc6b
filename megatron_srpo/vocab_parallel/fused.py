"""One pass over the vocabulary for everything the loss needs, from hidden states, tile by tile.

For each tile of tokens: logits of this rank's vocabulary shard → statistics (log-prob, entropy, divergence), on the full
support with at most three small all-reduces → the caller's objective on those per-token vectors, differentiated by
autograd → the closed-form gradient of the tile's logits → accumulated into dHidden and dWeight. Nothing of size
[tokens, vocabulary] outlives a tile and nothing is computed twice: four matrix products a distilled token, three otherwise.

What is elementwise is a kernel's: `CpuKernel` for exact losses in fp32 on a CPU, `ReferenceKernel` for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.cpu import CpuKernel
from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.reference import ReferenceKernel
from megatron_srpo.vocab_parallel.shard import VocabShard, wide

TILE_BYTES = 64 * 2**20  # of one fp32 logits tile; a few of them live at once

# objective(rows, logprob [n], divergence [n] or None) -> scalar; differentiable in both vectors
Objective = Callable[[slice, Tensor, Tensor | None], Tensor]


class Statistics(NamedTuple):
    """Per-token results, [T] in fp32 (or the inputs' float64), without gradient.

    logprob: of the target ids. entropy: of the student, nats. divergence: [D], of the first D tokens.
    """

    logprob: Tensor
    entropy: Tensor
    divergence: Tensor


def fused_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    shard: VocabShard,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    divergence: Divergence = Divergence(),  # noqa: B008  (immutable)
    temperature: float = 1.0,
    tile_tokens: int | None = None,
) -> tuple[Tensor, Statistics]:
    """Σ over tiles of `objective`, with gradients to `hidden` and `weight` computed in the same pass.

    Args:
        hidden: [T, H] final hidden states; the first D tokens are the distilled ones.
        weight: [padded_width, H] this rank's rows of the output matrix.
        targets: [T] token ids, in 0 … vocab_size - 1.
        teacher_hidden, teacher_weight: [D, H] and [padded_width, H], detached; None when D = 0.
        temperature: both models' logits are divided by it.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a target outside the vocabulary. Tensor-parallel ranks
            are given the same tokens, so all of them raise it, before the first collective.

    Returns:
        The scalar loss (identical on every tensor-parallel rank) and the statistics. The gradient to `hidden` is this
        rank's share: the caller sums it over the tensor-parallel ranks, as the backward of its gather or copy.
    """
    _check(hidden, weight, targets, shard, "hidden", "weight")
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("teacher_hidden and teacher_weight: give both or neither")
    if teacher_hidden is not None:
        _check(teacher_hidden, teacher_weight, None, shard, "teacher_hidden", "teacher_weight")
        if len(teacher_hidden) > len(hidden) or len(teacher_weight) != len(weight):
            raise ValueError(
                f"teacher_hidden {list(teacher_hidden.shape)} and teacher_weight {list(teacher_weight.shape)}: expected at most"
                f" {len(hidden)} tokens and exactly {len(weight)} rows, as hidden and weight have"
            )
    tile_tokens = tile_tokens or _tile_tokens(weight)
    call = _Call(targets, objective, shard, teacher_hidden, teacher_weight, divergence, temperature, tile_tokens)
    loss, logprob, entropy, divergence_values = _FusedObjective.apply(hidden, weight, call)
    return loss, Statistics(logprob, entropy, divergence_values)


@torch.no_grad()
def score(hidden: Tensor, weight: Tensor, targets: Tensor | None, shard: VocabShard, *, temperature: float = 1.0) -> Statistics:
    """Log-probabilities of `targets` (zeros when None) and entropies, [T], without gradient: teacher and old-policy scoring."""
    _check(hidden, weight, targets, shard, "hidden", "weight")
    tile_tokens = min(_tile_tokens(weight), len(hidden))
    kernel = _kernel(weight, None, shard, Divergence(), temperature, tile_tokens)
    logprob, entropy = hidden.new_zeros(2, len(hidden), dtype=wide(hidden.dtype))
    for start in range(0, len(hidden), tile_tokens or 1):
        rows = slice(start, start + tile_tokens)
        logprob[rows], entropy[rows], _ = kernel.statistics(hidden[rows], None, None if targets is None else targets[rows])
    return Statistics(logprob, entropy, entropy.new_empty(0))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor | None, shard: VocabShard, hidden_name: str, weight_name: str) -> None:
    """Raises ValueError naming the argument, what it is and what was expected."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{hidden_name} {list(hidden.shape)} and {weight_name} {list(weight.shape)}"
        raise ValueError(f"{shapes}: expected [tokens, H] and [vocabulary rows, H]")
    if hidden.dtype != weight.dtype or hidden.device != weight.device or not hidden.is_floating_point():
        kinds = f"{hidden_name} ({hidden.dtype}, {hidden.device}) and {weight_name} ({weight.dtype}, {weight.device})"
        raise ValueError(f"{kinds}: expected one floating-point dtype and one device")
    if not (0 <= shard.width <= len(weight) and 0 <= shard.start <= shard.vocab_size - shard.width):
        raise ValueError(f"shard {shard[:3]}: does not fit {weight_name} of {len(weight)} rows, or its own vocabulary")
    if targets is None:
        return
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64 or targets.device != hidden.device:
        given = f"targets {list(targets.shape)} ({targets.dtype}, {targets.device})"
        raise ValueError(f"{given}: expected [{len(hidden)}] int64 on {hidden.device}")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < shard.vocab_size:
        raise ValueError(f"targets: ids from {int(targets.min())} to {int(targets.max())}, the vocabulary has {shard.vocab_size}")


def _tile_tokens(weight: Tensor) -> int:
    return max(16, TILE_BYTES // (4 * weight.shape[0]))


def _kernel(weight: Tensor, teacher_weight: Tensor | None, shard: VocabShard, kind: Divergence, temperature: float, tile_tokens: int):
    """The fastest kernel for these inputs."""
    exact_cpu = weight.device.type == "cpu" and weight.dtype == wide(weight.dtype) and kind.top_k is None
    if exact_cpu:
        return CpuKernel(weight, teacher_weight, shard, kind, temperature, tile_tokens)
    return ReferenceKernel(weight, teacher_weight, shard, kind, temperature)


class _Call(NamedTuple):
    targets: Tensor
    objective: Objective
    shard: VocabShard
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    divergence: Divergence
    temperature: float
    tile_tokens: int

    @property
    def distilled(self) -> int:
        """D, the number of distilled tokens."""
        return 0 if self.teacher_hidden is None else len(self.teacher_hidden)

    def tiles(self, tokens: int) -> Iterator[tuple[slice, bool]]:
        """Row ranges and whether they are distilled: no tile straddles the border."""
        for first, last, is_distilled in ((0, self.distilled, True), (self.distilled, tokens, False)):
            for start in range(first, last, self.tile_tokens):
                yield slice(start, min(start + self.tile_tokens, last)), is_distilled


class _FusedObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, call: _Call):
        needs_gradient = any(ctx.needs_input_grad)
        width, dtype = call.shard.width, wide(hidden.dtype)
        loss = hidden.new_zeros((), dtype=dtype)
        logprob, entropy = hidden.new_zeros(2, len(hidden), dtype=dtype)
        divergence = hidden.new_zeros(call.distilled, dtype=dtype)
        hidden_grad = torch.zeros_like(hidden) if needs_gradient else None
        weight_grad = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_gradient else None
        teacher_weight = call.teacher_weight if call.distilled else None
        kernel = _kernel(weight, teacher_weight, call.shard, call.divergence, call.temperature, min(call.tile_tokens, len(hidden)))
        for rows, is_distilled in call.tiles(len(hidden)):
            teacher_hidden = call.teacher_hidden[rows] if is_distilled else None
            *statistics, of_teacher = kernel.statistics(hidden[rows], teacher_hidden, call.targets[rows])
            logprob[rows], entropy[rows] = statistics
            if is_distilled:
                divergence[rows] = of_teacher
            tile_loss, gradients = _differentiate(call.objective, rows, logprob[rows], of_teacher)
            loss += tile_loss
            if needs_gradient:
                gradient = kernel.logits_grad(*gradients).to(hidden.dtype)
                torch.mm(gradient, weight[:width], out=hidden_grad[rows])
                if gradient.dtype == weight_grad.dtype:
                    weight_grad[:width].addmm_(gradient.t(), hidden[rows])
                else:
                    weight_grad[:width] += gradient.t() @ hidden[rows]
        if needs_gradient:
            ctx.gradients = hidden_grad, weight_grad.to(weight.dtype)
        ctx.mark_non_differentiable(logprob, entropy, divergence)
        return loss, logprob, entropy, divergence

    @staticmethod
    def backward(ctx, loss_grad: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None  # ours alone, so scaled in place: no second [V, H]
        if loss_grad.is_cuda or loss_grad != 1:
            for gradient in gradients:
                gradient.mul_(loss_grad)
        return *gradients, None


def _differentiate(objective: Objective, rows: slice, logprob: Tensor, divergence: Tensor | None):
    """The objective of one tile, and its gradients with respect to the two vectors (None for no divergence)."""
    with torch.enable_grad():
        logprob = logprob.detach().requires_grad_()
        divergence = None if divergence is None else divergence.detach().requires_grad_()
        loss = objective(rows, logprob, divergence)
        inputs = [logprob] if divergence is None else [logprob, divergence]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), (*gradients, None)[:2]
