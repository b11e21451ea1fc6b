"""The Triton kernels, run by Triton's interpreter on the CPU and compiled for an H100 that need not be
there.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("triton")

from megatron_srpo.vocab_parallel import fused, logits  # noqa: E402
from megatron_srpo.vocab_parallel.divergence import Divergence  # noqa: E402
from megatron_srpo.vocab_parallel.fused import Statistics, fused_objective  # noqa: E402
from megatron_srpo.vocab_parallel.kernels.exact import ExactKernel  # noqa: E402
from megatron_srpo.vocab_parallel.kernels.topk import TailKernel  # noqa: E402
from megatron_srpo.vocab_parallel.kernels.triton import TritonPasses  # noqa: E402
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Logits, Projection  # noqa: E402
from megatron_srpo.vocab_parallel.shard import VocabShard  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))  # the spawned processes find their neighbours too
from exact import relative_error  # noqa: E402
from test_fused import Problem, assert_close  # noqa: E402

KINDS = [
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


def triton_kernel(tile_tokens, shard, divergence, own):
    passes = TritonPasses(tile_tokens, shard.width, torch.float32, divergence, own.device)
    return (TailKernel if divergence.support.endswith("topk") else ExactKernel)(passes, shard, divergence)


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """Every test runs the Triton kernels."""
    monkeypatch.setattr(fused, "_kernel", triton_kernel)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_divergence(kind, temperature):
    problem = Problem(dtype=torch.float32)
    assert_close(problem.fused(kind, temperature, tile_tokens=4), problem.exact(kind, temperature), FP32)


@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_rows_of_several_blocks(kind):
    """Running maxima and sums over blocks of 4096 columns, the last one partly filled."""
    problem = Problem(4, 2, 9001, 9008, dtype=torch.float32)
    assert_close(problem.fused(kind), problem.exact(kind), FP32)


@pytest.mark.parametrize("distilled", [0, 5])
def test_tokens_without_a_teacher(distilled):
    problem = Problem(7, distilled, dtype=torch.float32)
    assert_close(problem.fused(tile_tokens=3), problem.exact(), FP32)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_student_equal_to_teacher_has_nothing_to_learn(kind):
    problem = Problem(9, 9, dtype=torch.float32)
    problem.teacher_hidden, problem.teacher_weight = problem.hidden.clone(), problem.weight.clone()
    problem.a.zero_()
    problem.b.zero_()
    for found in (*(result := problem.fused(kind))[0], result[1].divergence):
        assert found.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_extremes_against_plain_torch(kind, monkeypatch):
    """±10⁴, one-hot distributions and -inf columns: finite, and what the reference kernel says of the same
    logits.
    """
    inf = float("inf")
    rows = torch.tensor(
        [
            [1e4, -1e4, -1e4, 0.0, -inf],
            [-1e4, 1e4, -1e4, 0.0, -inf],
            [0.0, 0.0, 0.0, 0.0, -inf],
            [-5e3, -1e4, 9e3, 9e3, -inf],
        ]
    )
    student, teacher = rows.repeat_interleave(4, 0), rows.repeat(4, 1)
    targets = torch.arange(16) % 4

    def results():
        logits = student.clone().requires_grad_()
        loss, statistics = fused_objective(
            Logits(logits),
            targets,
            lambda _, tile: sum(x.sum() for x in tile),
            VocabShard(0, 5, 5),
            teacher=Logits(teacher),
            divergence=kind,
        )
        loss.backward()
        return logits.grad, *statistics

    found = results()
    monkeypatch.setattr(
        fused, "_kernel", lambda tile_tokens, shard, divergence, own: fused.ReferenceKernel(shard, divergence)
    )
    for ours, plain in zip(found, results(), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert (found[0][:, 4] == 0).all()


def test_nan_is_not_hidden():
    """A NaN logit must reach the loss, where the trainer sees it: comparisons and maxima like to lose it."""
    problem = Problem(dtype=torch.float32)
    problem.hidden[3, 2] = float("nan")
    (loss, hidden_grad, _), statistics = problem.fused()
    assert (
        loss.isnan()
        and statistics.entropy[3].isnan()
        and statistics.logprob[3].isnan()
        and hidden_grad[3].isnan().any()
    )


def run_rank(rank: int, store: str, results: str) -> None:
    """Two ranks, tiles of three tokens: the collectives overlap the products of the tile before."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    fused._kernel = triton_kernel
    problem = Problem(13, 7, dtype=torch.float32)
    own = slice(rank * 16, (rank + 1) * 16)
    shard = VocabShard.of_rank(rank, 16, problem.vocab_size, dist.group.WORLD)
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight[own].clone().requires_grad_()
    teacher = Projection(problem.teacher_hidden, problem.teacher_weight[own])
    loss, statistics = fused_objective(
        Projection(hidden, weight), problem.targets, problem.objective, shard, teacher=teacher, tile_tokens=3
    )
    loss.backward()
    dist.all_reduce(hidden.grad)
    gathered = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(gathered, weight.grad)
    if rank == 0:
        torch.save([loss.detach(), hidden.grad, torch.cat(gathered), *statistics], results)
    dist.destroy_process_group()


def test_overlapped_collectives(tmp_path):
    mp.spawn(run_rank, (str(tmp_path / "store"), str(tmp_path / "results")), nprocs=2)
    loss, hidden_grad, weight_grad, *statistics = torch.load(tmp_path / "results", weights_only=True)
    expected = Problem(13, 7, dtype=torch.float32).exact()
    assert_close(((loss, hidden_grad, weight_grad), Statistics(*statistics)), expected, FP32)


@pytest.fixture(params=["torch 2.9", "torch 2.10"])
def products_of_cuda(monkeypatch, request):
    """bf16 matrices are multiplied as on CUDA: fp32 results by `mm`, and, only since torch 2.10, added to
    fp32 by `addmm`.
    """
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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_products_of_bf16_matrices(temperature, products_of_cuda):
    """Over several blocks of vocabulary columns, accumulated over tiles: fp32 results, of which only the
    gradients are rounded.
    """
    problem = Problem(9, 5, 9001, 9008, width=16, dtype=torch.bfloat16)
    found, expected = (
        problem.fused(temperature=temperature, tile_tokens=4),
        problem.exact(temperature=temperature),
    )
    assert_close(found, expected, 0.01)
    assert_close(((), found[1]), ((), expected[1]), FP32)


def test_products_of_a_mixture(products_of_cuda):
    problem = Problem(9, 9, 9001, 9008, width=16, dtype=torch.bfloat16)
    pairs = (problem.hidden, problem.weight), (problem.teacher_hidden, problem.teacher_weight)
    tile = torch.full((9, 9001), torch.nan)
    InterpolatedLogits(*(Projection(*pair) for pair in pairs), 0.25).write(slice(0, 9), tile, 0.5)
    one, other = (hidden.double() @ weight[:9001].double().t() for hidden, weight in pairs)
    assert relative_error(tile, 0.5 * (0.75 * one + 0.25 * other)) < FP32


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_srpo.vocab_parallel.kernels import triton as cuda

pointers = {name: "*fp32" for name in "logits student teacher sums maximum total of_pf of_p of_plogp of_target".split()}
types = {**pointers, "column": "*i64", **{name: "i32" for name in "sums_stride width stride count gradient_stride".split()}}

def compile(kernel, gradient="*bf16", **constants):
    known = types | {"gradient": gradient, "BLOCK": "constexpr", **dict.fromkeys(constants, "constexpr")}
    constants["BLOCK"] = cuda._BLOCK
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature={name: known[name] for name in kernel.arg_names}, constexprs=constexprs)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": cuda._WARPS}).asm["cubin"]
    print("compiled", kernel.__name__)

compile(cuda._row_sums, WEIGHTED=True)
compile(cuda._row_sums, WEIGHTED=False)
for kind in range(3):
    compile(cuda._divergence_sums, ALPHA=0.5, KIND=kind)
for kind in range(4):
    compile(cuda._gradient, ALPHA=0.5, KIND=kind, ENTROPY=kind % 2 == 0)
compile(cuda._gradient, gradient="*fp32", ALPHA=0.5, KIND=0, ENTROPY=False)
"""


def test_kernels_compile_for_an_h100(tmp_path):
    """To machine code, by the ptxas that Triton brings: what the interpreter forgives, the compiler does
    not.
    """
    import subprocess

    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("compiled") == 10


def test_relative_error_is_the_largest_difference():
    """What the tolerances above mean."""
    assert relative_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0], dtype=torch.float64)) == 0.25
