"""Run the quick start as a user does, without the installation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_srpo_learns_addition(tmp_path):
    # 30 steps of examples/quickstart/config.yaml: from about 0.49 to at least 0.80 at temperature 1, while
    # engine and trainer agree.
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "megatron_srpo",
        "train",
        "examples/quickstart/config.yaml",
        f"logging.dir={run}",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [row["eval/addition/avg@4"] for row in rows if "eval/addition/avg@4" in row]
    assert 0.42 <= scores[0] <= 0.56
    assert scores[-1] >= 0.80
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 30
    assert max(row["engine_logprob_gap_max"] for row in steps) < 1e-4
    assert (
        steps[0]["sdpo_sample_share"] > 0.3 > steps[-1]["sdpo_sample_share"]
    )  # the share falls with the failures
    assert f"{scores[0]:.3f} before, {scores[-1]:.3f} after" in done.stdout and str(
        run
    ) in done.stdout.replace("\n", "")
