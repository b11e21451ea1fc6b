"""The benchmark of the embedded engine runs and counts its tokens. Timings are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_report(tmp_path):
    file = tmp_path / "results.jsonl"
    command = [sys.executable, "tools/bench/bench_engine.py", "--shape", "tiny", "--rounds", "1"]
    command += ["--prompts", "2", "--answers", "3", "--prompt-tokens", "9", "--tokens", "6"]
    done = subprocess.run(
        [*command, "--json", "--output", file], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert json.loads(file.read_text()) == report
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["generate, fixed", "ours, fixed", "generate, varied", "ours, varied"]
    for row in rows.values():
        assert row["tokens_a_second"] * row["seconds"] == pytest.approx(2 * 3 * 6)
