"""Two hosts on one machine: two network namespaces, torchrun across them, a link that is cut in the middle of a step.

    sudo python tests/multinode.py [--steps 30] [--folder DIR]

The quick start trains on one rank a host. After the first checkpoint the link goes down: both ranks must end with an error within
the collectives' time-out, and the first host's torchrun with status 1. The other's, which has lost the store that torchruns meet at,
lingers for minutes: it is killed, as `srun --wait` does. The link comes back, the same command goes on from the checkpoint and must
reach the quick start's pass rate.
Needs root and iproute2 (`ip netns`); tests/test_multinode.py runs a short one where it can.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 20  # seconds of a collective; a host notices within it that the other is gone
NOTICE = 90  # seconds until both ranks are gone: the time-out, and a busy machine


def ip(*arguments: str) -> None:
    """Run `ip`. Raises CalledProcessError."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts:
    """Two namespaces joined by a cable; entered, they exist."""

    def __init__(self):
        self.names = [f"srpo{os.getpid()}{letter}" for letter in "ab"]
        self.addresses, self.port = ["10.213.7.1", "10.213.7.2"], "29517"

    def __enter__(self) -> Hosts:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", self.names[0], "type", "veth", "peer", "name", "cable", "netns", self.names[1])
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        return self

    def __exit__(self, *exception) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def cable(self, state: str) -> None:
        """Plug the second host in ("up") or out ("down")."""
        ip("-n", self.names[1], "link", "set", "cable", state)

    def train(self, overrides: list[str], logs: list[Path]) -> list[subprocess.Popen]:
        """torchrun on both hosts, one rank each, meeting at the first one's address."""
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.addresses[0]}:{self.port}", "--rdzv-id", "quickstart"]
        command = [sys.executable, "tools/torchrun.py", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable", "PYTHONPATH": str(ROOT)}
        processes = []
        for name, address, log in zip(self.names, self.addresses, logs, strict=True):
            # Both namespaces have one host name, by which torchrun would not know whose the endpoint is.
            place = ["--local-addr", address, "--rdzv-conf", f"is_host={int(name == self.names[0])}"]
            words = ["ip", "netns", "exec", name, *command, *place, "-m", "megatron_srpo", "train"]
            with log.open("w") as out:
                job = subprocess.Popen(
                    [*words, "examples/quickstart/config.yaml", *overrides],
                    cwd=ROOT,
                    env=environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            processes.append(job)
        return processes


def end(processes: list[subprocess.Popen]) -> None:
    """Kill what is left of both hosts."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def rows(run: Path) -> list[dict]:
    """metrics.jsonl so far."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def errors(log: Path) -> list[str]:
    """What ended the rank of this host, by its log."""
    return [line for line in log.read_text().splitlines() if line.startswith("[rank") and "Error: " in line]


def wait_for(condition, seconds: float, what: str) -> None:
    """Raises TimeoutError when `condition` stays false."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)


def run(folder: Path, steps: int, overrides: Sequence[str] = (), patience: float = 600) -> list[dict]:
    """The whole story in `folder`; metrics.jsonl at its end. Raises AssertionError or TimeoutError where it goes otherwise."""
    runs, logs = folder / "run", [folder / "a.log", folder / "b.log"]
    overrides = [f"logging.dir={runs}", f"train.steps={steps}", "checkpoint.save_interval=2", *overrides]
    overrides.append(f"parallel.distributed_timeout_minutes={TIMEOUT / 60}")
    with Hosts() as hosts:
        processes = hosts.train(overrides, logs)
        try:
            checkpoint = lambda: any((runs / "checkpoints").glob("step_*/manifest.json"))  # noqa: E731
            wait_for(lambda: checkpoint() or any(p.poll() is not None for p in processes), patience, "the first checkpoint")
            assert checkpoint(), logs[0].read_text()[-3000:]
            hosts.cable("down")
            cut, seen = time.monotonic(), max(row["step"] for row in rows(runs))
            wait_for(lambda: all(map(errors, logs)) and processes[0].poll() is not None, NOTICE, "both ranks' end after the cut")
            took = time.monotonic() - cut
        finally:
            end(processes)
        print(f"cut off after step {seen}: both ranks ended within {took:.0f} s; {errors(logs[1])[0]}")
        assert processes[0].returncode == 1 and len(rows(runs)) <= seen + 4
        hosts.cable("up")
        processes = hosts.train(overrides, logs)
        try:
            wait_for(lambda: all(process.poll() is not None for process in processes), patience, "the end of the run")
        finally:
            end(processes)
        assert [process.returncode for process in processes] == [0, 0], logs[0].read_text()[-3000:]
    assert "going on after step" in logs[0].read_text()
    return rows(runs)


def main() -> None:
    """The long version, by hand."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = run(options.folder or Path(scratch), options.steps)
    scores = [row["eval/addition/avg@4"] for row in found if "eval/addition/avg@4" in row]
    print(f"{sum('loss' in row for row in found)} steps; addition/avg@4: {scores[0]:.3f} before, {scores[-1]:.3f} after")
    assert scores[-1] >= 0.80 or options.steps < 30


if __name__ == "__main__":
    main()
