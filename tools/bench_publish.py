"""What it costs to bring weights to an SGLang server: seconds, bytes and the trainer's extra memory, for each way.

    python tools/bench_publish.py [--shape quickstart|0.6b|8b] [--servers 1] [--repeats 3] [--python .venv-sglang/bin/python]
                                  [--bucket-mib 512] [--ways disk,tensor,distributed] [--json] [--output FILE]

The model has random weights, float32 on a CPU. `seconds` is the median of one whole update: pause, send, continue, version read
back; `extra_bytes` the largest growth of this process's memory (its own and shared) during an update, the trainer's own tensors
aside; `bytes` what was sent to each server. 8b needs about 100 GB of memory on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_srpo.config import Config
from megatron_srpo.config_file import load_config
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engines import create_engine
from megatron_srpo.runtime.parallel import Layout
from megatron_srpo.weights.transfer import save_hf

ROOT = Path(__file__).parents[1]
START = ROOT / "examples/quickstart/start"
ALONE = Layout(0, 1, torch.device("cpu"), 0, 1, 0, 1, 0, 1, 1, True, True, False, None)
QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "eos_token_id": 2}
SHAPES = {
    "quickstart": {},
    "0.6b": {
        **QWEN3,
        **{"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        "tie_word_embeddings": True,
    },
    "8b": {
        **QWEN3,
        **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
        "tie_word_embeddings": False,
    },
}


def make_folder(shape: str, folder: Path) -> dict[str, torch.Tensor]:
    """A Hugging Face folder of that shape; its tensors."""
    folder.mkdir()
    for file in START.iterdir():
        shutil.copy(file, folder)
    config = json.loads((START / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "layer_types"} if SHAPES[shape] else config
    (folder / "config.json").write_text(json.dumps({**config, **SHAPES[shape]}))
    reference = HFFolder(folder)
    tensors = {name: torch.full(size, 0.01) for name, size in reference.architecture.tensor_shapes().items()}
    save_hf(tensors.items(), reference, folder.with_name("model"), write=True)
    return tensors


def memory() -> int:
    """Bytes of this process: its own and the shared ones that it maps."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
    return sum(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))


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


def configuration(options: argparse.Namespace, model: Path, run: Path, way: str) -> Config:
    """The quick start on servers, with that model and way."""
    overrides = [f"model.hf_path={model}", f"rollout.servers={options.servers}", f"rollout.sglang.python={options.python}"]
    overrides += [f"rollout.sglang.update={way}", f"rollout.sglang.bucket_mib={options.bucket_mib}", f"logging.dir={run}"]
    file = ROOT / "examples/quickstart/sglang.yaml"
    overrides.append(f"rollout.sglang.port={options.port}")
    config = load_config(file, overrides)
    arguments = [*config.rollout.sglang.arguments, "--mem-fraction-static=0.8", "--max-total-tokens=2048"]  # room for a large model
    return config if model == START else load_config(file, [*overrides, f"rollout.sglang.arguments={json.dumps(arguments)}"])


def measure(options: argparse.Namespace, way: str, root: Path, tensors: dict[str, torch.Tensor]) -> dict:
    """One way's row."""
    config = configuration(options, root / "model", root / way, way)
    engine = create_engine(config, HFFolder(root / "model"), ALONE, lambda text: None)
    try:
        engine.update_weights(tensors.items(), "0")  # the first one makes the group and compares checksums
        seconds, extra = [], 0
        for version in range(1, options.repeats + 1):
            start = time.perf_counter()
            with peak_memory() as largest:
                engine.update_weights(tensors.items(), str(version))
            seconds.append(time.perf_counter() - start)
            extra = max(extra, largest[0])
    finally:
        engine.close()
    sent = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {"name": f"ours, {way}", "seconds": statistics.median(seconds), "extra_bytes": extra, "bytes": sent}


def add_common_options(parser: argparse.ArgumentParser, servers: int) -> None:
    """What benchmarks of servers have in common."""
    parser.add_argument("--servers", type=int, default=servers)
    parser.add_argument("--python", default=str(ROOT / ".venv-sglang/bin/python"), help="interpreter of SGLang's environment")
    parser.add_argument("--port", type=int, default=30100)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the JSON object to FILE, as one line")


def tell(options: argparse.Namespace, shape: dict, rows: list[dict], line: Callable[[dict], str]) -> None:
    """Write and print what was measured; ratios are to the first row. line: a row for people."""
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
    report = {"device": f"{platform.machine()} CPU", "date": datetime.date.today().isoformat(), "shape": shape, "rows": rows}
    if options.output:
        with options.output.open("a") as file:
            file.write(json.dumps(report) + "\n")
    print(json.dumps(report) if options.json else "\n".join(map(line, rows)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_common_options(parser, servers=1)
    parser.add_argument("--shape", choices=SHAPES, default="quickstart")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--ways", default="disk,tensor,distributed")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as root:
        tensors = make_folder(options.shape, Path(root) / "shape")
        rows = [measure(options, way, Path(root), tensors) for way in options.ways.split(",")]
    dist.destroy_process_group()
    shape = {"model": options.shape, "servers": options.servers, "bucket_bytes": options.bucket_mib * 2**20}
    tell(options, shape, rows, _line)


def _line(row: dict) -> str:
    sent, extra = row["bytes"] / 2**20, row["extra_bytes"] / 2**20
    return f"{row['name']:>20}  {row['seconds']:7.3f} s  {sent:9.1f} MiB  extra {extra:8.1f} MiB"


if __name__ == "__main__":
    main()
