"""Run training jobs on several ranks and read back their results."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import runpy
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch
from safetensors.torch import load_file
from soak import free_port

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """Read a finished run's folder."""

    folder: Path

    @property
    def rows(self) -> list[dict]:
        """Return the training steps of metrics.jsonl."""
        return [
            row
            for line in (self.folder / "metrics.jsonl").read_text().splitlines()
            if "loss" in (row := json.loads(line))
        ]

    @property
    def weights(self) -> dict:
        """Return the exported model's tensors."""
        return load_file(self.folder / "hf" / "model.safetensors")


def launch(ranks: int, script: str, jobs: list[dict], file: Path, timeout: float = 420) -> None:
    """Run tests/distributed/`script` on `ranks` processes, with `jobs` written to `file`.

    An error contains the output of the processes. They start as with torchrun, but are forked from one
    process that has done the imports: those take 10 s of CPU time each.
    """
    file.write_text(json.dumps(jobs))
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(
        [
            "megatron_srpo.train",
            "megatron_srpo.evaluation.run",
            "transformers.models.qwen3.modeling_qwen3",
        ]
    )
    place = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    logs = [file.with_suffix(f".rank_{rank}.log") for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        environment = {
            **os.environ,
            **{name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()},
        }
        processes.append(fork.Process(target=_be_rank, args=(environment, HERE / script, file, log)))
        processes[-1].start()
    running, until = {process.sentinel: process for process in processes}, time.monotonic() + timeout
    while (
        running and all(process.exitcode in (None, 0) for process in processes) and time.monotonic() < until
    ):
        for sentinel in wait(running, timeout=1):
            running.pop(sentinel).join()
    for process in running.values():  # one has failed, or time is over
        process.kill()
        process.join()
    statuses = [process.exitcode for process in processes]
    assert not any(statuses), "\n".join(
        [f"exit statuses {statuses}", *(log.read_text()[-3000:] for log in logs)]
    )


def _be_rank(environment: dict[str, str], script: Path, file: Path, log: Path) -> None:
    os.environ.update(environment)
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))
    sys.argv = [str(script), str(file)]
    # imported objects are not garbage: collecting twice a job took as long as training
    gc.freeze()
    runpy.run_path(str(script), run_name="__main__")


def run_jobs(
    ranks: int, config: Path, jobs: dict[str, list[str]], folder: Path, evaluated: tuple[str, ...] = ()
) -> dict[str, Run]:
    """Train `config` once per job in one launch of `ranks` processes.

    `jobs` is {name: overrides}; run folders are folder/name. The jobs named in `evaluated` evaluate instead.
    """
    listed = [
        {
            "command": "eval" if name in evaluated else "train",
            "config": str(config),
            "overrides": [*overrides, f"logging.dir={folder / name}"],
        }
        for name, overrides in jobs.items()
    ]
    launch(ranks, "layouts.py", listed, folder / f"jobs-{ranks}.json")
    return {name: Run(folder / name) for name in jobs}
