"""Log-probabilities, entropies and divergences as vectors that autograd can use in any expression.

Each takes its logits from `Logits` ([T, padded_width], this rank's columns) or a `Projection` (hidden [T, H],
weight [padded_width, H]) and returns [T] in fp32 (float64 for float64 inputs), the same on every
tensor-parallel rank. Inputs may be bf16, fp32 or float64; a tile of them at a time is fp32 (float64).

Backward makes every tile's logits a second time, because the gradient of [T] is known only then: with
projections that is one matrix product more for each side than `fused_objective`, which is told the objective
beforehand. Memory beyond inputs, their gradients and [T]: the tiles (`fused.MEMORY`, or `memory` bytes),
whatever T. Collectives a tile, each way: one all-gather of [4, n] fp32, with a teacher of [4, 2, n] and, on
the full support, [2, n]; see `tail.TailKernel` for top K.

The gradient to `hidden` is this rank's share, to be summed over the tensor-parallel ranks; to logits and
weight it is whole. No gradient flows to a teacher. All raise ValueError, on every rank together, as
`fused_objective` does. Options of all: `temperature` (divides the logits), `tile_tokens`, `memory`; `targets`
holding `IGNORED` give 0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence, Support
from megatron_srpo.vocab_parallel.fused import PassInputs, TiledPass
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Student, Teacher
from megatron_srpo.vocab_parallel.shard import VocabShard


def log_prob(source: Student, targets: Tensor, shard: VocabShard, **options) -> Tensor:
    """log p(y) = z_y - log Σ_v exp z_v, [T]; its negative is the vocab-parallel cross-entropy.

    targets: [T] int64 ids y. Gradient 1[v = y] - p_v. Collectives a tile: one all-gather of [4, n].
    """
    return _statistics(0, source, shard, targets=targets, **options)


def entropy(
    source: Student | Teacher, shard: VocabShard, *, targets: Tensor | None = None, **options
) -> Tensor:
    """H = -Σ_v p_v log p_v, [T] nats, over the full vocabulary.

    Gradient -p_v (log p_v + H); of a teacher (also a `InterpolatedLogits`), a constant. Collectives a tile: one
    all-gather of [4, n].
    """
    return _statistics(1, source, shard, targets=targets, **options)


def forward_kl(
    source: Student,
    teacher: Teacher,
    shard: VocabShard,
    *,
    support: Support = "full",
    top_k: int = 100,
    **options,
) -> Tensor:
    """KL(q‖p) = Σ_v q_v (log q_v - log p_v), [T], p the student and q the teacher.

    teacher: D ≤ T tokens' logits, of the first D; the result is [D]. support: all but "sampled".
    Gradient p_v - q_v (full support). Collectives a tile: all-gathers of
    [4, 2, n] and [2, n].
    """
    return _statistics(
        2, source, shard, teacher, Divergence("forward", support=support, top_k=top_k), **options
    )


def reverse_kl(
    source: Student,
    teacher: Teacher,
    shard: VocabShard,
    *,
    support: Support = "full",
    top_k: int = 100,
    targets: Tensor | None = None,
    **options,
) -> Tensor:
    """KL(p‖q) = Σ_v p_v (log p_v - log q_v), p the student and q the teacher.

    teacher: D ≤ T tokens' logits, of the first D; the result is [D]. support: any; "sampled" needs `targets`
    drawn from p and gives log p(y) - log q(y), with the gradient (log p(y) - log q(y)) (1[v = y] - p_v), both
    unbiased. Gradient p_v (log p_v - log q_v - KL) (full support). Collectives a tile: all-gathers of [4, 2,
    n] and, unless sampled, [2, n].
    """
    return _statistics(
        2,
        source,
        shard,
        teacher,
        Divergence("reverse", support=support, top_k=top_k),
        targets=targets,
        **options,
    )


def jsd(
    source: Student,
    teacher: Teacher,
    shard: VocabShard,
    *,
    alpha: float = 0.5,
    support: Support = "full",
    top_k: int = 100,
    **options,
) -> Tensor:
    """(1-α) KL(p‖m) + α KL(q‖m) with m = (1-α)p + αq, [T], p the student and q the teacher; at most ln 2 for
    α = ½.

    teacher: D ≤ T tokens' logits, of the first D; the result is [D]. support: all but "sampled".
    Gradient (1-α) p_v (log p_v - log m_v - KL(p‖m)) (full support).
    Collectives a tile: all-gathers of [4, 2, n] and [2, n].
    """
    return _statistics(2, source, shard, teacher, Divergence("jsd", alpha, support, top_k), **options)


def _statistics(
    which: int, source, shard: VocabShard, teacher=None, divergence: Divergence = Divergence(), **options
) -> Tensor:  # noqa: B008
    needs = (("targets",), (), ("teacher",))[which]
    problem = PassInputs(
        source, options.pop("targets", None), shard, teacher, divergence, needs=needs, **options
    )
    if isinstance(source, InterpolatedLogits):
        with torch.no_grad():
            return TiledPass(problem).all_statistics(distilled_only=which == 2)[which]
    return _PerToken.apply(problem, which, *source)


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: PassInputs, which: int, *student: Tensor):
        ctx.problem, ctx.which = problem._replace(student=None), which
        ctx.kind = type(problem.student)
        others = [] if problem.targets is None else [problem.targets]
        # Saved by torch, all of them, so that a change in place before backward is an error.
        ctx.save_for_backward(*student, *others, *_tensors(problem.teacher))
        return TiledPass(problem).all_statistics(distilled_only=which == 2)[which]

    @staticmethod
    def backward(ctx, values_grad: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("vocab_parallel: there is no gradient of these gradients (create_graph)")
        student = ctx.kind(*ctx.saved_tensors[: len(ctx.kind._fields)])
        sweep = TiledPass(ctx.problem._replace(student=student))
        collector = student.gradients(ctx.needs_input_grad[2:])
        statistics = sweep.empty_statistics()
        for rows, is_distilled in sweep.tiles(distilled_only=ctx.which == 2):
            sweep.statistics(rows, is_distilled, statistics)
            gradients = [None, None, None]
            gradients[ctx.which] = values_grad[rows].to(sweep.dtype)
            for product in collector.products(rows, sweep.logits_grad(tuple(gradients))):
                product()
        return None, None, *collector.results()


def _tensors(teacher: Teacher | None) -> list[Tensor]:
    if isinstance(teacher, InterpolatedLogits):
        return [*teacher.reference, *teacher.policy]
    return [] if teacher is None else list(teacher)
