"""Runs training jobs under torchrun and reads back what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """A finished run's folder."""

    folder: Path

    @property
    def rows(self) -> list[dict]:
        """The training steps of metrics.jsonl."""
        return [row for line in (self.folder / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]

    @property
    def weights(self) -> dict:
        """The exported model."""
        return load_file(self.folder / "hf" / "model.safetensors")


def torchrun(ranks: int, script: str, jobs: list[dict], file: Path, timeout: float = 420) -> None:
    """Run tests/distributed/`script` on `ranks` processes with `jobs` written to `file`; what rank 0 said is in the failure."""
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(HERE / script), str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("[rank0]")] or done.stderr.splitlines()
    assert done.returncode == 0, "\n".join([done.stdout[-2000:], *told[-60:]])


def run_jobs(ranks: int, config: Path, jobs: dict[str, list[str]], folder: Path, evaluated: tuple[str, ...] = ()) -> dict[str, Run]:
    """Train `config` once a job, {name: overrides}, in one launch of `ranks` processes; run folders are folder/name.

    The jobs named in `evaluated` evaluate instead.
    """
    listed = [
        {
            "command": "eval" if name in evaluated else "train",
            "config": str(config),
            "overrides": [*overrides, f"logging.dir={folder / name}"],
        }
        for name, overrides in jobs.items()
    ]
    torchrun(ranks, "layouts.py", listed, folder / f"jobs-{ranks}.json")
    return {name: Run(folder / name) for name in jobs}
