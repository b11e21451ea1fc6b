"""What it costs to bring weights to an SGLang server: seconds, bytes and the trainer's extra memory, for each
way.

    python tools/bench/bench_publish.py [--shape quickstart|0.6b|8b] [--dtype float32|bfloat16] [--servers 1]
    [--repeats 3]
                                  [--python .venv-sglang/bin/python] [--bucket-mib 512] [--ways
                                  disk,tensor,distributed] [--json] [--output FILE]

Every weight is 0.01. The trainer's tensors are mapped from a file, and take no memory of their own; the first
row is a copy of them, tensor by tensor, which every way contains. `seconds` is the median of one whole
update: pause, send, continue, version read back; `extra_bytes` the largest growth of this process's memory
(its own, shared and swapped out) during an update; `bytes` what was sent to each server; `piece_bytes` the
largest bucket, or tensor where that is larger. On a CPU 8b needs --dtype bfloat16, 24 GB of memory or swap
for one server, and 50 GB of disk.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engines import create_engine
from megatron_srpo.weights.sources import HFTensors
from megatron_srpo.weights.transfer import Repeatable, save_hf

ROOT = Path(__file__).parents[2]
START = ROOT / "examples/quickstart/start"
ALONE = Layout.single()
QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "eos_token_id": 2}
SHAPES = {
    "quickstart": {},
    "0.6b": {
        **QWEN3,
        **{
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
        },
        "tie_word_embeddings": True,
    },
    "8b": {
        **QWEN3,
        **{
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
        },
        "tie_word_embeddings": False,
    },
}


def make_model(shape: str, dtype: torch.dtype, root: Path) -> HFFolder:
    """The Hugging Face folder root/model, of that shape and dtype."""
    folder = root / "shape"
    folder.mkdir()
    for file in START.iterdir():
        shutil.copy(file, folder)
    config = json.loads((START / "config.json").read_text())
    config = (
        {key: value for key, value in config.items() if key != "layer_types"} if SHAPES[shape] else config
    )
    (folder / "config.json").write_text(json.dumps({**config, **SHAPES[shape]}))
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
    """All tensors as `update_weights` takes them."""
    return Repeatable(lambda: ((name, tensors.tensor(name)) for name in tensors.names()))


def memory() -> int:
    """Bytes of this process: its own, also those swapped out, and the shared ones that it maps."""
    fields = dict(
        line.split(":")
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(("Rss", "VmSwap"))
    )
    return sum(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem", "VmSwap"))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list that holds the largest growth of memory in the block, at its end."""
    before, largest, over = memory(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            largest[0] = max(largest[0], memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield largest
    finally:
        over.set()
        watcher.join()


def configuration(options: argparse.Namespace, model: Path, run: Path, *more: str) -> Config:
    """The quick start on servers, with that model and what more is given as key=value."""
    file, overrides = (
        ROOT / "examples/quickstart/sglang.yaml",
        [f"model.hf_path={model}", f"logging.dir={run}", *more],
    )
    overrides += [
        f"rollout.servers={options.servers}",
        f"rollout.sglang.python={options.python}",
        f"rollout.sglang.port={options.port}",
    ]
    config = load_config(file, overrides)
    arguments = [
        *config.rollout.sglang.arguments,
        "--mem-fraction-static=0.8",
        "--max-total-tokens=2048",
    ]  # room for a large model
    return (
        config
        if model == START
        else load_config(file, [*overrides, f"rollout.sglang.arguments={json.dumps(arguments)}"])
    )


def measure(options: argparse.Namespace, way: str, root: Path, model: HFFolder) -> dict:
    """One way's row."""
    more = [
        f"model.dtype={options.dtype}",
        f"rollout.sglang.update={way}",
        f"rollout.sglang.bucket_mib={options.bucket_mib}",
    ]
    engine = create_engine(
        configuration(options, model.path, root / way, *more), model, ALONE, lambda text: None
    )
    stream = stream_of(HFTensors(model))
    try:
        engine.update_weights(stream, "0")  # the first one makes the group and compares checksums
        return row_of(
            f"ours, {way}", options.repeats, lambda number: engine.update_weights(stream, str(1 + number))
        )
    finally:
        engine.close()


def measure_copy(options: argparse.Namespace, model: HFFolder) -> dict:
    """The row of what every way contains: each tensor read once into memory that is there."""
    shapes = model.architecture.tensor_shapes().values()
    memory = torch.zeros(max(map(prod, shapes)), dtype=getattr(torch, options.dtype))

    def copy(_: int) -> None:
        for _, tensor in stream_of(HFTensors(model)):
            memory[: tensor.numel()].copy_(tensor.reshape(-1))

    return row_of("a copy", options.repeats, copy)


def row_of(name: str, repeats: int, call: Callable[[int], None]) -> dict:
    """The median of the seconds, and the largest growth of memory, of `repeats` calls with their number."""
    seconds, extra = [], 0
    for number in range(repeats):
        start = time.perf_counter()
        with peak_memory() as largest:
            call(number)
        seconds.append(time.perf_counter() - start)
        extra = max(extra, largest[0])
        print(f"{name}: {seconds[-1]:.3f} s", file=sys.stderr, flush=True)
    return {"name": name, "seconds": statistics.median(seconds), "extra_bytes": extra}


def add_common_options(parser: argparse.ArgumentParser, servers: int) -> None:
    """What benchmarks of servers have in common."""
    parser.add_argument("--servers", type=int, default=servers)
    parser.add_argument(
        "--python", default=str(ROOT / ".venv-sglang/bin/python"), help="interpreter of SGLang's environment"
    )
    parser.add_argument("--port", type=int, default=30100)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="append the JSON object to FILE, as one line"
    )


def tell(options: argparse.Namespace, shape: dict, rows: list[dict], line: Callable[[dict], str]) -> None:
    """Write and print what was measured; ratios are to the first row. line: a row for people."""
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
    report = {
        "device": f"{platform.machine()} CPU",
        "date": datetime.date.today().isoformat(),
        "shape": shape,
        "rows": rows,
    }
    if options.output:
        with options.output.open("a") as file:
            file.write(json.dumps(report) + "\n")
    print(json.dumps(report) if options.json else "\n".join(map(line, rows)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_common_options(parser, servers=1)
    parser.add_argument("--shape", choices=SHAPES, default="quickstart")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--ways", default="disk,tensor,distributed")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as root:
        model = make_model(options.shape, dtype := getattr(torch, options.dtype), Path(root))
        rows = [measure_copy(options, model)]
        rows += [measure(options, way, Path(root), model) for way in options.ways.split(",")]
    dist.destroy_process_group()
    sizes = [prod(shape) * dtype.itemsize for shape in model.architecture.tensor_shapes().values()]
    piece = max(min(options.bucket_mib * 2**20, sum(sizes)), *sizes)
    shape = {
        "model": options.shape,
        "dtype": options.dtype,
        "servers": options.servers,
        "bytes": sum(sizes),
        "piece_bytes": piece,
    }
    tell(options, shape, rows, lambda row: _line(row, sum(sizes), piece))


def _line(row: dict, sent: int, piece: int) -> str:
    extra = f"{row['extra_bytes'] / 2**20:8.1f} MiB, {row['extra_bytes'] / piece:.2f} pieces"
    return f"{row['name']:>20}  {row['seconds']:8.3f} s for {sent / 2**20:9.1f} MiB ({row['ratio']:.1f} copies)  extra {extra}"


if __name__ == "__main__":
    main()
