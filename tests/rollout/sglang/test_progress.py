"""Test what the watchdog counts as progress of SGLang servers, without real servers.

Answers, tokens and bounded waits are progress, silence is not.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from servers import listening

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config
from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.distributed.heartbeat import PROGRESS
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.preflight import preflight
from megatron_srpo.rollout.engine import EngineFailed, Request, Sampling
from megatron_srpo.rollout.servers import generation
from megatron_srpo.rollout.servers.fleet import Fleet
from megatron_srpo.rollout.servers.generation import Generation
from megatron_srpo.rollout.servers.http import ServerFailed
from megatron_srpo.rollout.sglang import engine
from megatron_srpo.rollout.sglang.api import SGLangAPI
from megatron_srpo.rollout.sglang.engine import SGLangEngine
from megatron_srpo.rollout.sglang.publication import Update
from megatron_srpo.rollout.sglang.server import SGLangServer
from megatron_srpo.rollout.sglang.settings import SGLangSettings

ROOT = Path(__file__).parents[3]
REPLY = {
    "output_ids": [2],
    "meta_info": {
        "finish_reason": {"type": "stop"},
        "weight_version": "0",
        "output_token_logprobs": [[-0.5, 2, None]],
    },
}


@contextmanager
def server(is_healthy):
    """Answer /generate once `released` is set, and /health at once or also only then.

    Yields (url, released).
    """
    released = threading.Event()

    def answer(request, _):
        if request.path == "/generate" or not is_healthy:
            released.wait(20)
        return 200, json.dumps(REPLY).encode()

    with listening(answer) as stand_in:
        try:
            yield stand_in.url, released
        finally:
            released.set()


def generating(url, no_server_reason=lambda seconds: None):
    """Return (a rank that uses the server at `url`, its completions of one request as an iterator)."""
    api = SGLangAPI(3, False)
    made = Generation(api, [url], SGLangSettings(), 3, 0, 1, lambda *_: None, no_server_reason)
    made.versions = ["0"]
    return made, made.generate([Request((0, 1), "x")], Sampling(1.0, 1.0, 4, (2,)), threading.Event())


def beats_during(seconds):
    before = PROGRESS.beats
    time.sleep(seconds)
    return PROGRESS.beats - before


@pytest.mark.parametrize("is_healthy", [True, False])
def test_a_long_response_is_progress_while_its_server_makes_tokens(is_healthy, monkeypatch):
    # One request takes forever: SGLang's /health answers while tokens are made. A server that hangs gives no
    # sign.
    monkeypatch.setattr(generation, "_HEALTH_INTERVAL", 0.02)
    done = []
    with server(is_healthy) as (url, released):
        _, completions = generating(url)
        asking = threading.Thread(
            target=lambda: done.extend(one.ids for new in completions for one in new.values())
        )
        asking.start()
        time.sleep(0.5)  # the request is on its way
        assert (beats_during(0.5) > 3) == is_healthy and not done
        released.set()
        asking.join(20)
    assert done == [[2]]


def test_waiting_for_a_server_to_come_back_is_progress_until_it_is_hopeless():
    made, completions = generating(
        "http://127.0.0.1:9", lambda seconds: "it is over" if seconds > 0.5 else None
    )
    made.targets[0].quarantined = "left out by the test"
    before = PROGRESS.beats
    with pytest.raises(EngineFailed, match="it is over"):
        list(completions)
    assert PROGRESS.beats - before >= 3


def test_each_answer_to_a_publication_is_progress_and_silence_is_none():
    # Three calls to two servers, one of which fails; then one call without an answer.
    servers = [SGLangServer(f"http://127.0.0.1:{port}", SGLangSettings()) for port in (8, 9)]
    update, answer = Update(servers, "1", needs_session=False), threading.Event()

    def call(server):
        if server is servers[1]:
            raise ServerFailed("no")

    before = PROGRESS.beats
    update.each(call)
    assert PROGRESS.beats - before == 1 and update.live == servers[:1]
    waiting = threading.Thread(target=update.each, args=(lambda server: answer.wait(20),))
    waiting.start()
    assert beats_during(0.3) == 0
    answer.set()
    waiting.join(20)
    assert PROGRESS.beats - before == 2
    update.close()


def test_waits_for_servers_that_start_are_progress(monkeypatch):
    # At the start and before a publication; both are bounded by settings of their own.
    fleet = Fleet([SGLangServer("http://127.0.0.1:9", SGLangSettings())], None, lambda text: None)
    fleet.handles[0].state, before = "starting", PROGRESS.beats
    fleet.wait(0.3)
    assert PROGRESS.beats - before >= 3
    monkeypatch.setattr(engine, "_HEARTBEAT", 0.01)
    looks = iter([True, True, True, False])
    publisher = SimpleNamespace(
        inspect=lambda: None,
        is_seeded=True,
        fleet=SimpleNamespace(is_starting=lambda: next(looks)),
    )
    folder, before = HFFolder(ROOT / "examples/quickstart/start"), PROGRESS.beats
    with server(is_healthy=True) as (url, _):
        SGLangEngine(RolloutSection(), folder, Layout(), [url], publisher)
    assert PROGRESS.beats - before == 3


def test_a_line_that_cannot_be_printed_ends_no_thread_of_the_servers():
    # No thread dies of I/O: those that supervise servers print, on a disk that may be full.
    def full(text):
        raise OSError(errno.ENOSPC, text)

    fleet = Fleet([SGLangServer("http://127.0.0.1:9", SGLangSettings())], None, full)
    fleet.report_failure("http://127.0.0.1:9", "it hangs", is_invalid=False)
    assert fleet.handles[0].state == "quarantined"


def test_a_watchdog_less_patient_than_publications_is_refused():
    given = [f"model.hf_path={ROOT / 'examples/quickstart/start'}", "rollout.sglang.update_timeout=900"]
    with pytest.raises(
        ConfigError, match=r"logging.watchdog_minutes: 8 minutes would end .*update_timeout \(900 s\)"
    ):
        preflight(load_config(ROOT / "examples/quickstart/sglang.yaml", given))
