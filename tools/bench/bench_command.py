"""Time until `srpo --help`, `srpo config` and `srpo plan` have answered, and the memory they take.

    python tools/bench/bench_command.py [--rounds 5] [--json] [--output FILE]

Each command runs in a process of its own, whose files have been read once before; `seconds` is the median
of the rounds, and `cpu_seconds` that of its CPU time, which other processes disturb less. The first row is
the interpreter alone, and `ratio` is to it. `extra_bytes` is the process's peak resident memory,
`imports_torch` says whether it has imported torch, and `load` is the machine's load average of the minute
before.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import QUICKSTART, ROOT, Row, add_ratios, cpu_name, make_parser, publish

# Runs `srpo` with the arguments, then writes to the file whether torch was imported.
CHECK = """
import sys
from megatron_srpo.__main__ import main
file = sys.argv.pop(1)
try:
    main()
finally:
    open(file, "w").write(str("torch" in sys.modules))
"""
SRPO = [sys.executable, "-m", "megatron_srpo"]
COMMANDS = {
    "--help": ["--help"],
    "config": ["config"],
    "plan": ["plan", str(QUICKSTART / "config.yaml"), f"hf_path={QUICKSTART / 'start'}", "--machine", "cpu"],
}


def run(command: list[str]) -> tuple[float, float, int]:
    """Run it; return seconds, CPU seconds and peak resident bytes. Raises ValueError if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise ValueError(f"{' '.join(command)}: {errors.decode(errors='replace')[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def imports_torch(arguments: list[str]) -> bool:
    """Return True if the command with these arguments imports torch."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found"
        run([sys.executable, "-c", CHECK, str(file), *arguments])
        return file.read_text() == "True"


def measure(name: str, command: list[str], rounds: int) -> Row:
    """Return the row of a command, after one run that is not counted."""
    run(command)
    found = [run(command) for _ in range(rounds)]
    seconds, cpu_seconds, peaks = zip(*found, strict=True)
    row = {"name": name, "seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu_seconds)}
    return row | {"extra_bytes": max(peaks)}


def format_row(row: Row) -> str:
    """Return the line to print."""
    torch = ", imports torch" if row["imports_torch"] else ""
    seconds = f"{row['seconds']:6.3f} s  CPU {row['cpu_seconds']:6.3f} s"
    return f"{row['name']:>16}  {seconds}  {row['extra_bytes'] / 2**20:5.0f} MiB{torch}"


def main() -> None:
    """Measure every command, and publish the rows."""
    options = make_parser(__doc__, rounds=5).parse_args()
    shape = {"rounds": options.rounds, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    rows = [measure("python -c pass", [sys.executable, "-c", "pass"], options.rounds)]
    rows[0]["imports_torch"] = False
    for name, arguments in COMMANDS.items():
        row = measure(f"srpo {name}", [*SRPO, *arguments], options.rounds)
        rows.append(row | {"imports_torch": imports_torch(arguments)})
    add_ratios(rows)
    publish(options, cpu_name(), shape, rows, format_row)


if __name__ == "__main__":
    main()
