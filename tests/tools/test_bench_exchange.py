"""The benchmark of the exchange runs; its bytes hardly depend on the number of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_report(tmp_path):
    file = tmp_path / "results.jsonl"
    sizes = ["--groups", "4", "--tokens", "50", "--ranks", "64", "512", "--rounds", "1"]
    command = [sys.executable, "tools/bench/bench_exchange.py", *sizes, "--json", "--output", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert json.loads(file.read_text()) == report
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["json, 64 ranks", "json, 512 ranks", "binary, 64 ranks", "binary, 512 ranks"]
    few, many = rows["binary, 64 ranks"], rows["binary, 512 ranks"]
    assert many["received"] - few["received"] <= 2 * 8 * (512 - 64)  # the sizes of the messages
    assert many["received"] < rows["json, 512 ranks"]["received"] / 10
