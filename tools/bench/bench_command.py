"""Time until `srpo --help`, `srpo config` and `srpo plan` have answered, and `srpo train` has made a step.

    python tools/bench/bench_command.py [--rounds 5] [--baseline REF] [--json] [--output FILE]

Each command runs in a process of its own, whose files have been read once before; `seconds` is the median
of the rounds, and `cpu_seconds` that of its CPU time, which other processes disturb less. The first row is
the interpreter alone, and `ratio` is to it. `extra_bytes` is the process's peak resident memory,
`imports_torch` says whether it has imported torch, and `load` is the machine's load average of the minute
before. The row `srpo train` is of the quick start until the end of step 1, which is after an evaluation; its
CPU time is that of all its processes. With --baseline it is measured at that commit too, in turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from _baseline import baseline_tree, tree_environment
from _memory import status_bytes
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


def train_one_step(tree: Path) -> tuple[float, float, int]:
    """Train the quick start with a tree's package; return seconds, CPU seconds and bytes after step 1."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["train", "examples/quickstart/config.yaml", "train.steps=1", f"logging.dir={folder}/run"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [*SRPO, *arguments],
            cwd=tree,
            env=tree_environment(tree),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        metrics, found = Path(folder) / "run" / "metrics.jsonl", None
        while process.poll() is None:
            if found is None and metrics.exists() and '"loss"' in metrics.read_text():
                seconds = time.perf_counter() - began
                found = seconds, cpu_seconds(process.pid), status_bytes(process.pid, "VmHWM")
            time.sleep(0.01)
        assert process.stderr is not None
        if process.returncode != 0 or found is None:
            raise ValueError(
                f"srpo train in {tree}: {process.stderr.read().decode(errors='replace')[-2000:]}"
            )
        return found


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds of a process and its descendants so far; 0 if it has ended."""
    folder = Path(f"/proc/{process}")
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        children = " ".join((task / "children").read_text() for task in (folder / "task").iterdir()).split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime
    return own + sum(cpu_seconds(int(child)) for child in children)


def imports_torch(arguments: list[str]) -> bool:
    """Return True if the command with these arguments imports torch."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found"
        run([sys.executable, "-c", CHECK, str(file), *arguments])
        return file.read_text() == "True"


def measure(name: str, command: list[str], rounds: int) -> Row:
    """Return the row of a command, after one run that is not counted."""
    run(command)
    return make_row(name, [run(command) for _ in range(rounds)])


def measure_step(trees: dict[str, Path], rounds: int) -> list[Row]:
    """Return the rows of `srpo train` in each tree, which take turns, after one run that is not counted."""
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in trees}
    for number in range(rounds + 1):
        for name, tree in trees.items():
            result = train_one_step(tree)
            if number:
                found[name].append(result)
    return [make_row(name, results) | {"imports_torch": True} for name, results in found.items()]


def make_row(name: str, found: list[tuple[float, float, int]]) -> Row:
    """Return the row of what `run` or `train_one_step` returned in each round."""
    seconds, cpu, peaks = zip(*found, strict=True)
    row = {"name": name, "seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu)}
    return row | {"extra_bytes": max(peaks)}


def format_row(row: Row) -> str:
    """Return the line to print."""
    torch = ", imports torch" if row["imports_torch"] else ""
    seconds = f"{row['seconds']:6.3f} s  CPU {row['cpu_seconds']:6.3f} s"
    return f"{row['name']:>22}  {seconds}  {row['extra_bytes'] / 2**20:5.0f} MiB{torch}"


def main() -> None:
    """Measure every command, and publish the rows."""
    options = make_parser(__doc__, rounds=5, baseline=True).parse_args()
    shape = {"rounds": options.rounds, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    rows = [measure("python -c pass", [sys.executable, "-c", "pass"], options.rounds)]
    rows[0]["imports_torch"] = False
    for name, arguments in COMMANDS.items():
        row = measure(f"srpo {name}", [*SRPO, *arguments], options.rounds)
        rows.append(row | {"imports_torch": imports_torch(arguments)})
    with baseline_tree(options.baseline) if options.baseline else nullcontext() as tree:
        trees = {"srpo train": ROOT}
        if tree is not None:
            trees[f"srpo train at {options.baseline}"] = tree
        rows.extend(measure_step(trees, options.rounds))
    add_ratios(rows)
    publish(options, cpu_name(), shape, rows, format_row)


if __name__ == "__main__":
    main()
