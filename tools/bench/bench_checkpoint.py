"""Measure what saving costs the quick start: a checkpoint after every step, async or not, and none.

    python tools/bench/bench_checkpoint.py [--steps 20] [--json] [--output FILE]

`seconds` is the median of a step, the time it waits for saving included; `ratio` is to the run without
checkpoints; `extra_bytes` is a checkpoint's size on disk.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _report import ROOT, Row, add_ratios, cpu_name, make_parser, publish

RUNS = {
    "no checkpoints": ["checkpoint.save_interval=0"],
    "ours": ["checkpoint.save_interval=1"],
    "ours, not async": ["checkpoint.save_interval=1", "checkpoint.async_save=false"],
}


def measure(name: str, steps: int, folder: Path) -> Row:
    """Train in `folder`; return the row without its ratio."""
    command = [sys.executable, "-m", "megatron_srpo", "train", "examples/quickstart/config.yaml"]
    settings = [f"train.steps={steps}", "evaluation.every=0", f"logging.dir={folder}", *RUNS[name]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *settings], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    # A step's row is written before its checkpoint begins: the next row has the time.
    seconds = [json.loads(line)["seconds"] for line in lines[2:]]
    size = 0
    for checkpoint in sorted((folder / "checkpoints").glob("step_*"))[-1:]:
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    return {"name": name, "seconds": statistics.median(seconds), "extra_bytes": size}


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    size = row["extra_bytes"] / 2**20
    return f"{row['name']:>20}  {row['seconds']:.3f} s a step  {row['ratio']:5.2f}  {size:.1f} MiB"


def main() -> None:
    """Measure each way of saving and publish the report."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, options.steps, Path(folder) / name) for name in RUNS]
    add_ratios(rows)
    publish(options, cpu_name(threads=1), {"steps": options.steps}, rows, format_row)


if __name__ == "__main__":
    main()
