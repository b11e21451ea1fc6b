"""Kill and resume a run many times; compare its result with the uninterrupted run, bit for bit.

    python tests/helpers/soak.py [--ranks 2] [--steps 12] [--kills 8] [--seed 1] [--folder DIR]

Each time a random rank, or all of them, get SIGKILL: after a random time, or as soon as a checkpoint is being
written. Then the same command is started again. Compared with an uninterrupted run: weights, metrics (but for
seconds), and every sample: each prompt is trained once. Prints the kills survived. Any length
by hand; tests/checkpoint/test_soak.py runs a short one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 30  # seconds in which the other ranks must notice that one has ended; torchrun allows as many


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(ranks: int, overrides: list[str], log: Path) -> list[int]:
    """Start the ranks of one run; return their process ids.

    They are forked from this process, so its imports are not repeated.
    """
    port, processes = free_port(), []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(value) for name, value in place.items()})
            with log.open("a") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            status = 1
            try:
                from megatron_srpo.__main__ import main

                sys.argv = ["megatron_srpo", "train", "examples/quickstart/config.yaml", *overrides]
                status = main()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        processes.append(process)
    return processes


def finish(processes: list[int], patience: float | None) -> list[int]:
    """Wait for all; kill the rest after `patience` seconds. Return exit statuses, -9 for the killed."""
    deadline = None if patience is None else time.monotonic() + patience
    statuses: dict[int, int] = {}
    while len(statuses) < len(processes):
        for process in processes:
            if process not in statuses and (done := os.waitpid(process, os.WNOHANG))[0]:
                statuses[process] = os.waitstatus_to_exitcode(done[1])
        if deadline is not None and time.monotonic() > deadline:
            for process in set(processes) - set(statuses):
                os.kill(process, signal.SIGKILL)
            deadline = None
        time.sleep(0.02)
    return [statuses[process] for process in processes]


def is_saving(run: Path) -> bool:
    """Return whether a checkpoint is being written right now."""
    checkpoints = run / "checkpoints"
    return checkpoints.is_dir() and any(name.startswith(".step_") for name in os.listdir(checkpoints))


def steps_done(run: Path) -> int:
    """Return the number of training steps in metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def kill_once(processes: list[int], run: Path, dice: random.Random, seconds_a_step: float) -> str | None:
    """Wait for the moment and kill; return a description, or None when the run ended before."""
    during_save, everyone = dice.random() < 0.5, dice.random() < 0.5
    until = time.monotonic() + dice.uniform(1.5, 4.0) * max(seconds_a_step, 0.5)
    before = steps_done(run)
    while True:
        ended = [
            process
            for process in processes
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        ]
        if len(ended) == len(processes):
            return None
        moved = steps_done(run) > before  # otherwise the run would make no progress
        if moved and (is_saving(run) if during_save else time.monotonic() >= until):
            break
        time.sleep(0.0005 if during_save else 0.01)
    victims = processes if everyone else [dice.choice(processes)]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    who, when = "all ranks" if everyone else "one rank", " during a save" if during_save else ""
    return f"{who}{when}, after {steps_done(run)} steps"


def comparable(run: Path) -> dict[str, object]:
    """Return everything that must be equal between two runs."""
    from safetensors.torch import load_file

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]
    weights = {
        name: tensor.numpy().tobytes() for name, tensor in load_file(run / "hf" / "model.safetensors").items()
    }
    samples = {file.name: file.read_bytes() for file in sorted((run / "rollouts").iterdir())}
    return {"metrics": metrics, "weights": weights, "samples": samples}


def soak(ranks: int, steps: int, kills: int, seed: int, folder: Path) -> int:
    """Kill and resume one run up to `kills` times; return the number of kills survived.

    Raises AssertionError when the runs differ, RuntimeError when one cannot resume.
    """
    overrides = [
        f"train.steps={steps}",
        *("rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "rollout.batch_size=8"),
        *("evaluation.every=3", "evaluation.prompts=4", "evaluation.samples=2", "checkpoint.save_interval=2"),
        "parallel.distributed_timeout_minutes=1",
    ]
    uninterrupted, cut = folder / "uninterrupted", folder / "cut"
    begun = time.monotonic()
    if any(
        finish(start(ranks, [*overrides, f"logging.dir={uninterrupted}"], folder / "uninterrupted.log"), None)
    ):
        raise RuntimeError((folder / "uninterrupted.log").read_text()[-3000:])
    seconds_a_step = (time.monotonic() - begun) / (steps + 2)
    dice, survived = random.Random(seed), 0
    while True:
        processes = start(ranks, [*overrides, f"logging.dir={cut}"], folder / "cut.log")
        done = kill_once(processes, cut, dice, seconds_a_step) if survived < kills else None
        statuses = finish(processes, PATIENCE if done else None)
        if done is None:
            if any(statuses):
                raise RuntimeError(
                    f"the run could not resume: {statuses}\n{(folder / 'cut.log').read_text()[-3000:]}"
                )
            break
        survived += 1
        print(f"kill {survived}: {done}", flush=True)
    expected, found = comparable(uninterrupted), comparable(cut)
    for what in expected:
        assert found[what] == expected[what], f"{what} differ from the uninterrupted run's"
    files = [cut / "rollouts" / f"step_{step:06d}.jsonl" for step in range(1, steps + 1)]
    samples = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    prompts = list(dict.fromkeys(sample["prompt"]["id"] for sample in samples))
    expected = [f"addition/train/{number}" for number in range(4 * steps)]
    assert len(samples) == 16 * steps and prompts == expected, "a prompt was trained twice or skipped"
    return survived


def main() -> None:
    """Run a soak of any length from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kills", type=int, default=8, help="at most; the run may be over before")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: a temporary one)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(ROOT)
    from megatron_srpo.__main__ import quieten_libraries

    quieten_libraries()
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401  (imported once, here, not in every rank)

    import megatron_srpo.train  # noqa: F401

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        survived = soak(options.ranks, options.steps, options.kills, options.seed, folder)
    print(f"{survived} kills survived: weights, metrics and samples equal the uninterrupted run's")


if __name__ == "__main__":
    main()
