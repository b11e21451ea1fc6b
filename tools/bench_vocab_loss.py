"""The routed loss's vocabulary pass against its bare matrix products and other ways to compute it, side by side in one run.

    python tools/bench_vocab_loss.py --tokens 512 --hidden 1024 --vocab 151936 [--threads 1] [--json]

Every token is distilled (JSD of student and teacher plus the log-probability of the target), forward and backward to hidden
states and weight. `ratio` is to the four bare matrix products; `extra_bytes` is peak memory above the inputs and their
gradients; `error` is the largest relative error of loss, dHidden and dWeight against float64 (norms of differences).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.fused import fused_objective
from megatron_srpo.vocab_parallel.shard import VocabShard

TOP_K = 100


class Inputs(NamedTuple):
    """hidden, teacher_hidden [T, H]; weight, teacher_weight [V, H]; targets [T]."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor


Result = tuple[Tensor, Tensor, Tensor]  # loss, dHidden, dWeight


def bare_gemms(x: Inputs, chunk: int) -> None:
    """The four products any method needs, on buffers that exist: student and teacher logits, dHidden, dWeight."""
    weight_grad = torch.zeros_like(x.weight)
    tile = x.hidden.new_empty(chunk, x.weight.shape[0])
    for start in range(0, len(x.hidden), chunk):
        hidden, teacher = x.hidden[start : start + chunk], x.teacher_hidden[start : start + chunk]
        logits = tile[: len(hidden)]
        torch.mm(hidden, x.weight.t(), out=logits)
        torch.mm(teacher, x.teacher_weight.t(), out=logits)
        torch.mm(logits, x.weight)
        weight_grad.addmm_(logits.t(), hidden)


def ours(x: Inputs, chunk: int) -> Result:
    """megatron_srpo.vocab_parallel.fused, exact."""
    hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
    size = weight.shape[0]

    def objective(rows: slice, logprob: Tensor, divergence: Tensor) -> Tensor:
        return (divergence - 0.1 * logprob).sum() / len(x.hidden)

    teacher = {"teacher_hidden": x.teacher_hidden, "teacher_weight": x.teacher_weight}
    loss, _ = fused_objective(hidden, weight, x.targets, objective, VocabShard(0, size, size), **teacher, tile_tokens=chunk)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def naive(x: Inputs, chunk: int) -> Result:
    """torch autograd over whole [T, V] logits."""
    return _autograd(x, _full_jsd)


def top_k(x: Inputs, chunk: int) -> Result:
    """torch autograd, the papers' approximation: the student's top 100 ids and a tail bucket (not the same loss)."""
    return _autograd(x, _top_k_jsd)


def _autograd(x: Inputs, divergence: Callable[[Tensor, Tensor], Tensor]) -> Result:
    hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
    logits = hidden @ weight.t()
    with torch.no_grad():
        teacher_logits = x.teacher_hidden @ x.teacher_weight.t()
    logprob = logits.gather(1, x.targets[:, None])[:, 0] - logits.logsumexp(1)
    loss = (divergence(logits, teacher_logits) - 0.1 * logprob).sum() / len(x.hidden)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


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


METHODS: dict[str, Callable] = {"gemms": bare_gemms, "ours": ours, "naive autograd": naive, "top-100 + tail": top_k}


def make_inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random states whose softmax is peaked as a language model's; the teacher is near the student."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    student, weight = draw(tokens, hidden), draw(vocab, hidden) * (3 / math.sqrt(hidden))
    teacher, teacher_weight = student + 0.3 * draw(tokens, hidden), weight + draw(vocab, hidden) * (0.3 / math.sqrt(hidden))
    targets = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    return Inputs(*(tensor.to(dtype) for tensor in (student, weight, teacher, teacher_weight)), targets)


def exact(x: Inputs, chunk: int) -> Result:
    """Float64, a chunk of tokens at a time."""
    wide = Inputs(*(tensor.double() for tensor in x[:4]), x.targets)
    loss, weight_grad, hidden_grads = 0.0, torch.zeros_like(wide.weight), []
    for start in range(0, len(x.hidden), chunk):
        rows = slice(start, start + chunk)
        part = Inputs(wide.hidden[rows], wide.weight, wide.teacher_hidden[rows], wide.teacher_weight, wide.targets[rows])
        share = len(part.hidden) / len(x.hidden)
        part_loss, hidden_grad, part_weight_grad = naive(part, chunk)
        loss = loss + part_loss * share
        hidden_grads.append(hidden_grad * share)
        weight_grad += part_weight_grad * share
    return loss, torch.cat(hidden_grads), weight_grad


class Peak:
    """Peak memory of a block above what was there before it, bytes."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *exception) -> None:
        after = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self._status("VmHWM")
        self.bytes = after - self.before

    @staticmethod
    def _status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024


def measure(name: str, x: Inputs, chunk: int, repeats: int, wanted: Result | None) -> dict:
    """One row: best of `repeats` after one warm-up, peak memory without the gradients, error."""
    method = METHODS[name]
    synchronise = torch.cuda.synchronize if x.hidden.is_cuda else lambda: None
    with Peak(x.hidden.device) as peak:
        result = method(x, chunk)
    seconds = []
    gradients = 0 if result is None else sum(tensor.numel() * tensor.element_size() for tensor in result[1:])
    row = {"name": name, "extra_bytes": max(0, peak.bytes - gradients)}
    if wanted is not None and result is not None and not name.startswith("top"):
        row["error"] = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(result, wanted, strict=True))
    del result
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        method(x, chunk)
        synchronise()
        seconds.append(time.perf_counter() - start)
    return row | {"seconds": min(seconds)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=128, help="tokens a tile")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--no-error", action="store_true", help="skip the float64 reference")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    x = make_inputs(options.tokens, options.hidden, options.vocab, getattr(torch, options.dtype), device)
    wanted = None if options.no_error else exact(x, options.chunk)
    rows = [measure(name, x, options.chunk, options.repeats, wanted) for name in dict.fromkeys(["gemms", *options.methods])]
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
    shape = {name: getattr(options, name) for name in ("tokens", "hidden", "vocab", "chunk", "dtype", "threads")}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {options.threads} threads"
    report = {"device": name, "date": datetime.date.today().isoformat(), "shape": shape, "rows": rows}
    if options.json:
        print(json.dumps(report))
        return
    print(f"{name}, {report['date']}, {shape}")
    for row in rows:
        error = f"  error {row['error']:.1e}" if "error" in row else ""
        print(f"{row['name']:>16}  {row['seconds']:7.2f} s  {row['ratio']:5.2f}  +{row['extra_bytes'] / 2**20:7.0f} MiB{error}")


if __name__ == "__main__":
    main()
