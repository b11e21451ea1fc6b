"""Train on two simulated hosts and cut the link between them in the middle of a step.

The hosts are network namespaces on one machine; torchrun spans two of them.

    sudo python tests/helpers/multinode.py [--steps 30] [--sglang .venv-sglang/bin/python] [--folder DIR]

The quick start trains on one rank per host; with --sglang an SGLang server on a third host samples, and gets
its weights over the network. After the first checkpoint the second host is disconnected: both ranks must end
with an error within the collectives' time-out, and the first host's torchrun with status 1. The other
torchrun has lost the rendezvous store and would linger for minutes: it is killed, as `srun --wait` does. The
second host is reconnected; the same command resumes from the checkpoint and must reach the quick start's pass
rate. Needs root and iproute2 (`ip netns`); tests/test_multinode.py and tests/sglang/test_third_host.py run
short versions where they can.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from megatron_srpo.config.load import load_config
from megatron_srpo.rollout.sglang.server import launch_of

ROOT = Path(__file__).parents[2]
KEY = "SRPO_MULTINODE_KEY"  # the environment variable with the third host's API key
EMBEDDED, SERVED = (ROOT / "examples/quickstart" / name for name in ("config.yaml", "sglang.yaml"))
TIMEOUT = 20  # seconds of a collective; a host notices within it that the other is gone
NOTICE = 90  # seconds until both ranks are gone: the time-out, and a busy machine


def ip(*arguments: str) -> None:
    """Run `ip`; raise CalledProcessError if it fails."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Return the reason that there cannot be hosts on this machine, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        ip("netns", "add", name := f"srpo{os.getpid()}try")
        ip("netns", "del", name)
    except FileNotFoundError:
        return "network namespaces need iproute2's ip"
    except subprocess.CalledProcessError as error:
        return f"ip netns: {error.stderr.strip()}"
    return None


class Hosts:
    """Create namespaces on one switch while entered: two that train and one that may sample."""

    def __init__(self):
        *self.names, self.switch = [f"srpo{os.getpid()}{letter}" for letter in "abcs"]
        self.addresses, self.port = ["10.213.7.1", "10.213.7.2", "10.213.7.3"], "29517"

    def __enter__(self) -> Hosts:
        for name in (self.switch, *self.names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
        ip("-n", self.switch, "link", "set", "switch", "up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            ip(
                "link",
                "add",
                "cable",
                "netns",
                name,
                "type",
                "veth",
                "peer",
                "name",
                f"port{number}",
                "netns",
                self.switch,
            )
            ip("-n", self.switch, "link", "set", f"port{number}", "master", "switch", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        return self

    def __exit__(self, *exception) -> None:
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], check=False)

    def cable(self, state: str) -> None:
        """Plug the second host in ("up") or out ("down")."""
        ip("-n", self.names[1], "link", "set", "cable", state)

    @contextmanager
    def server(self, python: Path, log: Path) -> Iterator[list[str]]:
        """Start an SGLang server on the third host; yield the overrides that name it.

        The weights come from the first host.
        """
        os.environ[KEY] = "open sesame"
        overrides = [
            f"rollout.sglang.host={self.addresses[2]}",
            f"rollout.sglang.api_key_env={KEY}",
            f"rollout.sglang.python={python}",
        ]
        config = load_config(SERVED, [*overrides, "rollout.servers=1", f"logging.dir={log.parent}"])
        launch = launch_of(config)
        environment = {**os.environ, **config.rollout.sglang.environment, "GLOO_SOCKET_IFNAME": "cable"}
        environment.pop("PYTHONPATH", None)
        with log.open("w") as out:
            words = ["ip", "netns", "exec", self.names[2], *launch.command(0)]
            job = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        url = launch.urls(1)[0]
        program = f"import httpx; httpx.get({url!r} + '/health').raise_for_status()"
        ask = ["ip", "netns", "exec", self.names[2], sys.executable, "-c", program]

        def answers() -> bool:
            return subprocess.run(ask, capture_output=True).returncode == 0

        try:
            wait_for(lambda: job.poll() is not None or answers(), 300, "the server's start")
            assert job.poll() is None, log.read_text()[-3000:]
            reach = [f"rollout.urls=[{url}]", "rollout.servers=0", f"rollout.sglang.api_key_env={KEY}"]
            reach += [
                "rollout.sglang.health_timeout=20",
                "rollout.sglang.return_timeout=20",
            ]  # a host that loses it aborts after both
            yield [
                *reach,
                "rollout.sglang.update=distributed",
                f"rollout.sglang.trainer_host={self.addresses[0]}",
            ]
        finally:
            end([job])

    def train(self, config: Path, overrides: list[str], logs: list[Path]) -> list[subprocess.Popen]:
        """Start torchrun on the first two hosts, one rank each, meeting at the first one's address."""
        meeting = [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"{self.addresses[0]}:{self.port}",
            "--rdzv-id",
            "quickstart",
        ]
        command = [sys.executable, "tools/torchrun.py", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "cable",
            "PYTHONPATH": str(ROOT),
        }
        processes = []
        for name, address, log in zip(self.names, self.addresses, logs, strict=False):
            # Both namespaces have one host name, by which torchrun would not know whose the endpoint is.
            place = ["--local-addr", address, "--rdzv-conf", f"is_host={int(name == self.names[0])}"]
            words = ["ip", "netns", "exec", name, *command, *place, "-m", "megatron_srpo", "train"]
            with log.open("w") as out:
                job = subprocess.Popen(
                    [*words, str(config), *overrides],
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
    """Return the rows of metrics.jsonl so far."""
    file = run / "metrics.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        if file.exists()
        else []
    )


def errors(log: Path) -> list[str]:
    """Return the lines of a host's log that say what ended its rank."""
    return [
        line
        for line in log.read_text().splitlines()
        if line.startswith("[rank") and "Error: " in line or "no server is left" in line
    ]


def wait_for(condition, seconds: float, what: str) -> None:
    """Wait until `condition` holds; raise TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)


def run(
    folder: Path, steps: int, overrides: Sequence[str] = (), sglang: Path | None = None, patience: float = 600
) -> list[dict]:
    """Train in `folder`, cut the link, resume; return the rows of metrics.jsonl at the end.

    Raises AssertionError or TimeoutError if anything goes differently. sglang: the interpreter that runs the
    third host's server; None: the ranks sample.
    """
    config = EMBEDDED if sglang is None else SERVED
    runs, logs = folder / "run", [folder / "a.log", folder / "b.log"]
    overrides = [f"logging.dir={runs}", f"train.steps={steps}", "checkpoint.save_interval=2", *overrides]
    overrides.append(f"parallel.distributed_timeout_minutes={TIMEOUT / 60}")
    with (
        Hosts() as hosts,
        nullcontext([]) if sglang is None else hosts.server(sglang, folder / "server.log") as reach,
    ):
        overrides += reach
        processes = hosts.train(config, overrides, logs)
        try:
            checkpoint = lambda: any((runs / "checkpoints").glob("step_*/manifest.json"))  # noqa: E731
            wait_for(
                lambda: checkpoint() or any(p.poll() is not None for p in processes),
                patience,
                "the first checkpoint",
            )
            assert checkpoint(), logs[0].read_text()[-3000:]
            hosts.cable("down")
            cut, seen = time.monotonic(), max(row["step"] for row in rows(runs))
            wait_for(
                lambda: all(map(errors, logs)) and processes[0].poll() is not None,
                NOTICE,
                "both ranks' end after the cut",
            )
            took = time.monotonic() - cut
        finally:
            end(processes)
        print(f"cut off after step {seen}: both ranks ended within {took:.0f} s; {errors(logs[1])[0]}")
        assert processes[0].returncode == 1 and len(rows(runs)) <= seen + 4
        hosts.cable("up")
        processes = hosts.train(config, overrides, logs)
        try:
            wait_for(
                lambda: all(process.poll() is not None for process in processes),
                patience,
                "the end of the run",
            )
        finally:
            end(processes)
        assert [process.returncode for process in processes] == [0, 0], logs[0].read_text()[-3000:]
    assert "resuming from step" in logs[0].read_text()
    return rows(runs)


def main() -> None:
    """Run the long version, started by hand."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--sglang", type=Path, metavar="PYTHON", help="a third host samples: the interpreter of its SGLang"
    )
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = run(options.folder or Path(scratch), options.steps, sglang=options.sglang)
    scores = [row["eval/addition/avg@4"] for row in found if "eval/addition/avg@4" in row]
    steps = sum("loss" in row for row in found)
    print(f"{steps} steps; addition/avg@4: {scores[0]:.3f} before, {scores[-1]:.3f} after")
    assert scores[-1] >= 0.80 or options.steps < 30


if __name__ == "__main__":
    main()
