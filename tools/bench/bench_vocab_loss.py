"""The routed loss's vocabulary pass against its bare matrix products and other ways to compute it, side by
side in one run.

    python tools/bench/bench_vocab_loss.py --tokens 512 --hidden 1024 --vocab 151936 [--tensor-parallel 2]
    [--threads 1] [--json]
    python tools/bench/bench_vocab_loss.py --sweep-tokens 2048 4096 8192      # `ours` only: its memory does not
    grow with the tokens

Every token is distilled (JSD of student and teacher plus the log-probability of the target), forward and
backward to hidden states and weight. `ratio` is to the four bare matrix products; `extra_bytes` is peak
memory above the inputs and their gradients; `error` is the largest relative error of loss, dHidden and
dWeight against float64 on the same inputs (norms of differences). `pip install trl liger-kernel` adds their
rows; a row that cannot run is named under `skipped`, with the reason.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import gc
import importlib
import json
import math
import platform
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.fused import fused_objective
from megatron_srpo.vocab_parallel.logits import Projection
from megatron_srpo.vocab_parallel.shard import VocabShard, all_reduce

TOP_K = 100
LOG_PROB = 0.1  # the log-probability's share in the loss
GEMM_TOKENS = {"cpu": 256, "cuda": 1024}  # a tile of the bare products, where --chunk does not say
EXACT_TOKENS = 128  # float64 tokens at a time
TRL, LIGER = "trl.experimental.sdpo.loss_utils", "liger_kernel.transformers.fused_linear_jsd"


class Inputs(NamedTuple):
    """hidden, teacher_hidden [T, H]; weight, teacher_weight [padded_width, H], the shard's rows; targets
    [T].
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor
    shard: VocabShard


Result = tuple[Tensor | None, Tensor, Tensor]  # loss, dHidden, dWeight


def bare_gemms(x: Inputs, chunk: int | None) -> Callable[[], Result]:
    """The four products any method needs, into buffers that exist: student and teacher logits, dHidden,
    dWeight.
    """
    chunk = min(chunk or GEMM_TOKENS[x.hidden.device.type], len(x.hidden))
    tile = x.hidden.new_empty(chunk, len(x.weight))
    hidden_grad, weight_grad = torch.zeros_like(x.hidden), torch.zeros_like(x.weight)

    def call() -> Result:
        for start in range(0, len(x.hidden), chunk):
            rows = slice(start, start + chunk)
            hidden = x.hidden[rows]
            logits = tile[: len(hidden)]
            torch.mm(hidden, x.weight.t(), out=logits)
            torch.mm(x.teacher_hidden[rows], x.teacher_weight.t(), out=logits)
            torch.mm(logits, x.weight, out=hidden_grad[rows])
            weight_grad.addmm_(logits.t(), hidden)
        return None, hidden_grad, weight_grad

    return call


def ours(
    x: Inputs, chunk: int | None, divergence: Divergence = Divergence(), weight_grad: Tensor | None = None
) -> Tensor:  # noqa: B008
    """megatron_srpo.vocab_parallel.fused; without a chunk, in tiles of its own choice."""

    def objective(rows, of_tile) -> Tensor:
        return (of_tile.divergence - LOG_PROB * of_tile.logprob).sum() / len(x.hidden)

    student, teacher = Projection(x.hidden, x.weight), Projection(x.teacher_hidden, x.teacher_weight)
    options = {"teacher": teacher, "divergence": divergence, "tile_tokens": chunk, "weight_grad": weight_grad}
    return fused_objective(student, x.targets, objective, x.shard, **options)[0]


def into_main_grad(x: Inputs, chunk: int | None) -> Callable[[], Result]:
    """`ours` as the trainer calls it: dWeight is added to a buffer that exists, as that of the bare products
    does.
    """
    weight_grad = torch.zeros_like(x.weight, dtype=torch.float32)

    def call() -> Result:
        own = x._replace(hidden=x.hidden.detach().requires_grad_(), weight=x.weight.detach().requires_grad_())
        weight_grad.zero_()
        value = ours(own, chunk, weight_grad=weight_grad)
        value.backward()
        return value.detach(), own.hidden.grad, weight_grad

    return call


def autograd(
    x: Inputs, chunk: int | None, divergence: Callable[[Tensor, Tensor], Tensor], log_prob: float = LOG_PROB
) -> Tensor:
    """torch autograd over whole [T, V] logits, in the inputs' dtype."""
    logits = x.hidden @ x.weight.t()
    with torch.no_grad():
        teacher_logits = x.teacher_hidden @ x.teacher_weight.t()
    logprob = logits.gather(1, x.targets[:, None])[:, 0] - logits.logsumexp(1)
    return (divergence(logits, teacher_logits) - log_prob * logprob).sum() / len(x.hidden)


def trl(x: Inputs, chunk: int | None, function: str, **options) -> Tensor:
    """The same with a divergence of TRL's SDPO trainer."""
    divergence = getattr(importlib.import_module(TRL), function)
    return autograd(x, chunk, functools.partial(divergence, distillation_alpha=0.5, **options))


def liger(x: Inputs, chunk: int | None) -> Tensor:
    """Liger's fused linear JSD, in chunks of its own choice.

    It knows no log-probability: this row's loss is the JSD alone.
    """
    return importlib.import_module(LIGER).LigerFusedLinearJSD(jsd_beta=0.5)(*x[:4], None)


def _jsd(logp: Tensor, logq: Tensor) -> Tensor:
    logm = torch.logaddexp(logp, logq) - math.log(2)
    return 0.5 * ((logp.exp() * (logp - logm)).sum(1) + (logq.exp() * (logq - logm)).sum(1))


def _full_jsd(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return _jsd(logits.log_softmax(1), teacher_logits.log_softmax(1))


def _top_k_jsd(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    ids = logits.detach().topk(TOP_K, dim=1).indices

    def buckets(z: Tensor) -> Tensor:
        head = z.gather(1, ids) - z.logsumexp(1, keepdim=True)
        inside = head.logsumexp(1, keepdim=True).clamp(max=-1e-7)
        return torch.cat([head, torch.log(-torch.expm1(inside))], dim=1)

    return _jsd(buckets(logits), buckets(teacher_logits))


def differentiated(
    loss: Callable[..., Tensor], **options
) -> Callable[[Inputs, int | None], Callable[[], Result]]:
    """(inputs, chunk) -> the call that makes the loss and its gradients, and keeps nothing for the next one."""

    def call(x: Inputs, chunk: int | None) -> Result:
        x = x._replace(hidden=x.hidden.detach().requires_grad_(), weight=x.weight.detach().requires_grad_())
        value = loss(x, chunk, **options)
        value.backward()
        return value.detach(), x.hidden.grad, x.weight.grad

    return lambda x, chunk: functools.partial(call, x, chunk)


class Method(NamedTuple):
    """How a row's result is made, its loss as `exact` can compute it, the module it needs, and where it can
    run.
    """

    prepare: Callable[[Inputs, int | None], Callable[[], Result]]
    loss: Callable[..., Tensor] | None
    module: str = "torch"
    sharded: bool = False
    cuda_only: bool = False


FULL, TOP = (
    functools.partial(autograd, divergence=_full_jsd),
    functools.partial(autograd, divergence=_top_k_jsd),
)
JSD_ALONE = functools.partial(autograd, divergence=_full_jsd, log_prob=0.0)
TOP_OURS = Divergence(support="student_topk", top_k=TOP_K)
TOP_TRL = {
    "function": "compute_topk_self_distillation_loss",
    "distillation_topk": TOP_K,
    "distillation_add_tail": True,
}
# "top-100 + tail" is the papers' approximation, another loss: the student's likeliest ids and a bucket for
# the rest
METHODS = {
    "gemms": Method(bare_gemms, None, sharded=True),
    "ours": Method(differentiated(ours), FULL, sharded=True),
    "ours, into main_grad": Method(into_main_grad, FULL, sharded=True),
    "ours, top-100 + tail": Method(differentiated(ours, divergence=TOP_OURS), TOP, sharded=True),
    "naive autograd": Method(differentiated(FULL), FULL),
    "top-100 + tail": Method(differentiated(TOP), TOP),
    "TRL full": Method(differentiated(trl, function="compute_full_logit_self_distillation_loss"), FULL, TRL),
    "TRL top-100 + tail": Method(differentiated(trl, **TOP_TRL), TOP, TRL),
    "Liger fused JSD": Method(differentiated(liger), JSD_ALONE, LIGER, cuda_only=True),
}


def why_not(name: str, options: argparse.Namespace) -> str | None:
    """Why this row cannot run, or None. Imports what it needs now, not while its memory is measured."""
    method = METHODS[name]
    if options.tensor_parallel > 1 and not method.sharded:
        return "computes on a whole vocabulary only"
    if method.cuda_only and options.device != "cuda":
        return "runs on CUDA only"
    try:
        importlib.import_module(method.module)
    except ImportError as error:
        return str(error) or repr(error)
    return None


def make_inputs(tokens: int, options: argparse.Namespace, device: torch.device) -> Inputs:
    """Random states whose softmax is peaked as a language model's; the teacher is near the student.

    The whole vocabulary.
    """
    hidden, vocab, dtype = options.hidden, options.vocab, getattr(torch, options.dtype)
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    student, weight = draw(tokens, hidden), draw(vocab, hidden) * (3 / math.sqrt(hidden))
    teacher, teacher_weight = (
        student + 0.3 * draw(tokens, hidden),
        weight + draw(vocab, hidden) * (0.3 / math.sqrt(hidden)),
    )
    targets = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    return Inputs(
        *(tensor.to(dtype) for tensor in (student, weight, teacher, teacher_weight)),
        targets,
        VocabShard(0, vocab, vocab),
    )


def own_part(full: Inputs) -> Inputs:
    """This rank's rows of the weights, padded to the same number on every rank."""
    if not dist.is_initialized():
        return full
    padded_width = -(-full.shard.vocab_size // dist.get_world_size())
    shard = VocabShard.of_rank(dist.get_rank(), padded_width, full.shard.vocab_size, dist.group.WORLD)
    own = lambda w: torch.nn.functional.pad(
        w[shard.start : shard.start + shard.width], (0, 0, 0, padded_width - shard.width)
    )  # noqa: E731
    return full._replace(weight=own(full.weight), teacher_weight=own(full.teacher_weight), shard=shard)


def exact(full: Inputs, loss: Callable[..., Tensor]) -> Result:
    """Float64 over the whole vocabulary, a chunk of tokens at a time."""
    weight, teacher_weight = full.weight.double().requires_grad_(), full.teacher_weight.double()
    total, hidden_grads = 0.0, []
    for start in range(0, len(full.hidden), EXACT_TOKENS):
        rows = slice(start, start + EXACT_TOKENS)
        hidden, teacher_hidden = (
            full.hidden[rows].double().requires_grad_(),
            full.teacher_hidden[rows].double(),
        )
        part = Inputs(hidden, weight, teacher_hidden, teacher_weight, full.targets[rows], full.shard)
        part_loss = loss(part, None) * (len(hidden) / len(full.hidden))
        part_loss.backward()
        total = total + part_loss.detach()
        hidden_grads.append(hidden.grad)
    return total, torch.cat(hidden_grads), weight.grad


def error_of(result: Result, wanted: Result, shard: VocabShard) -> float:
    """Largest relative error of the loss, of dHidden summed over the ranks, and of this rank's rows of
    dWeight.
    """
    loss, hidden_grad, weight_grad = (tensor.double() for tensor in result)
    all_reduce(hidden_grad, shard.group)
    own_rows = slice(shard.start, shard.start + shard.width)
    pairs = ((loss, wanted[0]), (hidden_grad, wanted[1]), (weight_grad[: shard.width], wanted[2][own_rows]))
    return (
        torch.stack([(found - expected).norm() / expected.norm() for found, expected in pairs]).max().item()
    )


def memory(device: torch.device, most: bool = False) -> int:
    """Bytes in use, or the most in use since the last call without `most`."""
    if device.type == "cuda":
        if not most:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    libc, mmap_threshold, trim_threshold = ctypes.CDLL(None), -3, -1
    if most:  # the largest that glibc comes to by itself, so that timings are the usual ones
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 64 * 2**20)
    else:
        gc.collect()
        libc.mallopt(
            mmap_threshold, 2**20
        )  # tensors go back to the system when freed, not into the holes of a heap
        libc.malloc_trim(0)  # else what earlier rows freed would be used again without being counted
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(name: str, x: Inputs, chunk: int | None, repeats: int, wanted: Result | None = None) -> dict:
    """One row, of the worst rank: best of `repeats` after one warm-up, peak memory without the gradients,
    error.
    """
    prepare, device = METHODS[name].prepare, x.hidden.device
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed() -> tuple[Result, float]:
        if x.shard.is_split:
            dist.barrier()
        synchronise()
        start = time.perf_counter()
        result = method()
        synchronise()
        return result, time.perf_counter() - start

    few = x._replace(**{key: getattr(x, key)[:16] for key in ("hidden", "teacher_hidden", "targets")})
    prepare(few, chunk)()  # the libraries' code and workspaces are no part of any method's memory
    before = memory(device)
    method = prepare(x, chunk)
    result, first = timed()
    extra_bytes = (
        memory(device, most=True)
        - before
        - sum(tensor.numel() * tensor.element_size() for tensor in result[1:])
    )
    error = 0.0 if wanted is None else error_of(result, wanted, x.shard)
    del result
    seconds = [timed()[1] for _ in range(repeats)] or [first]
    numbers = torch.tensor([max(0, extra_bytes), error, *seconds], dtype=torch.float64, device=device)
    extra_bytes, error, *seconds = all_reduce(numbers, x.shard.group, dist.ReduceOp.MAX).tolist()
    row = {"name": name, "seconds": min(seconds), "extra_bytes": int(extra_bytes)}
    return row if wanted is None else row | {"error": error}


def table(options: argparse.Namespace, device: torch.device) -> tuple[list[dict], dict[str, str]]:
    """The rows, the bare products first, and why others are missing."""
    names = list(dict.fromkeys(["gemms", *options.methods]))
    skipped = {name: reason for name in names if (reason := why_not(name, options))}
    names = [name for name in names if name not in skipped]
    x = make_inputs(options.tokens, options, device)
    losses = set() if options.no_error else {METHODS[name].loss for name in names} - {None}
    wanted = {loss: exact(x, loss) for loss in losses}
    x = own_part(x)
    rows = []
    for name in names:
        try:
            rows.append(measure(name, x, options.chunk, options.repeats, wanted.get(METHODS[name].loss)))
        except torch.OutOfMemoryError as error:  # what holds whole logits may not fit where the others do
            if METHODS[name].sharded:
                raise
            skipped[name] = str(error)
    return [row | {"ratio": row["seconds"] / rows[0]["seconds"]} for row in rows], skipped


def sweep(options: argparse.Namespace, device: torch.device) -> list[dict]:
    """`ours` at several numbers of tokens, once each."""
    one = lambda tokens: measure(
        "ours", own_part(make_inputs(tokens, options, device)), options.chunk, repeats=0
    )  # noqa: E731
    return [one(tokens) | {"name": f"ours T={tokens}"} for tokens in options.sweep_tokens]


def show(
    options: argparse.Namespace, device: torch.device, rows: list[dict], skipped: dict[str, str]
) -> None:
    """Print, and append to --output."""
    names = ("tokens", "hidden", "vocab", "tensor_parallel", "chunk", "dtype", "threads")
    shape = {name: getattr(options, name) for name in names} | (
        {"tokens": options.sweep_tokens} if options.sweep_tokens else {}
    )
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {options.threads} threads"
    )
    report = {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "shape": shape,
        "rows": rows,
        "skipped": skipped,
    }
    if options.output:
        with options.output.open("a") as file:
            file.write(json.dumps(report) + "\n")
    if options.json:
        print(json.dumps(report))
        return
    print(f"{name}, {report['date']}, {shape}")
    for row in rows:
        ratio = f"{row['ratio']:5.2f}" if "ratio" in row else ""
        error = f"  error {row['error']:.1e}" if "error" in row else ""
        print(
            f"{row['name']:>20}  {row['seconds']:8.3f} s  {ratio}  +{row['extra_bytes'] / 2**20:7.0f} MiB{error}"
        )
    for name, reason in skipped.items():
        print(f"{name:>20}  skipped: {reason}")


def run(rank: int, options: argparse.Namespace, meeting: str | None = None) -> None:
    """One rank's measurements; the first rank shows them.

    The ranks of a tensor-parallel group meet at the file `meeting`.
    """
    torch.set_num_threads(options.threads)
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if meeting is not None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{meeting}", rank=rank, world_size=options.tensor_parallel
        )
    rows, skipped = (sweep(options, device), {}) if options.sweep_tokens else table(options, device)
    if rank == 0:
        show(options, device, rows, skipped)
    if meeting is not None:
        dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="N processes, each with its vocabulary shard",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        help=f"tokens a tile (the library's own choice; for the bare products {GEMM_TOKENS})",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--sweep-tokens", type=int, nargs="+", metavar="T", help="instead of the rows: `ours` once at each T"
    )
    parser.add_argument("--no-error", action="store_true", help="skip the float64 reference")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="append the JSON object to FILE, as one line"
    )
    options = parser.parse_args()
    if options.tensor_parallel > 1:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                run, args=(options, f"{folder}/meeting"), nprocs=options.tensor_parallel
            )
    else:
        run(0, options)


if __name__ == "__main__":
    main()
