"""Compare the vocabulary pass on a GPU with float64 on the same inputs.

Triton kernels, and bf16 products with fp32 results.

python -m pytest tests/gpu
"""

import pytest
import torch

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.fused import fused_objective, score
from megatron_srpo.vocab_parallel.kernels.choice import describe_kernel
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Projection
from megatron_srpo.vocab_parallel.shard import VocabShard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

T, D, H, V, PADDED = 300, 170, 256, 20_011, 20_096
KINDS = [Divergence("jsd", 0.5), Divergence("jsd", 0.2), Divergence("forward"), Divergence("reverse")]
KINDS += [
    Divergence("reverse", support="sampled"),
    Divergence(support="student_topk"),
    Divergence(support="teacher_topk"),
]


def inputs(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device="cuda")  # noqa: E731
    hidden, weight = draw(T, H), draw(PADDED, H) * 3 / H**0.5
    teacher_hidden, teacher_weight = hidden[:D] + 0.3 * draw(D, H), weight + 0.3 * draw(PADDED, H) / H**0.5
    weight[V:] = teacher_weight[V:] = 50.0  # padded rows would win every softmax
    targets = torch.randint(0, V, (T,), generator=generator, device="cuda")
    return *(x.to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight)), targets


def run(kind, hidden, weight, teacher_hidden, teacher_weight, targets, share=0.0, **options):
    """Return (loss, dHidden, dWeight) and the statistics.

    share: of the student's own logits in the teacher's.
    """
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    teacher = Projection(teacher_hidden, teacher_weight)
    if share:
        teacher = InterpolatedLogits(teacher, Projection(hidden.detach()[:D], weight.detach()), share)

    def objective(rows, tile):
        loss = -tile.logprob.sum() - 0.1 * tile.entropy.sum()
        return loss if tile.divergence is None else loss + 3.0 * tile.divergence.sum()

    loss, statistics = fused_objective(
        Projection(hidden, weight),
        targets,
        objective,
        VocabShard(0, V, V),
        teacher=teacher,
        divergence=kind,
        **options,
    )
    loss.backward()
    return (loss.detach(), hidden.grad, weight.grad), statistics


def error(found, expected):
    """Return the norm of the difference, relative to the expected norm."""
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "dtype, of_values, of_gradients", [(torch.float32, 2e-6, 5e-6), (torch.bfloat16, 2e-6, 1e-2)]
)
def test_against_float64(kind, dtype, of_values, of_gradients):
    # bf16 products keep fp32 results: the statistics are as exact as in fp32, the gradients to bf16's
    # rounding.
    given = inputs(dtype)
    assert describe_kernel(torch.device("cuda"), dtype, Divergence()) == "Triton"
    found, statistics = run(kind, *given, tile_tokens=128)
    expected, exact_statistics = run(kind, *(x.double() for x in given[:4]), given[4])
    if kind.support.endswith("topk"):
        of_values = 1e-3  # which of two nearly equal logits is the 100th
    for ours, exact in zip((found[0], *statistics), (expected[0], *exact_statistics), strict=True):
        assert error(ours, exact) < of_values
    for ours, exact in zip(found[1:], expected[1:], strict=True):
        assert ours.dtype == dtype and error(ours, exact) < of_gradients
    assert found[2][V:].abs().max() == 0


def test_mixed_teacher_and_temperature():
    # Two products are summed in fp32, and logits divided by the temperature.
    given = inputs(torch.bfloat16)
    options = {"share": 0.25, "temperature": 0.7}
    found, statistics = run(KINDS[0], *given, tile_tokens=128, **options)
    expected, exact_statistics = run(KINDS[0], *(x.double() for x in given[:4]), given[4], **options)
    assert all(
        error(ours, exact) < 5e-6
        for ours, exact in zip((found[0], *statistics), (expected[0], *exact_statistics), strict=True)
    )
    assert all(error(ours, exact) < 1e-2 for ours, exact in zip(found[1:], expected[1:], strict=True))


def test_float64_on_the_gpu_is_float64_on_the_cpu():
    given = inputs(torch.float64)
    on_cpu = run(KINDS[0], *(x.cpu() for x in given))
    for ours, exact in zip(run(KINDS[0], *given)[0], on_cpu[0], strict=True):
        assert error(ours.cpu(), exact) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_accumulates_in_fp32(dtype):
    given = inputs(dtype)
    buffer = torch.full((PADDED, H), 0.5, device="cuda")
    (_, hidden_grad, weight_grad), _ = run(KINDS[0], *given, tile_tokens=128, weight_grad=buffer)
    (_, expected_hidden, _), _ = run(KINDS[0], *given, tile_tokens=128)
    _, _, exact = run(KINDS[0], *(x.double() for x in given[:4]), given[4])[0]
    assert weight_grad is None and torch.equal(hidden_grad, expected_hidden)
    assert error(buffer - 0.5, exact) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_memory_is_that_of_the_tiles():
    # At most three fp32 tiles beyond inputs and gradients, whatever T.
    extra = []
    for repeats in (4, 16):
        hidden, weight, _, teacher_weight, _ = inputs(torch.bfloat16)
        hidden = hidden.repeat(repeats, 1).requires_grad_()
        targets = torch.zeros(len(hidden), dtype=torch.int64, device="cuda")
        teacher = Projection(hidden.detach().clone(), teacher_weight)
        buffer = torch.zeros(PADDED, H, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = fused_objective(
            Projection(hidden, weight.requires_grad_()),
            targets,
            lambda rows, tile: tile.divergence.sum(),
            VocabShard(0, V, V),
            teacher=teacher,
            tile_tokens=256,
            weight_grad=buffer,
        )
        loss.backward()
        torch.cuda.synchronize()
        extra.append(torch.cuda.max_memory_allocated() - before - 2 * hidden.grad.nbytes)
    assert extra[0] < 3 * 256 * V * 4
    assert extra[1] - extra[0] < 64 * 12 * T  # vectors of T numbers


def test_score_of_bf16():
    hidden, weight, *_, targets = inputs(torch.bfloat16)
    found = score(Projection(hidden, weight), targets, VocabShard(0, V, V))
    exact = score(Projection(hidden.double(), weight.double()), targets, VocabShard(0, V, V))
    assert error(found.logprob, exact.logprob) < 2e-6 and error(found.entropy, exact.entropy) < 2e-6
