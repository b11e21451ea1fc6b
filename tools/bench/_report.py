"""Share --json and --output, the device's name and the report between all benchmarks.

A report is one JSON object {"device", "date", "shape": {…}, "rows": [{"name", "seconds", "ratio",
"extra_bytes", …}]}, with "skipped" ({name: reason}) where a benchmark may leave rows out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
Row = dict[str, Any]


def make_parser(
    description: str | None, rounds: int | None = None, baseline: bool = False
) -> argparse.ArgumentParser:
    """Return a parser with --json and --output; with --rounds too where a default is given.

    Args:
        description: The benchmark's docstring; its first paragraph is shown by --help.
        rounds: Default number of measurements of each row.
        baseline: Add --baseline, for a benchmark that measures another commit too (`_baseline.py`).
    """
    summary = (description or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="append the JSON object to FILE as a line"
    )
    if rounds is not None:
        parser.add_argument(
            "--rounds", "--repeats", type=int, default=rounds, help="measurements of each row (%(default)s)"
        )
    if baseline:
        parser.add_argument("--baseline", metavar="REF", help="measure this commit too, in the same run")
    return parser


def cpu_name(threads: int | None = None) -> str:
    """Return for example `x86_64 CPU, 1 thread`."""
    name = f"{platform.machine()} CPU"
    if threads is None:
        return name
    return f"{name}, {threads} thread{'s' if threads != 1 else ''}"


def device_name(use_cuda: bool, threads: int) -> str:
    """Return the GPU's name, or that of the CPU with its threads."""
    if use_cuda:
        import torch

        return torch.cuda.get_device_name()
    return cpu_name(threads)


def add_ratios(rows: list[Row]) -> None:
    """Set each row's `ratio`: its seconds to those of the first row."""
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]


def publish(
    options: argparse.Namespace,
    device: str,
    shape: Row,
    rows: list[Row],
    format_row: Callable[[Row], str],
    skipped: dict[str, str] | None = None,
) -> None:
    """Append the report to --output, and print it: one JSON object with --json, otherwise a table.

    Args:
        options: Parsed by `make_parser`.
        device: See `cpu_name` and `device_name`.
        shape: What was measured.
        rows: One a method, `ratio` included.
        format_row: Return a row as a line of the table.
        skipped: {name: reason} of the rows that are missing; None where none can be.
    """
    report = {"device": device, "date": datetime.date.today().isoformat(), "shape": shape, "rows": rows}
    if skipped is not None:
        report["skipped"] = skipped
    if options.output:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")
    if options.json:
        print(json.dumps(report))
        return
    print(f"{device}, {report['date']}, {shape}")
    for row in rows:
        print(format_row(row))
    for name, reason in (skipped or {}).items():
        print(f"{name:>20}  skipped: {reason}")
