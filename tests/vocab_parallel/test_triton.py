"""Test the Triton kernels: interpreted on the CPU, and compiled for an H100 that need not be present."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from exact_vocab import largest_error
from vocab_inputs import FusedCase, assert_close

pytest.importorskip("triton")

from megatron_srpo.vocab_parallel import logits  # noqa: E402
from megatron_srpo.vocab_parallel.divergence import Divergence  # noqa: E402
from megatron_srpo.vocab_parallel.fused import Statistics, fused_objective  # noqa: E402
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Logits, Projection  # noqa: E402
from megatron_srpo.vocab_parallel.shard import VocabShard  # noqa: E402

DIVERGENCES = [
    Divergence("jsd", 0.5),
    Divergence("jsd", 0.2),
    Divergence("forward"),
    Divergence("reverse"),
    Divergence("reverse", support="sampled"),
    Divergence("jsd", 0.3, "student_topk", 6),
    Divergence("forward", support="teacher_topk", top_k=6),
]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the kernels run for real: tests/gpu"
)
FP32 = 5e-6  # of the largest entry, fp32 products included


TRITON = {"kernel": "triton"}


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_divergence(divergence):
    case = FusedCase(dtype=torch.float32)
    found = case.fused(divergence, temperature=0.7, tile_tokens=4, **TRITON)
    assert_close(found, case.exact(divergence, temperature=0.7), FP32)


@pytest.mark.parametrize("divergence", DIVERGENCES[:4], ids=str)
def test_rows_of_several_blocks(divergence):
    # Running maxima and sums over blocks of 4096 columns, the last one partly filled.
    case = FusedCase(4, 2, 9001, 9008, dtype=torch.float32)
    assert_close(case.fused(divergence, **TRITON), case.exact(divergence), FP32)


@pytest.mark.parametrize("distilled", [0, 5])
def test_tokens_without_a_teacher(distilled):
    case = FusedCase(7, distilled, dtype=torch.float32)
    assert_close(case.fused(tile_tokens=3, **TRITON), case.exact(), FP32)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_student_equal_to_teacher_has_loss_and_gradient_zero(divergence):
    case = FusedCase(9, 9, dtype=torch.float32)
    case.teacher_hidden, case.teacher_weight = case.hidden.clone(), case.weight.clone()
    case.only_divergence()
    gradients, statistics = case.fused(divergence, **TRITON)
    for found in (*gradients, statistics.divergence):
        assert found.abs().max() == 0


def _extremes(divergence, kernel):
    """Return the gradient and statistics of logits of ±10⁴, one-hot distributions and -inf columns."""
    inf = float("inf")
    rows = torch.tensor(
        [
            [1e4, -1e4, -1e4, 0.0, -inf],
            [-1e4, 1e4, -1e4, 0.0, -inf],
            [0.0, 0.0, 0.0, 0.0, -inf],
            [-5e3, -1e4, 9e3, 9e3, -inf],
        ]
    )
    student, teacher = rows.repeat_interleave(4, 0).requires_grad_(), Logits(rows.repeat(4, 1))
    loss, statistics = fused_objective(
        Logits(student),
        torch.arange(16) % 4,
        lambda _, tile: sum(x.sum() for x in tile),
        VocabShard(0, 5, 5),
        teacher=teacher,
        divergence=divergence,
        kernel=kernel,
    )
    loss.backward()
    return student.grad, *statistics


@pytest.mark.parametrize("divergence", DIVERGENCES[:4], ids=str)
def test_extremes_against_plain_torch(divergence):
    found, expected = _extremes(divergence, "triton"), _extremes(divergence, "reference")
    for ours, plain in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert (found[0][:, 4] == 0).all()


def test_nan_is_not_hidden():
    # A NaN logit must reach the loss, where the trainer sees it: comparisons and maxima tend to lose it.
    case = FusedCase(dtype=torch.float32)
    case.hidden[3, 2] = float("nan")
    (loss, hidden_grad, _), statistics = case.fused(**TRITON)
    assert loss.isnan() and statistics.entropy[3].isnan() and statistics.logprob[3].isnan()
    assert hidden_grad[3].isnan().any()


def run_rank(rank: int, store: str, results: str) -> None:
    """Run one of two ranks, in tiles of three tokens: collectives overlap the products of the tile before."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    (loss, hidden_grad, weight_grad), statistics = FusedCase(13, 7, dtype=torch.float32).fused(
        rank=rank, ranks=2, group=dist.group.WORLD, tile_tokens=3, **TRITON
    )
    dist.all_reduce(hidden_grad)
    gathered = [torch.empty_like(weight_grad) for _ in range(2)]
    dist.all_gather(gathered, weight_grad)
    if rank == 0:
        torch.save([loss, hidden_grad, torch.cat(gathered), *statistics], results)
    dist.destroy_process_group()


def test_overlapped_collectives(tmp_path):
    mp.spawn(run_rank, (str(tmp_path / "store"), str(tmp_path / "results")), nprocs=2)
    loss, hidden_grad, weight_grad, *statistics = torch.load(tmp_path / "results", weights_only=True)
    expected = FusedCase(13, 7, dtype=torch.float32).exact()
    assert_close(((loss, hidden_grad, weight_grad), Statistics(*statistics)), expected, FP32)


@pytest.fixture(params=["torch 2.9", "torch 2.10"])
def products_of_cuda(monkeypatch, request):
    """Multiply bf16 matrices as on CUDA: `mm` gives fp32, and since torch 2.10 `addmm` adds to fp32."""
    mm = torch.mm

    def mm_of_cuda(left, right, *, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(left, right, out=out)
        assert left.dtype == right.dtype == torch.bfloat16 and out_dtype == torch.float32
        assert out is None or (out.dtype, out.shape) == (out_dtype, (len(left), right.shape[1]))
        return mm(left.float(), right.float(), out=out)

    def addmm_of_cuda(own, left, right, *, out_dtype, alpha=1.0, out=None):
        if request.param == "torch 2.9" and own.dtype != right.dtype:
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
        return torch.add(own, mm_of_cuda(left, right, out_dtype=out_dtype), alpha=alpha, out=out)

    monkeypatch.setattr(torch, "mm", mm_of_cuda)
    monkeypatch.setattr(torch, "addmm", addmm_of_cuda)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    logits._addmm_takes_fp32.cache_clear()
    yield
    logits._addmm_takes_fp32.cache_clear()


def test_products_of_bf16_matrices(products_of_cuda):
    # Over several blocks of columns and tiles: fp32 results, of which only the gradients are rounded.
    case = FusedCase(9, 5, 9001, 9008, width=16, dtype=torch.bfloat16)
    found = case.fused(temperature=0.7, tile_tokens=4, **TRITON)
    expected = case.exact(temperature=0.7)
    assert_close(found, expected, 0.01)
    assert_close(((), found[1]), ((), expected[1]), FP32)


def test_products_of_interpolated_logits(products_of_cuda):
    case = FusedCase(9, 9, 9001, 9008, width=16, dtype=torch.bfloat16)
    pairs = (case.hidden, case.weight), (case.teacher_hidden, case.teacher_weight)
    tile = torch.full((9, 9001), torch.nan)
    InterpolatedLogits(*(Projection(*pair) for pair in pairs), 0.25).write(
        slice(0, 9), slice(0, 9001), tile, 0.5
    )
    one, other = (hidden.double() @ weight[:9001].double().t() for hidden, weight in pairs)
    assert largest_error(tile, 0.5 * (0.75 * one + 0.25 * other)) < FP32


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_srpo.vocab_parallel.kernels import triton_ops

pointers = "logits student teacher sums maximum total pf_scale p_scale plogp_scale target_grad"
integers = "sums_stride width stride count gradient_stride"
types = {"target_columns": "*i64", **dict.fromkeys(pointers.split(), "*fp32")}
types |= dict.fromkeys(integers.split(), "i32")
target = GPUTarget("cuda", 90, 32)

def compile(kernel, gradient="*bf16", **constants):
    constants["BLOCK"] = triton_ops._BLOCK
    known = types | {"gradient": gradient, **dict.fromkeys(constants, "constexpr")}
    signature = {name: known[name] for name in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    assert triton.compile(source, target=target, options={"num_warps": triton_ops._WARPS}).asm["cubin"]
    print("compiled", kernel.__name__)

compile(triton_ops._row_sums, WEIGHTED=True)
compile(triton_ops._row_sums, WEIGHTED=False)
for divergence in range(3):
    compile(triton_ops._divergence_sums, ALPHA=0.5, DIVERGENCE=divergence)
for divergence in range(4):
    compile(triton_ops._gradient, ALPHA=0.5, DIVERGENCE=divergence, ENTROPY=divergence % 2 == 0)
compile(triton_ops._gradient, gradient="*fp32", ALPHA=0.5, DIVERGENCE=0, ENTROPY=False)
"""


def test_kernels_compile_for_an_h100(tmp_path):
    # Compiled to machine code by the ptxas that ships with Triton: the compiler is stricter than the
    # interpreter.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("compiled") == 10


def test_largest_error_is_the_largest_difference():
    assert largest_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0], dtype=torch.float64)) == 0.25
