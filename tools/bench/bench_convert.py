#!/usr/bin/env python3
"""How long conversion takes, against copying the same files, and the memory it needs beside.

    python tools/bench/bench_convert.py --shape 0.6b --folder DIR --json

Makes a random bf16 Qwen3 of the shape in a temporary folder under DIR, copies it (read, write, fsync),
converts it to Megatron and back, compares the result with the original bit for bit, and removes everything.
Disk: three times the model, and 4 GB. Each row is measured in a process of its own, from the moment its
imports are done; `ratio` is to the copy of as many bytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from megatron_srpo.distributed.byte_progress import ByteProgress
from megatron_srpo.distributed.processes import Processes
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights.compare import compare_tensors
from megatron_srpo.weights.convert import to_hf, to_megatron
from megatron_srpo.weights.hf_output import SHARD_BYTES, plan_shards, write_companions
from megatron_srpo.weights.safetensors_file import Writer
from megatron_srpo.weights.sources import HFTensors, MegatronTensors

SHARED = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
}
SHARED |= {
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
}
SHAPES = {
    "tiny": dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        tie_word_embeddings=True,
    ),
    "0.6b": dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "8b": dict(
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
}
ONE = Processes(rank=0, world_size=1)


def make_model(shape: str, folder: Path) -> None:
    """A folder of the shape with random bf16 weights, streamed."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(SHARED | SHAPES[shape] | ({"vocab_size": 1000} if shape == "tiny" else {}))
    )
    generator = torch.Generator().manual_seed(0)
    reference = HFFolder(folder)
    tensors = {
        name: (torch.bfloat16, shape) for name, shape in reference.architecture.tensor_shapes().items()
    }
    shards = plan_shards(tensors, SHARD_BYTES)
    for file, names in shards.items():
        writer = Writer(folder / file, {name: tensors[name] for name in names})
        for name in names:
            words = torch.randint(0x3C00, 0x3D80, tensors[name][1], generator=generator, dtype=torch.int16)
            writer.write(name, words.view(torch.bfloat16))
        writer.close()
    write_companions(folder, reference, tensors, shards)


def copy(source: Path, output: Path) -> None:
    """What converting is compared with: each file copied and flushed."""
    output.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, output / file.name)
        with (output / file.name).open("rb") as written:
            os.fsync(written.fileno())


def convert_there(source: Path, output: Path) -> None:
    """HF → Megatron."""
    folder = HFFolder(source)
    to_megatron(HFTensors(folder), folder, output, ONE)


def convert_back(source: Path, output: Path) -> None:
    """Megatron → HF; the config beside the checkpoint is the reference."""
    reference = HFFolder(source)
    to_hf(MegatronTensors(source, reference.architecture), reference, output, ONE)


WORK = {"copy": copy, "HF to Megatron": convert_there, "Megatron to HF": convert_back}


def memory(most: bool = False) -> int:
    """Bytes this process has in memory, files mapped into it included; `most`: since the last call without
    it.
    """
    if not most:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def back_memory(scratch: Path, size: int) -> None:
    """Fill and free twice `size` bytes of page cache, at most 4 GB.

    A virtual machine hands free memory back to its host, within a second. What is written first afterwards
    pays for getting it again: 32 MB took 105 ms instead of 8 ms here (all of it system time), which says
    nothing of converting.
    """
    piece = bytes(2**25)
    with scratch.open("wb", buffering=0) as file:
        for _ in range(min(2 * size, 4 * 10**9) // len(piece)):
            file.write(piece)
    scratch.unlink()


def measured(name: str, source: Path, output: Path, answer) -> None:
    """Run in a process of its own: sends (seconds, extra bytes)."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (progress; it lives as long as the process)
    back_memory(output.with_name("scratch"), sum(file.stat().st_size for file in source.iterdir()))
    before = memory()
    start = time.perf_counter()
    WORK[name](source, output)
    answer.send((time.perf_counter() - start, memory(most=True) - before))


def measure(name: str, source: Path, output: Path) -> dict:
    """One row. Raises RuntimeError when the process failed."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(name, source, output, sender))
    process.start()
    sender.close()
    try:
        seconds, extra_bytes = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{name} failed") from None
    process.join()
    return {"name": name, "seconds": round(seconds, 3), "extra_bytes": max(0, extra_bytes)}


def check_round_trip(original: Path, back: Path) -> None:
    """Raises RuntimeError unless the two folders hold the same bits."""
    first, second = (HFTensors(HFFolder(path)) for path in (original, back))
    if found := next(compare_tensors(first, second, ByteProgress("", 0, enabled=False)), None):
        raise RuntimeError(f"the round trip is not exact: {found}")


def table(shape: str, folder: Path, repeats: int) -> list[dict]:
    """The rows, each the fastest of `repeats`, in turn."""
    make_model(shape, folder / "hf")
    convert_there(folder / "hf", folder / "megatron")
    rows: dict[str, list[dict]] = {name: [] for name in WORK}
    for _ in range(repeats):
        for name in WORK:
            os.sync()
            source = "megatron" if name == "Megatron to HF" else "hf"
            rows[name].append(measure(name, folder / source, folder / "output"))
            if name == "Megatron to HF":
                check_round_trip(folder / "hf", folder / "output")
            shutil.rmtree(folder / "output")
    best = [min(measurements, key=lambda row: row["seconds"]) for measurements in rows.values()]
    return [row | {"ratio": round(row["seconds"] / best[0]["seconds"], 2)} for row in best]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="0.6b")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where the files are made",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="append the JSON object to FILE, as one line"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench_convert-") as folder:
        rows = table(options.shape, Path(folder), options.repeats)
        size = sum(file.stat().st_size for file in (Path(folder) / "hf").iterdir())
    device = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    shape = {"name": options.shape, "bytes": size, "repeats": options.repeats}
    report = {"device": device, "date": datetime.date.today().isoformat(), "shape": shape, "rows": rows}
    if options.output:
        with options.output.open("a") as file:
            file.write(json.dumps(report) + "\n")
    if options.json:
        print(json.dumps(report))
        return
    print(f"{device}, {report['date']}, {options.shape}: {size / 1e9:.2f} GB")
    for row in rows:
        rate = size / row["seconds"] / 1e6
        print(
            f"{row['name']:>16}  {row['seconds']:8.2f} s  {rate:6.0f} MB/s  {row['ratio']:5.2f}  +{row['extra_bytes'] / 2**20:6.0f} MiB"
        )


if __name__ == "__main__":
    main()
