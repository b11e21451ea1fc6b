"""Run the benchmark of the vocabulary pass: it reports what it skips, and `ours` is exact.

Timings are not judged.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ["ours", "ours, new gradient", "ours, top-100 + tail"]
BARE = ["gemms", "elementwise"]
AUTOGRAD = ["naive autograd", "top-100 + tail"]
PEERS = ["TRL full", "TRL top-100 + tail", "Liger fused JSD"]


@pytest.fixture
def bench(tmp_path):
    """Run the program where TRL cannot be imported, even if installed; return its JSON object."""
    (tmp_path / "trl.py").write_text("raise ImportError('no TRL in this test')")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def run(*arguments: str) -> dict:
        shape = [
            "--tokens",
            "64",
            "--hidden",
            "32",
            "--vocab",
            "2001",
            "--device",
            "cpu",
            "--threads",
            "1",
            "--repeats",
            "1",
        ]
        command = [sys.executable, "tools/bench/bench_vocab_loss.py", *shape, "--json", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


def check(report: dict, ranks: int, present: list[str], absent: list[str]) -> dict[str, dict]:
    """Check what every report holds; return its rows by name."""
    assert set(report) == {"device", "date", "shape", "rows", "skipped"}
    shape = {
        "tokens": 64,
        "hidden": 32,
        "vocab": 2001,
        "tensor_parallel": ranks,
        "chunk": None,
        "dtype": "float32",
        "threads": 1,
    }
    assert report["shape"] == shape
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == present and list(report["skipped"]) == absent
    for name, row in rows.items():
        assert set(row) == {"name", "seconds", "ratio", "extra_bytes"} | (
            {"error"} if name not in BARE else set()
        )
        assert row["seconds"] > 0 and row["extra_bytes"] >= 0
    assert all(report["skipped"].values())
    assert rows["gemms"]["ratio"] == 1
    assert all(rows[name]["error"] <= 2e-6 for name in OURS)
    return rows


def test_one_rank(bench, tmp_path):
    # Every row but those of TRL, which is missing, and of Liger, which needs CUDA; --output gets the same
    # object as a line.
    file = tmp_path / "results.jsonl"
    file.write_text("{}\n")
    report = bench("--output", str(file))
    rows = check(report, 1, BARE + OURS + AUTOGRAD, PEERS)
    assert all(math.isfinite(rows[name]["error"]) for name in AUTOGRAD)
    assert (
        report["skipped"]["TRL full"] == "no TRL in this test"
        and "CUDA" in report["skipped"]["Liger fused JSD"]
    )
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{}, report]


def test_two_ranks(bench):
    # On shards of unequal width; methods that need the complete vocabulary are named as skipped.
    check(bench("--tensor-parallel", "2"), 2, BARE + OURS, AUTOGRAD + PEERS)


def test_sweep(bench):
    # `ours` alone, once for each number of tokens.
    report = bench("--sweep-tokens", "16", "48")
    assert [row["name"] for row in report["rows"]] == ["ours T=16", "ours T=48"] and report["shape"][
        "tokens"
    ] == [16, 48]
    assert all(row["extra_bytes"] >= 0 for row in report["rows"])
