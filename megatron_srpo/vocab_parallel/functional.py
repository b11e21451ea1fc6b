"""Log-probs, entropies and divergences as [T] vectors that autograd can use in any expression.

Each function takes `Logits` or a `Projection` in bf16, fp32 or float64 and returns [T] in fp32 (float64 for
float64 inputs), identical on every tensor-parallel rank; `IGNORED` targets give 0. For the options and
errors of all functions see `fused_objective`.

The backward pass computes every tile's logits a second time, because the gradient of [T] is known only then:
one matrix product per side more than `fused_objective`. Memory beyond inputs, their gradients and [T]: the
tiles, for any T. Collectives per tile, in each pass: one all-gather of [4, n] fp32; with a teacher, of
[4, 2, n] and, on the full support, [2, n] (for top K see `TopKKernel`). The gradient to `hidden` is this
rank's share, for the caller to sum over the tensor-parallel ranks; gradients to logits and weight are
complete. No gradient flows to a teacher.
"""

import torch
from torch import Tensor
from typing_extensions import override

from megatron_srpo.vocab_parallel.divergence import Divergence, Support
from megatron_srpo.vocab_parallel.fused import PassInputs, TiledPass
from megatron_srpo.vocab_parallel.kernels.base import StatisticsGrad
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Student, Teacher
from megatron_srpo.vocab_parallel.shard import VocabShard


def log_prob(source: Student, targets: Tensor, shard: VocabShard, **options) -> Tensor:
    """Compute log p(y) = z_y - log Σ_v exp z_v, [T], for [T] int64 ids y. Gradient: 1[v = y] - p_v."""
    inputs = PassInputs(source, targets, shard, required=("targets",), **options)
    return _per_token("logprob", inputs)


def entropy(source: Teacher, shard: VocabShard, *, targets: Tensor | None = None, **options) -> Tensor:
    """Compute H = -Σ_v p_v log p_v, [T] nats. Gradient: -p_v (log p_v + H), none to `InterpolatedLogits`."""
    return _per_token("entropy", PassInputs(source, targets, shard, **options))


def forward_kl(
    source: Student, teacher: Teacher, shard: VocabShard, *, support: Support = "full", top_k=100, **options
) -> Tensor:
    """Compute KL(q‖p) = Σ_v q_v (log q_v - log p_v), [D], of student p and teacher q of the first D tokens.

    Any support but "sampled". Gradient: p_v - q_v (full support).
    """
    return _divergence(source, teacher, shard, Divergence("forward", support=support, top_k=top_k), options)


def reverse_kl(
    source: Student, teacher: Teacher, shard: VocabShard, *, support: Support = "full", top_k=100, **options
) -> Tensor:
    """Compute KL(p‖q) = Σ_v p_v (log p_v - log q_v), [D], of student p and teacher q of the first D tokens.

    Any support. Gradient: p_v (log p_v - log q_v - KL) (full support). "sampled" needs `targets` y drawn from
    p and returns log p(y) - log q(y), with gradient (log p(y) - log q(y)) (1[v = y] - p_v), both unbiased.
    """
    return _divergence(source, teacher, shard, Divergence("reverse", support=support, top_k=top_k), options)


def jsd(
    source: Student,
    teacher: Teacher,
    shard: VocabShard,
    *,
    alpha=0.5,
    support: Support = "full",
    top_k=100,
    **options,
) -> Tensor:
    """Compute (1-α) KL(p‖m) + α KL(q‖m), [D], m = (1-α)p + αq, of student p and teacher q; ≤ ln 2 for α = ½.

    Any support but "sampled". Gradient: (1-α) p_v (log p_v - log m_v - KL(p‖m)) (full support).
    """
    return _divergence(source, teacher, shard, Divergence("jsd", alpha, support, top_k), options)


def _divergence(
    source: Student, teacher: Teacher, shard: VocabShard, divergence: Divergence, options: dict
) -> Tensor:
    targets = options.pop("targets", None)
    inputs = PassInputs(source, targets, shard, teacher, divergence, required=("teacher",), **options)
    return _per_token("divergence", inputs)


def _per_token(name: str, inputs: PassInputs) -> Tensor:
    if isinstance(inputs.student, InterpolatedLogits):
        with torch.no_grad():
            return _compute(name, inputs)
    return _PerToken.apply(name, inputs, *inputs.student)


def _compute(name: str, inputs: PassInputs) -> Tensor:
    return getattr(TiledPass(inputs).all_statistics(distilled_only=name == "divergence"), name)


class _PerToken(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx, name: str, inputs: PassInputs, *student: Tensor):
        ctx.name, ctx.inputs, ctx.source = name, inputs._replace(student=None), type(inputs.student)
        targets = [] if inputs.targets is None else [inputs.targets]
        # saved through torch, which raises an error if one is changed in place before backward
        ctx.save_for_backward(*student, *targets, *_tensors(inputs.teacher))
        return _compute(name, inputs)

    @staticmethod
    @override
    def backward(ctx, values_grad: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("vocab_parallel: second derivatives (create_graph) are not implemented")
        student = ctx.source(*ctx.saved_tensors[: len(ctx.source._fields)])
        tiled_pass = TiledPass(ctx.inputs._replace(student=student))
        collector = student.gradients(ctx.needs_input_grad[2:])
        statistics = tiled_pass.empty_statistics()
        for rows, is_distilled in tiled_pass.tiles(distilled_only=ctx.name == "divergence"):
            tiled_pass.tile_statistics(rows, is_distilled, statistics)
            grads = StatisticsGrad(**{ctx.name: values_grad[rows].to(tiled_pass.dtype)})
            tiled_pass.accumulate_grad(rows, grads, collector)
        tiled_pass.finish_products()
        return None, None, *collector.results()


def _tensors(teacher: Teacher | None) -> list[Tensor]:
    if isinstance(teacher, InterpolatedLogits):
        return [*teacher.reference, *teacher.policy]
    return [] if teacher is None else list(teacher)
