"""Run the benchmark of the verifier pool, which checks its verdicts and reports what it skips.

Timings are not judged.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_report(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text("{}\n")
    command = [
        sys.executable,
        "tools/bench/bench_verifiers.py",
        "--questions",
        "4",
        "--workers",
        "1",
        "--json",
        "--output",
        str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{}, report]
    assert set(report) == {"device", "date", "shape", "rows", "skipped"}
    has_math = importlib.util.find_spec("math_verify") is not None
    assert [row["name"] for row in report["rows"]] == ["multiple_choice", "tool_calls"] + ["math"] * has_math
    assert list(report["skipped"]) == ([] if has_math else ["math"])
    for row in report["rows"]:
        assert set(row) == {"name", "seconds", "ratio", "extra_bytes", "verdicts", "verdicts_per_second"}
        assert row["verdicts"] == 32 and row["seconds"] > 0 and row["ratio"] > 0
