"""Run the benchmark of the converters, which checks its round trip.

Timings are not judged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_bench(tmp_path):
    # One JSON object, appended to --output as well; nothing is left in the folder.
    file, folder = tmp_path / "results.jsonl", tmp_path / "folder"
    folder.mkdir()
    command = [
        sys.executable,
        "tools/bench/bench_convert.py",
        "--shape",
        "tiny",
        "--repeats",
        "1",
        "--folder",
        folder,
        "--json",
        "--output",
        file,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert json.loads(file.read_text()) == report and not list(folder.iterdir())
    assert set(report) == {"device", "date", "shape", "rows"}
    assert [row["name"] for row in report["rows"]] == ["copy", "HF to Megatron", "Megatron to HF"]
    for row in report["rows"]:
        assert set(row) == {"name", "seconds", "ratio", "extra_bytes"}
        assert row["seconds"] >= 0 and row["extra_bytes"] >= 0
