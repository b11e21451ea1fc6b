"""Run the benchmark of the quick start's step without TRL, which it must report as skipped.

Timings are not judged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_bench(tmp_path):
    # One step a row, one row for each algorithm of ours.
    (tmp_path / "trl.py").write_text("raise ImportError('no TRL in this test')")
    (tmp_path / "datasets.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [
        sys.executable,
        "tools/bench/bench_quickstart.py",
        "--steps",
        "1",
        "--rounds",
        "1",
        "--rows",
        "ours srpo",
        "TRL grpo",
        "--prompt-tokens",
        "100",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert set(report) == {"device", "date", "shape", "rows", "skipped"}
    assert report["skipped"] == {"TRL grpo": "ImportError: no TRL in this test"}
    step, *parts = report["rows"]
    assert [row["name"] for row in report["rows"]] == [
        "ours srpo",
        "ours srpo, sampling",
        "ours srpo, training",
    ]
    assert step["median"] >= step["seconds"] > 0 and step["ratio"] is None
    assert step["seconds"] == pytest.approx(sum(part["seconds"] for part in parts))
    assert report["shape"]["prompt_tokens"] == 100
