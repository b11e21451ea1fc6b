"""Test the watchdog: it ends a run in which a rank hangs; any progress keeps it quiet."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_srpo.distributed.files import write_text
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.observe import watchdog
from megatron_srpo.observe.watchdog import Watchdog

ROOT = Path(__file__).parents[2]
LIMIT = 0.6


@pytest.fixture
def ends(monkeypatch):
    """Return the exit statuses with which the watchdog would have ended this process."""
    statuses = []

    def leave(status):
        statuses.append(status)
        raise SystemExit  # ends this thread only

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    return statuses


def rank(number, size=1):
    """Return the part of a layout that the watchdog reads."""
    return SimpleNamespace(rank=number, world_size=size)


def test_no_progress_ends_the_process_and_names_the_place(ends, tmp_path):
    with Watchdog(tmp_path / "w", rank(0), LIMIT / 60, "s"):
        begun = time.monotonic()
        while not ends and time.monotonic() < begun + 20:
            time.sleep(0.05)
        assert ends == [1] and time.monotonic() - begun >= LIMIT
        stacks = (tmp_path / "w" / "rank_00000.stacks.txt").read_text()
        assert "test_no_progress_ends_the_process" in stacks
        assert "no rank made progress" in (tmp_path / "w" / "stalled-s.txt").read_text()


@pytest.mark.parametrize("who", ["own", "other"])
def test_a_long_phase_with_progress_on_some_rank_is_left_alone(who, ends, tmp_path):
    # This rank makes progress, or waits while another one does, each within the limit.
    done = threading.Event()

    def live():
        for number in range(6):
            if who == "own":
                beat()
            else:
                write_text(tmp_path / "w" / "rank_00001.txt", f"s {number}\n")
            done.wait(LIMIT / 2)

    (tmp_path / "w").mkdir()
    with Watchdog(tmp_path / "w", rank(0, 2), LIMIT / 60, "s"):
        live()
        assert ends == []
    assert not (tmp_path / "w" / "rank_00000.stacks.txt").exists()


def test_a_stall_of_an_earlier_start_is_ignored(ends, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "stalled-before.txt").write_text("")
    with Watchdog(tmp_path / "w", rank(1, 2), LIMIT / 60, "s"):
        time.sleep(LIMIT / 2)
        assert ends == []


def beat_for(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        beat()
        time.sleep(LIMIT / 20)


def wait_for_end(ends):
    until = time.monotonic() + 20
    while not ends and time.monotonic() < until:
        time.sleep(0.05)


def test_a_full_disk_ends_neither_the_watchdog_nor_a_healthy_run(ends, tmp_path, monkeypatch):
    # Four seconds of full disk ended the watchdog's thread, and the timer it had set ended the run later.
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Watchdog(tmp_path / "w", rank(0), LIMIT / 60, "s") as dog:
        with monkeypatch.context() as disk:
            disk.setattr(watchdog, "write_text", full)
            disk.setattr(watchdog.os, "utime", full)
            beat_for(2 * LIMIT)
        beat_for(LIMIT / 2)
        assert ends == [] and dog._thread.is_alive()
        assert (tmp_path / "w" / "rank_00000.txt").exists()
        wait_for_end(ends)
        assert ends == [1]


def test_a_stall_on_a_full_disk_is_still_reported(ends, tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(watchdog, "write_text", full)
    with Watchdog(tmp_path / "w", rank(0), LIMIT / 60, "s"):
        wait_for_end(ends)
    assert ends == [1] and "stopped: no rank made progress" in capfd.readouterr().err


def test_a_watchdog_that_dies_takes_its_timer_along(ends, tmp_path, monkeypatch):
    armed = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: armed.append(1))
    monkeypatch.setattr(watchdog.faulthandler, "cancel_dump_traceback_later", armed.clear)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    dog = Watchdog(tmp_path / "w", rank(0), LIMIT / 60, "s")
    monkeypatch.setattr(dog, "_find_stall", lambda: 1 / 0)
    with dog:
        dog._thread.join(20)
        assert armed == []


def test_a_first_rank_whose_process_is_stopped_is_named(ends, tmp_path, capfd):
    # A stopped first rank was not named: only its own watchdog looked at the others.
    (tmp_path / "w").mkdir()
    first = tmp_path / "w" / "rank_00000.txt"
    first.write_text("s 7\nrank 0 on host, process 1: step 2\n")
    with Watchdog(tmp_path / "w", rank(1, 2), LIMIT / 60, "s"):
        for _ in range(8):  # alive: it waits for this rank as long as its own limit allows
            os.utime(first)
            time.sleep(LIMIT / 4)
        assert ends == []
        wait_for_end(ends)
    said = capfd.readouterr().err
    assert ends == [1] and "rank 0 did not respond for" in said
    assert "rank 0 on host, process 1: step 2; did not respond" in said


def launch_hanging(run, how):
    """Run two ranks, one of which hangs in the second step (tests/distributed/sleeper.py), to the end."""
    overrides = [
        "rollout.prompts_per_step=4",
        "rollout.samples_per_prompt=4",
        "train.steps=5",
        "evaluation.every=0",
    ]
    overrides += ["checkpoint.save_interval=0", "logging.watchdog_minutes=0.1", f"logging.dir={run}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "tests/distributed/sleeper.py", how, "examples/quickstart/config.yaml", *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_first_rank_that_is_stopped(tmp_path):
    # SIGSTOP also stops its watchdog: the second rank ends the run and names the first one.
    done = launch_hanging(tmp_path / "run", "stop")
    assert done.returncode != 0
    said = done.stderr[done.stderr.index("stopped: ") :].splitlines()
    assert "rank 0 did not respond for 0.1 minutes" in said[0]
    assert re.match(r"rank 0 on .*: step [0-2], phase ", said[1])  # the last state that it sent
    assert said[1].endswith("did not respond: is its process stopped or lost?")
    assert said[2].startswith("rank 1 on ") and "did not respond" not in said[2]


def test_a_rank_that_sleeps_forever(tmp_path):
    # Two processes print phase, step, last collective and stacks; the launch fails instead of hanging.
    run = tmp_path / "run"
    done = launch_hanging(run, "sleep")
    assert done.returncode != 0
    first, second = ((run / "watchdog" / f"rank_0000{number}.txt").read_text() for number in range(2))
    assert "step 2, phase" in first and "waiting in all_" in first and "among 2 ranks" in first
    assert "step 2, phase teacher" in second and "last collective" in second
    assert "fall_asleep" in (run / "watchdog" / "rank_00001.stacks.txt").read_text()
    assert "fall_asleep" not in (run / "watchdog" / "rank_00000.stacks.txt").read_text()
    assert "stopped: no rank made progress for 0.1 minutes" in done.stderr
    assert first.splitlines()[1] in done.stderr
