"""Measure seconds, peak memory and page size of `srpo report` on a generated run folder of full size.

    python tools/bench/bench_report.py [--steps 10000] [--full 8] [--link] [--inline] [--json] [--output FILE]

The folder has a row of metrics for every step; `--full` steps, spread over the run, have 256 samples of 8,192
tokens and token values of 8 of them, and every other step has one short sample. The rows: writing the dump of
a full step (in this process), reading all samples of one (`srpo inspect`), and the report (processes of their
own). `extra_bytes` is the peak of resident memory of the process, `file_bytes` the size of what it wrote.
`--link`: the other steps are hard links to complete ones, which fills the run without filling the disk.
`--inline` writes token ids and log-probabilities into the JSON lines, as older versions did.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _memory import status_bytes
from _report import Row, cpu_name, make_parser, publish
from _runs import link_steps, make_group, make_run

from megatron_srpo.data import rollout_file
from megatron_srpo.data.rollout_file import dump, step_file


def run_command(name: str, *arguments: str) -> Row:
    """Run an `srpo` command; return a row with its seconds and its peak memory."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "megatron_srpo", *arguments], stdout=subprocess.DEVNULL)
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        peak = max(peak, status_bytes(process.pid, "VmHWM"))  # ru_maxrss would include this process's memory
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        raise ChildProcessError(f"{name}: exit status {process.returncode}")
    used = ended[2].ru_utime + ended[2].ru_stime
    seconds = time.perf_counter() - start
    return {"name": name, "seconds": seconds, "cpu_seconds": used, "extra_bytes": peak}


def measure(folder: Path, options: Any) -> list[Row]:
    """Return the rows."""
    large = make_run(
        folder, options.steps, options.full, options.prompts, options.samples_per_prompt, options.tokens
    )
    if options.link:
        link_steps(folder / "rollouts", large, options.steps)
    groups = [
        make_group(large[0], number, options.samples_per_prompt, options.tokens)
        for number in range(options.prompts)
    ]
    start, used = time.perf_counter(), time.process_time()
    dump(groups, folder / "rollouts", large[0])
    row: Row = {"name": "dump of a step", "seconds": time.perf_counter() - start}
    row |= {"cpu_seconds": time.process_time() - used, "extra_bytes": 0}
    files = [step_file(folder, large[0]), rollout_file.binary_file(step_file(folder, large[0]))]
    row["file_bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    rows = [row, run_command("inspect", "inspect", str(folder), "--step", str(large[0]))]
    report = run_command("report", "report", str(folder))
    report["file_bytes"] = (folder / "report.html").stat().st_size
    return [*rows, report]


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    size = f"{row['file_bytes'] / 1e6:8.1f} MB written" if "file_bytes" in row else ""
    seconds = f"{row['seconds']:7.2f} s ({row['cpu_seconds']:.2f} s of CPU)"
    return f"{row['name']:>16}  {seconds}  {row['extra_bytes'] / 1e6:6.0f} MB of memory{size}"


def main() -> None:
    """Generate a run folder, measure and publish the report."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--full", type=int, default=8, help="steps with complete samples")
    parser.add_argument("--prompts", type=int, default=32, help="groups of a complete step")
    parser.add_argument("--samples-per-prompt", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="of a response")
    parser.add_argument("--link", action="store_true", help="all other steps are links to complete ones")
    parser.add_argument("--inline", action="store_true", help="token ids in the JSON lines")
    options = parser.parse_args()
    if options.inline:
        rollout_file.INLINE_IDS = sys.maxsize
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder) / "run", options)
    shape = {name: value for name, value in vars(options).items() if name not in ("json", "output")}
    publish(options, cpu_name(), shape, rows, format_row)


if __name__ == "__main__":
    main()
