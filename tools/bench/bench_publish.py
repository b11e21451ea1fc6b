"""Measure each way to send weights to an SGLang server: seconds, bytes and the trainer's extra memory.

    python tools/bench/bench_publish.py [--shape quickstart|0.6b|8b] [--dtype float32|bfloat16] [--servers 1]
        [--rounds 3] [--python .venv-sglang/bin/python] [--bucket-mib 512] [--ways disk,tensor,distributed]
        [--json] [--output FILE]

Every weight is 0.01. The trainer's tensors are mapped from a file and take no memory of their own; the first
row is a copy of them, tensor by tensor, which every way contains. `seconds` is the median of one complete
update: pause, send, continue, version read back; `extra_bytes` the largest growth of this process's memory
(its own, shared and swapped out) during an update; `bytes` what was sent to each server; `piece_bytes` the
largest bucket, or tensor where that is larger. On a CPU 8b needs --dtype bfloat16, 24 GB of memory or swap
for one server, and 50 GB of disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from _memory import memory_growth
from _models import SIZES, qwen3_config
from _report import Row, add_ratios, cpu_name, make_parser, publish
from _servers import START, add_server_options, start_servers
from torch._C._distributed_c10d import HashStore

from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights.sources import HFTensors
from megatron_srpo.weights.transfer import Repeatable, save_hf


def make_model(shape: str, dtype: torch.dtype, root: Path) -> HFFolder:
    """Write and return the Hugging Face folder root/model of that shape and dtype."""
    folder = root / "shape"
    shutil.copytree(START, folder)
    if shape != "quickstart":
        (folder / "config.json").write_text(json.dumps({**qwen3_config(shape), "eos_token_id": 2}))
    reference = HFFolder(folder)
    shapes = reference.architecture.tensor_shapes().items()
    save_hf(
        ((name, torch.full(size, 0.01, dtype=dtype)) for name, size in shapes),
        reference,
        root / "model",
        write=True,
    )
    return HFFolder(root / "model")


def stream_of(tensors: HFTensors) -> Repeatable:
    """Return all tensors as `update_weights` takes them."""
    return Repeatable(lambda: ((name, tensors.tensor(name)) for name in tensors.names()))


def measure(options: argparse.Namespace, way: str, root: Path, model: HFFolder) -> Row:
    """Return the row of one way."""
    overrides = [
        f"model.dtype={options.dtype}",
        f"rollout.sglang.update={way}",
        f"rollout.sglang.bucket_mib={options.bucket_mib}",
    ]
    engine = start_servers(options, model, root / way, *overrides)
    stream = stream_of(HFTensors(model))
    try:
        engine.update_weights(stream, "0")  # the first update makes the group and compares checksums
        update = lambda number: engine.update_weights(stream, str(1 + number))  # noqa: E731
        return time_calls(f"ours, {way}", options.rounds, update)
    finally:
        engine.close()


def measure_copy(options: argparse.Namespace, model: HFFolder) -> Row:
    """Return the row of what every way contains: each tensor read once into existing memory."""
    shapes = model.architecture.tensor_shapes().values()
    memory = torch.zeros(max(map(prod, shapes)), dtype=getattr(torch, options.dtype))

    def copy(number: int) -> None:
        for _, tensor in stream_of(HFTensors(model)):
            memory[: tensor.numel()].copy_(tensor.reshape(-1))

    return time_calls("a copy", options.rounds, copy)


def time_calls(name: str, rounds: int, call: Callable[[int], None]) -> Row:
    """Call with 0, 1, …; return the median of the seconds and the largest growth of memory."""
    seconds, extra = [], 0
    for number in range(rounds):
        start = time.perf_counter()
        with memory_growth() as growth:
            call(number)
        seconds.append(time.perf_counter() - start)
        extra = max(extra, growth.bytes)
        print(f"{name}: {seconds[-1]:.3f} s", file=sys.stderr, flush=True)
    return {"name": name, "seconds": statistics.median(seconds), "extra_bytes": extra}


def format_row(row: Row, sent: int, piece: int) -> str:
    """Return a row as a line; `sent` and `piece` are the bytes sent and the largest piece."""
    name, seconds = f"{row['name']:>20}", f"{row['seconds']:8.3f} s for {sent / 2**20:9.1f} MiB"
    extra = f"{row['extra_bytes'] / 2**20:8.1f} MiB, {row['extra_bytes'] / piece:.2f} pieces"
    return f"{name}  {seconds} ({row['ratio']:.1f} copies)  extra {extra}"


def main() -> None:
    """Measure the chosen ways and publish the report."""
    parser = make_parser(__doc__, rounds=3)
    add_server_options(parser, servers=1)
    parser.add_argument("--shape", choices=["quickstart", *SIZES], default="quickstart")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--ways", default="disk,tensor,distributed")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as root:
        model = make_model(options.shape, dtype, Path(root))
        rows = [measure_copy(options, model)]
        for way in options.ways.split(","):
            rows.append(measure(options, way, Path(root), model))
    dist.destroy_process_group()
    add_ratios(rows)
    sizes = [prod(shape) * dtype.itemsize for shape in model.architecture.tensor_shapes().values()]
    piece = max(min(options.bucket_mib * 2**20, sum(sizes)), *sizes)
    shape = {
        "model": options.shape,
        "dtype": options.dtype,
        "servers": options.servers,
        "bytes": sum(sizes),
        "piece_bytes": piece,
    }
    publish(options, cpu_name(), shape, rows, functools.partial(format_row, sent=sum(sizes), piece=piece))


if __name__ == "__main__":
    main()
