"""What saving costs the quick start: its step with a checkpoint after every step, written beside training or
not, and without.

    python tools/bench/bench_checkpoint.py [--steps 20] [--json] [--output FILE]

`seconds` is the median of a step, what it waits for saving included, `ratio` is to the run without
checkpoints, `extra_bytes` a checkpoint's size on disk.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS = {
    "no checkpoints": ["checkpoint.save_interval=0"],
    "ours": ["checkpoint.save_interval=1"],
    "ours, not async": ["checkpoint.save_interval=1", "checkpoint.async_save=false"],
}


def run(overrides: list[str], steps: int, folder: Path) -> dict[str, float]:
    """One run's row, without its ratio."""
    command = [sys.executable, "-m", "megatron_srpo", "train", "examples/quickstart/config.yaml"]
    settings = [f"train.steps={steps}", "evaluation.every=0", f"logging.dir={folder}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *settings], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # a step's row is written before its checkpoint is begun, which the next row tells
    seconds = [row["seconds"] for row in rows[2:]]
    checkpoint = sorted((folder / "checkpoints").glob("step_*"))[-1:]
    size = sum(file.stat().st_size for path in checkpoint for file in path.iterdir())
    return {"seconds": statistics.median(seconds), "extra_bytes": size}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="append the JSON object to FILE, as one line"
    )
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, overrides) in enumerate(RUNS.items()):
            rows.append({"name": name, **run(overrides, options.steps, Path(folder) / str(number))})
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
    device = f"{platform.machine()} CPU, 1 thread"
    report = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "shape": {"steps": options.steps},
        "rows": rows,
    }
    if options.output:
        with options.output.open("a") as file:
            file.write(json.dumps(report) + "\n")
    if options.json:
        print(json.dumps(report))
        return
    for row in rows:
        print(
            f"{row['name']:>20}  {row['seconds']:.3f} s a step  {row['ratio']:5.2f}  {row['extra_bytes'] / 2**20:.1f} MiB"
        )


if __name__ == "__main__":
    main()
