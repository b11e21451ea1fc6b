"""Compare the routed loss's vocabulary pass with bare matrix products and other implementations.

    python tools/bench/bench_vocab_loss.py --tokens 512 --hidden 1024 --vocab 151936 [--tensor-parallel 2]
        [--threads 1] [--json]
    python tools/bench/bench_vocab_loss.py --sweep-tokens 2048 4096 8192

The second form measures `ours` only, whose memory does not grow with the tokens.

`ours` adds dWeight to an existing buffer (`main_grad`), as the trainer does; `ours, new gradient` returns it.
Every token is distilled (JSD of student and teacher plus the log-probability of the target), forward and
backward to hidden states and weight. `ratio` is to the four bare matrix products; `extra_bytes` is peak
memory above the inputs and their gradients; `error` is the largest relative error of loss, dHidden and
dWeight against float64 on the same inputs (norms of differences). `pip install trl liger-kernel` adds their
rows; a row that cannot run is named under `skipped`, with the reason.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from _baseline import baseline_tree, find_script, run_json
from _device_memory import read_peak, start_peak
from _report import Row, add_ratios, device_name, make_parser, publish
from torch import Tensor
from torch.multiprocessing.spawn import spawn

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
    """Hold hidden, teacher_hidden [T, H]; the shard's weights [padded_width, H]; targets [T]."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor
    shard: VocabShard


class Result(NamedTuple):
    """Hold loss (None where only products are made), dHidden [T, H] and dWeight [padded_width, H]."""

    loss: Tensor | None
    hidden_grad: Tensor
    weight_grad: Tensor


Prepare = Callable[[Inputs, int | None], Callable[[], Result]]  # (inputs, tokens a tile) → the call


def bare_gemms(x: Inputs, chunk: int | None) -> Callable[[], Result]:
    """Return the call of the four products any method needs: both logits, dHidden, dWeight, into buffers."""
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
        return Result(None, hidden_grad, weight_grad)

    return call


def elementwise(x: Inputs, chunk: int | None) -> Callable[[], Result]:
    """Return the call of the fewest passes by torch, in cache, that make JSD and its gradient from logits.

    Of both models: maximum, exp, sum, probability. Then two logarithms with products and sums; the gradient.
    """
    tokens, width = len(x.hidden), x.shard.width
    tiles = x.hidden.new_ones(2, min(chunk or GEMM_TOKENS[x.hidden.device.type], tokens), width)
    p, q, terms = x.hidden.new_empty(3, tiles.shape[1], 512)
    row, scale = p.new_empty(len(p)), p.new_full((len(p), 1), 1e-6)

    def block_work(student: Tensor, teacher: Tensor, *parts: Tensor) -> None:
        for logits, probability in ((student, parts[0]), (teacher, parts[1])):
            torch.amax(logits, 1, out=row)
            torch.sum(torch.exp2(logits, out=probability).mul_(scale), 1, out=row)
        for probability in parts[:2]:
            torch.sum(torch.div(*parts[:2], out=parts[2]).log1p_().mul_(probability), 1, out=row)
        torch.addcmul(parts[2], parts[0], scale, out=student)

    def call() -> Result:
        for _ in range(0, tokens, len(p)):
            for start in range(0, width, p.shape[1]):
                student, teacher = tiles[:, :, start : start + p.shape[1]]
                block_work(student, teacher, *(part[:, : student.shape[1]] for part in (p, q, terms)))
        return Result(None, x.hidden, x.weight)

    return call


def fused(
    x: Inputs, chunk: int | None, divergence: Divergence | None = None, weight_grad: Tensor | None = None
) -> Tensor:
    """Return the loss by megatron_srpo.vocab_parallel.fused; without a chunk, it chooses its tiles itself."""

    def objective(rows, of_tile) -> Tensor:
        return (of_tile.divergence - LOG_PROB * of_tile.logprob).sum() / len(x.hidden)

    student, teacher = Projection(x.hidden, x.weight), Projection(x.teacher_hidden, x.teacher_weight)
    return fused_objective(
        student,
        x.targets,
        objective,
        x.shard,
        teacher=teacher,
        divergence=divergence or Divergence(),
        tile_tokens=chunk,
        weight_grad=weight_grad,
    )[0]


def into_main_grad(x: Inputs, chunk: int | None) -> Callable[[], Result]:
    """Return the call of `fused` as the trainer makes it: dWeight is added to an existing buffer."""
    weight_grad = torch.zeros_like(x.weight, dtype=torch.float32)

    def call() -> Result:
        own = x._replace(hidden=x.hidden.detach().requires_grad_(), weight=x.weight.detach().requires_grad_())
        weight_grad.zero_()
        value = fused(own, chunk, weight_grad=weight_grad)
        value.backward()
        assert own.hidden.grad is not None
        return Result(value.detach(), own.hidden.grad, weight_grad)

    return call


def autograd(
    x: Inputs, chunk: int | None, divergence: Callable[[Tensor, Tensor], Tensor], log_prob: float = LOG_PROB
) -> Tensor:
    """Return the loss by torch autograd over complete [T, V] logits, in the inputs' dtype."""
    logits = x.hidden @ x.weight.t()
    with torch.no_grad():
        teacher_logits = x.teacher_hidden @ x.teacher_weight.t()
    logprob = logits.gather(1, x.targets[:, None])[:, 0] - logits.logsumexp(1)
    return (divergence(logits, teacher_logits) - log_prob * logprob).sum() / len(x.hidden)


def trl(x: Inputs, chunk: int | None, function: str, **options) -> Tensor:
    """Return the same with a divergence of TRL's SDPO trainer."""
    divergence = getattr(importlib.import_module(TRL), function)
    return autograd(x, chunk, functools.partial(divergence, distillation_alpha=0.5, **options))


def liger(x: Inputs, chunk: int | None) -> Tensor:
    """Return the loss by Liger's fused linear JSD, which chooses its chunks itself.

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


def differentiated(loss: Callable[..., Tensor], **options) -> Prepare:
    """Return how to prepare the call that makes the loss and its gradients and keeps nothing."""

    def call(x: Inputs, chunk: int | None) -> Result:
        x = x._replace(hidden=x.hidden.detach().requires_grad_(), weight=x.weight.detach().requires_grad_())
        value = loss(x, chunk, **options)
        value.backward()
        assert x.hidden.grad is not None and x.weight.grad is not None
        return Result(value.detach(), x.hidden.grad, x.weight.grad)

    return lambda x, chunk: functools.partial(call, x, chunk)


class Method(NamedTuple):
    """Describe a row: its call, its loss as `exact` computes it, the module it needs, where it runs."""

    prepare: Prepare
    loss: Callable[..., Tensor] | None
    module: str = "torch"
    sharded: bool = False
    cuda_only: bool = False


FULL = functools.partial(autograd, divergence=_full_jsd)
TOP = functools.partial(autograd, divergence=_top_k_jsd)
JSD_ALONE = functools.partial(autograd, divergence=_full_jsd, log_prob=0.0)
TOP_OURS = Divergence(support="student_topk", top_k=TOP_K)
TOP_TRL = {
    "function": "compute_topk_self_distillation_loss",
    "distillation_topk": TOP_K,
    "distillation_add_tail": True,
}
# "top-100 + tail" is the papers' approximation, another loss: the student's most likely ids and a bucket for
# the rest.
METHODS = {
    "gemms": Method(bare_gemms, None, sharded=True),
    "elementwise": Method(elementwise, None, sharded=True),
    "ours": Method(into_main_grad, FULL, sharded=True),
    "ours, new gradient": Method(differentiated(fused), FULL, sharded=True),
    "ours, top-100 + tail": Method(differentiated(fused, divergence=TOP_OURS), TOP, sharded=True),
    "naive autograd": Method(differentiated(FULL), FULL),
    "top-100 + tail": Method(differentiated(TOP), TOP),
    "TRL full": Method(differentiated(trl, function="compute_full_logit_self_distillation_loss"), FULL, TRL),
    "TRL top-100 + tail": Method(differentiated(trl, **TOP_TRL), TOP, TRL),
    "Liger fused JSD": Method(differentiated(liger), JSD_ALONE, LIGER, cuda_only=True),
}


def why_not(name: str, options: argparse.Namespace) -> str | None:
    """Return the reason that this row cannot run, or None.

    Imports its module now, not while its memory is measured.
    """
    method = METHODS[name]
    if options.tensor_parallel > 1 and not method.sharded:
        return "needs the complete vocabulary on one rank"
    if method.cuda_only and options.device != "cuda":
        return "runs on CUDA only"
    try:
        importlib.import_module(method.module)
    except ImportError as error:
        return str(error) or repr(error)
    return None


def make_inputs(tokens: int, options: argparse.Namespace, device: torch.device) -> Inputs:
    """Return random states, over the complete vocabulary.

    The softmax is peaked as a language model's, and the teacher is near the student.
    """
    hidden, vocab, dtype = options.hidden, options.vocab, getattr(torch, options.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    student = draw(tokens, hidden)
    weight = draw(vocab, hidden) * (3 / math.sqrt(hidden))
    teacher = student + 0.3 * draw(tokens, hidden)
    teacher_weight = weight + draw(vocab, hidden) * (0.3 / math.sqrt(hidden))
    targets = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    shard = VocabShard(0, vocab, vocab)
    return Inputs(
        student.to(dtype), weight.to(dtype), teacher.to(dtype), teacher_weight.to(dtype), targets, shard
    )


def shard_inputs(full: Inputs) -> Inputs:
    """Return this rank's rows of the weights, padded to the same number on every rank."""
    if not dist.is_initialized():
        return full
    padded_width = -(-full.shard.vocab_size // dist.get_world_size())
    shard = VocabShard.of_rank(dist.get_rank(), padded_width, full.shard.vocab_size, dist.group.WORLD)

    def own_rows(weight: Tensor) -> Tensor:
        rows = weight[shard.start : shard.start + shard.width]
        return torch.nn.functional.pad(rows, (0, 0, 0, padded_width - shard.width))

    return full._replace(
        weight=own_rows(full.weight), teacher_weight=own_rows(full.teacher_weight), shard=shard
    )


def exact(full: Inputs, loss: Callable[..., Tensor]) -> Result:
    """Return float64 results over the complete vocabulary, computed a chunk of tokens at a time."""
    weight, teacher_weight = full.weight.double().requires_grad_(), full.teacher_weight.double()
    total, hidden_grads = weight.new_zeros(()), []
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
    assert weight.grad is not None
    return Result(total, torch.cat(hidden_grads), weight.grad)


def error_of(result: Result, expected: Result, shard: VocabShard) -> float:
    """Return the largest relative error of loss, dHidden summed over ranks, and own rows of dWeight."""
    assert result.loss is not None and expected.loss is not None
    hidden_grad = result.hidden_grad.double()
    all_reduce(hidden_grad, shard.group)
    own_rows = slice(shard.start, shard.start + shard.width)
    return max(
        relative_error(result.loss, expected.loss),
        relative_error(hidden_grad, expected.hidden_grad),
        relative_error(result.weight_grad[: shard.width], expected.weight_grad[own_rows]),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the expected norm."""
    return float((found.double() - expected).norm() / expected.norm())


def measure(name: str, x: Inputs, chunk: int | None, rounds: int, expected: Result | None = None) -> Row:
    """Return one row, of the worst rank.

    Best of `rounds` after one warm-up (with no rounds: that one); peak memory without the gradients; error.
    """
    prepare, device = METHODS[name].prepare, x.hidden.device

    def timed() -> tuple[Result, float]:
        if x.shard.is_split:
            dist.barrier()
        synchronise(device)
        start = time.perf_counter()
        result = call()
        synchronise(device)
        return result, time.perf_counter() - start

    few = x._replace(hidden=x.hidden[:16], teacher_hidden=x.teacher_hidden[:16], targets=x.targets[:16])
    prepare(few, chunk)()  # the libraries' code and workspaces are no part of any method's memory
    before = start_peak(device)
    call = prepare(x, chunk)
    result, first = timed()
    gradients = sum(tensor.nbytes for tensor in (result.hidden_grad, result.weight_grad))
    extra_bytes = read_peak(device) - before - gradients
    error = 0.0 if expected is None else error_of(result, expected, x.shard)
    del result
    seconds = [timed()[1] for _ in range(rounds)] or [first]
    numbers = torch.tensor([max(0, extra_bytes), error, *seconds], dtype=torch.float64, device=device)
    extra_bytes, error, *seconds = all_reduce(numbers, x.shard.group, dist.ReduceOp.MAX).tolist()
    row = {"name": name, "seconds": min(seconds), "extra_bytes": int(extra_bytes)}
    return row if expected is None else row | {"error": error}


def synchronise(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_all(options: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict[str, str]]:
    """Return the rows, the bare products first, and {name: reason} of those that cannot run."""
    reasons = {name: why_not(name, options) for name in ["gemms", *options.methods]}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    names = [name for name in reasons if name not in skipped]
    x = make_inputs(options.tokens, options, device)
    expected: dict[Callable[..., Tensor], Result] = {}
    for name in names:
        loss = METHODS[name].loss
        if loss is not None and loss not in expected and not options.no_error:
            expected[loss] = exact(x, loss)
    x = shard_inputs(x)
    rows = []
    for name in names:
        loss = METHODS[name].loss
        known = expected.get(loss) if loss is not None else None
        try:
            rows.append(measure(name, x, options.chunk, options.rounds, known))
        except torch.OutOfMemoryError as error:  # complete logits may not fit where tiles do
            if METHODS[name].sharded:
                raise
            skipped[name] = str(error)
    add_ratios(rows)
    return rows, skipped


def sweep(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure `ours` at several numbers of tokens, once each."""
    rows = []
    for tokens in options.sweep_tokens:
        x = shard_inputs(make_inputs(tokens, options, device))
        rows.append(measure("ours", x, options.chunk, rounds=0) | {"name": f"ours T={tokens}"})
    return rows


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    ratio = f"{row['ratio']:5.2f}" if "ratio" in row else ""
    error = f"  error {row['error']:.1e}" if "error" in row else ""
    memory = f"+{row['extra_bytes'] / 2**20:7.0f} MiB"
    return f"{row['name']:>20}  {row['seconds']:8.3f} s  {ratio}  {memory}{error}"


def run(rank: int, options: argparse.Namespace, rendezvous: str | None = None) -> None:
    """Measure on one rank; the first rank publishes.

    Args:
        rank: Of the tensor-parallel group.
        options: The command line.
        rendezvous: File through which the ranks of the group find each other; None for one process.
    """
    torch.set_num_threads(options.threads)
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rendezvous is not None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        method = f"file://{rendezvous}"
        dist.init_process_group(backend, init_method=method, rank=rank, world_size=options.tensor_parallel)
    rows, skipped = (sweep(options, device), {}) if options.sweep_tokens else measure_all(options, device)
    if rank == 0:
        if options.baseline:
            rows += baseline_rows(options)
        names = ("tokens", "hidden", "vocab", "tensor_parallel", "chunk", "dtype", "threads")
        shape = {name: getattr(options, name) for name in names}
        if options.sweep_tokens:
            shape["tokens"] = options.sweep_tokens
        device_label = device_name(device.type == "cuda", options.threads)
        publish(options, device_label, shape, rows, format_row, skipped)
    if rendezvous is not None:
        dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = make_parser(__doc__, rounds=2, baseline=True)
    add = parser.add_argument
    add("--tokens", type=int, default=512)
    add("--hidden", type=int, default=1024)
    add("--vocab", type=int, default=151_936)
    add("--tensor-parallel", type=int, default=1, metavar="N", help="processes, each with a vocabulary shard")
    add("--chunk", type=int, help=f"tokens a tile (default: the library's; bare products: {GEMM_TOKENS})")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--device", choices=["cpu", "cuda"], default=device)
    add("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    add("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    add("--sweep-tokens", type=int, nargs="+", metavar="T", help="instead of the rows: `ours` once at each T")
    add("--no-error", action="store_true", help="skip the float64 reference")
    return parser.parse_args()


def baseline_rows(options: argparse.Namespace) -> list[Row]:
    """Measure the path into main_grad at another commit by its own script; ratios are to its own products."""
    with baseline_tree(options.baseline) as tree:
        script = find_script(tree, "bench_vocab_loss.py")
        names = ("ours, into main_grad", "ours")
        name = next(name for name in names if f'"{name}"' in script.read_text())
        sizes = [f"--{key}={getattr(options, key)}" for key in ("tokens", "hidden", "vocab", "threads")]
        repeats = f"--repeats={options.rounds}"
        command = [sys.executable, str(script), "--json", "--no-error", *sizes, repeats, "--methods", name]
        rows = run_json(command, tree)["rows"]
    return [{**row, "name": f"{row['name']} at {options.baseline}"} for row in rows]


def main() -> None:
    """Measure in this process, or in one process per vocabulary shard."""
    options = parse_options()
    if options.tensor_parallel == 1:
        run(0, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, args=(options, f"{folder}/rendezvous"), nprocs=options.tensor_parallel)


if __name__ == "__main__":
    main()
