#!/usr/bin/env python3
"""Measure the time and memory of conversion, against copying the same files.

    python tools/bench/bench_convert.py --shape 0.6b --folder DIR --json

Makes a random bf16 Qwen3 of the shape in a temporary folder under DIR, copies it (read, write, fsync),
converts it to Megatron and back, compares the result with the original bit for bit, and removes everything.
Needs three times the model plus 4 GB of disk. Each row runs in a process of its own and is measured after
its imports; `ratio` is to the copy of as many bytes.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from _memory import peak_resident_bytes, reset_peak
from _models import SIZES, qwen3_config
from _report import Row, add_ratios, cpu_name, make_parser, publish

from megatron_srpo.distributed.processes import Processes
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights.convert import to_hf, to_megatron
from megatron_srpo.weights.hf_output import SHARD_BYTES, plan_shards, write_companions
from megatron_srpo.weights.safetensors_file import Writer
from megatron_srpo.weights.sources import HFTensors, MegatronTensors

TINY = {
    **qwen3_config("0.6b"),
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "tie_word_embeddings": True,
}
ONE = Processes(rank=0, world_size=1)


def make_model(shape: str, folder: Path) -> None:
    """Write a folder of the shape with random bf16 weights, a tensor at a time."""
    folder.mkdir()
    config = TINY if shape == "tiny" else qwen3_config(shape)
    (folder / "config.json").write_text(json.dumps(config))
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
    """Copy and flush each file, as the baseline for converting."""
    output.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, output / file.name)
        with (output / file.name).open("rb") as written:
            os.fsync(written.fileno())


def hf_to_megatron(source: Path, output: Path) -> None:
    """Convert with the vocabulary padding of the configuration's default."""
    folder = HFFolder(source)
    to_megatron(HFTensors(folder), folder, output, ONE)


def megatron_to_hf(source: Path, output: Path) -> None:
    """Convert; the config next to the checkpoint is the reference."""
    reference = HFFolder(source)
    to_hf(MegatronTensors(source, reference.architecture), reference, output, ONE)


WORK = {"copy": copy, "HF to Megatron": hf_to_megatron, "Megatron to HF": megatron_to_hf}


def back_memory(scratch: Path, size: int) -> None:
    """Fill and free twice `size` bytes of page cache, at most 4 GB.

    A virtual machine returns free memory to its host within a second, and what is written first afterwards
    pays for getting it back: 32 MB took 105 ms instead of 8 ms here, all of it system time, which says
    nothing about converting.
    """
    piece = bytes(2**25)
    with scratch.open("wb", buffering=0) as file:
        for _ in range(min(2 * size, 4 * 10**9) // len(piece)):
            file.write(piece)
    scratch.unlink()


def run_measured(name: str, source: Path, output: Path, answer) -> None:
    """Run in a process of its own; send (seconds, extra bytes)."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (progress; open until the process ends)
    back_memory(output.with_name("scratch"), folder_bytes(source))
    reset_peak()
    before = peak_resident_bytes()
    start = time.perf_counter()
    WORK[name](source, output)
    answer.send((time.perf_counter() - start, peak_resident_bytes() - before))


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def measure(name: str, source: Path, output: Path) -> Row:
    """Return one row without its ratio. Raises RuntimeError when the process failed."""
    context = multiprocessing.get_context("forkserver")  # so that imports are done once, before measuring
    context.set_forkserver_preload(["megatron_srpo.weights.convert"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_measured, args=(name, source, output, sender))
    process.start()
    sender.close()
    try:
        seconds, extra_bytes = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{name} failed") from None
    process.join()
    return {"name": name, "seconds": round(seconds, 3), "extra_bytes": max(0, extra_bytes)}


def check_round_trip(original: Path, back: Path) -> None:
    """Raise RuntimeError unless the two folders hold the same bits."""
    first, second = HFTensors(HFFolder(original)), HFTensors(HFFolder(back))
    if first.names() != second.names():
        raise RuntimeError("the round trip is not exact: other tensors")
    for name in first.names():
        before, after = first.tensor(name), second.tensor(name)
        if before.dtype != after.dtype or not torch.equal(before, after):
            raise RuntimeError(f"the round trip is not exact: {name}")


def measure_all(shape: str, folder: Path, rounds: int) -> list[Row]:
    """Return the rows, each the fastest of `rounds`; the rows take turns."""
    make_model(shape, folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    best: dict[str, Row] = {}
    for _ in range(rounds):
        for name in WORK:
            os.sync()
            source = "megatron" if name == "Megatron to HF" else "hf"
            row = measure(name, folder / source, folder / "output")
            if name not in best or row["seconds"] < best[name]["seconds"]:
                best[name] = row
            if name == "Megatron to HF":
                check_round_trip(folder / "hf", folder / "output")
            shutil.rmtree(folder / "output")
    rows = list(best.values())
    add_ratios(rows)
    return rows


def format_row(row: Row, size: int) -> str:
    """Return a row as a line of the table; `size` is the model's bytes."""
    rate, extra = f"{size / row['seconds'] / 1e6:6.0f} MB/s", f"+{row['extra_bytes'] / 2**20:6.0f} MiB"
    return f"{row['name']:>16}  {row['seconds']:8.2f} s  {rate}  {row['ratio']:5.2f}  {extra}"


def main() -> None:
    """Measure all rows and publish the report."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--shape", choices=["tiny", *SIZES], default="0.6b")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where the files are made",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench_convert-") as folder:
        rows = measure_all(options.shape, Path(folder), options.rounds)
        size = folder_bytes(Path(folder) / "hf")
    shape = {"name": options.shape, "bytes": size, "rounds": options.rounds}
    device = f"{cpu_name()}, {os.cpu_count()} cores"
    publish(options, device, shape, rows, functools.partial(format_row, size=size))


if __name__ == "__main__":
    main()
