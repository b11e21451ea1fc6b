"""Test which ranks wait for the others before they exit, and which exit at once.

Only GPUs can show NCCL's part.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from soak import free_port

from megatron_srpo.config.schema import ParallelSection
from megatron_srpo.distributed import layout as parallel
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.rollout.batch import Batch
from megatron_srpo.rollout.source import LiveRollouts

ROOT = Path(__file__).parents[2]


class Collective(Exception):
    """Represent an error that all ranks raise together."""


@pytest.mark.parametrize(
    "ranks, error, leaves", [(2, None, True), (2, Collective, True), (2, OSError, False), (1, OSError, True)]
)
def test_a_rank_that_fails_alone_does_not_wait_for_those_that_wait_for_it(monkeypatch, ranks, error, leaves):
    left = []
    monkeypatch.setattr(parallel, "initialize", lambda *_: SimpleNamespace(world_size=ranks))
    monkeypatch.setattr(parallel, "shut_down", left.append)
    try:
        with parallel.process_group(ParallelSection(), 1, collective_errors=(Collective,)):
            if error is not None:
                raise error
    except (Collective, OSError) as caught:
        assert type(caught) is error
    assert len(left) == leaves


def test_its_error_is_printed_and_its_process_ends():
    # Two ranks: the second's command fails while both are in a group; the first would wait for it.
    code = (
        "import os, sys, time; import torch.distributed as dist; import megatron_srpo.__main__ as program;"
        "import megatron_srpo.commands.report as report;"
        "dist.init_process_group('gloo');"
        "fail = lambda *_: (_ for _ in ()).throw(OSError('the disk is gone'));"
        "report.run = fail if dist.get_rank() else lambda *_: time.sleep(60);"
        "sys.argv = ['megatron_srpo', 'report', 'x'];"
        "import atexit; atexit.register(time.sleep, 60);"
        "program.main()"
    )
    port, ranks = free_port(), []
    for rank in range(2):
        place = {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PYTHONPATH": ROOT,
        }
        environment = {name: str(value) for name, value in place.items()}
        ranks.append(
            subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
        )
    try:
        _, said = ranks[1].communicate(timeout=50)
        assert ranks[1].returncode == 1 and "OSError: the disk is gone" in said
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_an_error_of_the_sampling_thread_is_raised_before_the_next_publication():
    # With async_steps the other ranks' threads wait for this rank's groups, and their main threads for those
    # threads; this rank must not wait as well.
    engine = SimpleNamespace(update_weights=lambda *_: pytest.fail("published"))
    builder = SimpleNamespace(
        collector=SimpleNamespace(engine=engine),
        build=lambda step, watch=None: Batch([], {}) if step == 1 else 1 / 0,
    )
    rollouts = LiveRollouts(builder, Stopwatch(lambda name: None), last_step_ahead=9)
    rollouts.collect(1)
    with pytest.raises(ZeroDivisionError):
        rollouts.publish(iter(()), 1)
