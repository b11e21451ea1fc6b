"""Run the benchmarks of the report and of preflight, scaled down. Figures are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(name, *arguments):
    command = [sys.executable, f"tools/bench/{name}.py", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_report():
    small = ["--steps", "40", "--full", "2", "--prompts", "2", "--samples-per-prompt", "2", "--tokens", "700"]
    binary, inline = run("bench_report", *small, "--link"), run("bench_report", *small, "--inline")
    for found in (binary, inline):
        assert [row["name"] for row in found["rows"]] == ["dump of a step", "inspect", "report"]
        assert all(row["seconds"] > 0 for row in found["rows"])
    # Ids and log-probabilities are most of a step: 8 bytes a token in the binary file, about 25 as text.
    assert binary["rows"][0]["file_bytes"] < 0.6 * inline["rows"][0]["file_bytes"]
    assert 0 < binary["rows"][2]["extra_bytes"] < 1e9 and binary["rows"][2]["file_bytes"] < 20e6


def test_preflight():
    found = run("bench_preflight", "--questions", "2000", "--kinds", "chemistry")
    assert [row["name"] for row in found["rows"]] == ["chemistry"]
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["extra_bytes"] >= 0 and row["file_bytes"] > 400_000
