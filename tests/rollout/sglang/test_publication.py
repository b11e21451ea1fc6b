"""Test the order of calls to servers when weights arrive and memory is released, without real servers."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing
from servers import listening

from megatron_srpo.config.load import load_config
from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import Request, Sampling
from megatron_srpo.rollout.servers import generation
from megatron_srpo.rollout.servers.fleet import Fleet
from megatron_srpo.rollout.servers.generation import Generation
from megatron_srpo.rollout.sglang import publication
from megatron_srpo.rollout.sglang.api import SGLangAPI
from megatron_srpo.rollout.sglang.capabilities import Capabilities
from megatron_srpo.rollout.sglang.engine import find_unreachable
from megatron_srpo.rollout.sglang.publication import Broadcast, SharedMemory, Update, buckets
from megatron_srpo.rollout.sglang.publisher import Publisher
from megatron_srpo.rollout.sglang.server import SGLangLaunch, SGLangServer
from megatron_srpo.rollout.sglang.settings import SGLangSettings

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
TENSORS = [(name, torch.full((4,), float(number))) for number, name in enumerate("abc")]


@contextmanager
def server(answer=lambda path, body: (200, {})):
    """Answer as `answer(path, body)` says; yield (url, the requests: [(path, body)])."""
    asked = []

    def reply(request, body):
        body = json.loads(body or "null")
        asked.append((request.path, body))
        status, content = answer(request.path, body)
        return status, json.dumps(content).encode()

    with listening(reply) as stand_in:
        yield stand_in.url, asked


NOWHERE = SGLangServer("http://127.0.0.1:9", SGLangSettings())


def launch_with(logs, start):
    """Return a launch that starts what `start(number)` returns."""
    return SimpleNamespace(
        logs=logs, start=start, log=lambda number: logs / "log", start_timeout=900, max_restarts=3
    )


def update_of(*urls):
    return Update([SGLangServer(url, SGLangSettings()) for url in urls], "7", needs_session=True)


def test_a_server_has_the_version_only_with_the_last_bucket():
    # A server that misses the rest must not call itself "7": its weights would be taken for complete.
    with server() as (url, asked):
        update = update_of(url)
        SharedMemory(16, CPU, lambda server: 1).send(update, iter(TENSORS))
        update.close()
    versions = [body["weight_version"] for path, body in asked if path == "/update_weights_from_tensor"]
    assert versions == [None, None, "7"] and not update.failures


def test_a_bucket_outlives_as_many_others_as_there_are_memories():
    made = buckets(TENSORS, 16, lambda size: torch.empty(size, dtype=torch.uint8), 2)
    seen = [(bucket.data.data_ptr(), bucket.is_last) for bucket in made]
    assert seen[0][0] == seen[2][0] != seen[1][0] and [last for _, last in seen] == [False, False, True]


def test_threads_that_share_memory_do_not_change_how_the_others_do(monkeypatch):
    # The second of two handles is made when the first thread has finished: it, too, must be a named file.
    before, dumps = torch.multiprocessing.get_sharing_strategy(), publication.ForkingPickler.dumps
    both, order = threading.Event(), iter("ab")

    def slow(what):
        if next(order) == "a":
            both.wait(20)
        else:
            both.set()
            time.sleep(0.2)
        return dumps(what)

    monkeypatch.setattr(publication.ForkingPickler, "dumps", slow)
    with server() as (one, asked), server() as (other, asked_too):
        update = update_of(one, other)
        SharedMemory(64, CPU, lambda server: 1).send(update, iter(TENSORS))
        update.close()
    handles = [
        body["serialized_named_tensors"][0]
        for path, body in asked + asked_too
        if path == "/update_weights_from_tensor"
    ]
    assert len(handles) == 2 and all(
        b"rebuild_storage_filename" in base64.b64decode(handle) for handle in handles
    )
    assert torch.multiprocessing.get_sharing_strategy() == before


def test_no_broadcast_to_a_group_that_a_server_has_not_joined(monkeypatch):
    # NCCL makes its group without waiting; the first broadcast would wait forever for the server that
    # refused.
    monkeypatch.setattr(
        publication, "_group", lambda *_: SimpleNamespace(broadcast=lambda *_: pytest.fail("broadcast"))
    )
    monkeypatch.setattr(publication.dist, "destroy_process_group", lambda group: None)

    def refuses(path, body):
        return (400, {}) if path == "/init_weights_update_group" else (200, {})

    said = []
    with server() as (good, _), server(refuses) as (bad, _):
        update = update_of(good, bad)
        Broadcast(64, CPU, None, 20, lambda server: 1, said.append).send(update, iter(TENSORS))
        update.close()
    assert [server.url for server in update.missed] == [good] and [
        server.url for server in update.failures
    ] == [bad]
    assert said == ["falling back to disk weight sync: a server did not join the group"]


def test_released_servers_stay_paused_until_weights_and_memory_are_back(tmp_path):
    # A token in between, for instance of a health check, would use memory that is not there and end the
    # server.
    given = ["rollout.servers=0", "rollout.urls=[http://a:1]", f"logging.dir={tmp_path}"]
    config = load_config(ROOT / "examples/quickstart/sglang.yaml", given)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"colocated": True})})
    with server(lambda path, body: (200, {"weight_version": "0"})) as (url, asked):
        folder, weights = HFFolder(ROOT / "examples/quickstart/start"), tmp_path / "weights"
        publisher = Publisher(
            config.rollout, folder, [url], None, CPU, torch.float32, weights, lambda text: None
        )
        publisher.capabilities[url] = Capabilities("0.5.23", True, False, 1)
        publisher.transport = SharedMemory(64, CPU, lambda server: 1)
        publisher.release_memory()
        released, asked[:] = [(path, body) for path, body in asked], []
        publisher.publish(iter(TENSORS), "0")
        publisher.close()
    assert [path for path, _ in released] == ["/pause_generation", "/release_memory_occupation"]
    assert released[0][1] == {"mode": "retract"}
    steps = [
        path.strip("/") if body is None or "tags" not in body else body["tags"][0] for path, body in asked
    ]
    order = [
        "weights",
        "pause_generation",
        "begin_weight_update",
        "update_weights_from_tensor",
        "end_weight_update",
        "kv_cache",
    ]
    assert [step for step in steps if step in (*order, "continue_generation")] == [
        *order,
        "continue_generation",
    ]


def test_what_is_starting_is_ended_while_memory_is_the_trainers(tmp_path):
    # A colocated server that was lost while sampling must not take GPU memory in the middle of an update.
    started = []

    def start(number):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]))
        return started[-1]

    fleet = Fleet([NOWHERE], launch_with(tmp_path, start), lambda text: None)
    try:
        assert len(started) == 1 and started[0].poll() is None
        fleet.forbid_starts()
        assert started[0].poll() is not None
        time.sleep(0.6)
        assert (
            len(started) == 1 and fleet.handles[0].state == "starting" and not fleet.handles[0].failed_starts
        )
        fleet.allow_starts()
        until = time.monotonic() + 10
        while len(started) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(started) == 2 and started[1].poll() is None
    finally:
        fleet.close()
    assert started[1].poll() is not None


def test_a_server_that_cannot_be_restarted_is_abandoned(tmp_path):
    # An error in the thread that restarts it would go unnoticed: the run would wait for the server at every
    # publication.
    started, said = [], []

    def start(number):
        if started:
            raise OSError("no memory for another process")
        started.append(subprocess.Popen(["sleep", "100"]))
        return started[-1]

    fleet = Fleet([NOWHERE], launch_with(tmp_path, start), said.append)
    fleet.handles[0].has_started = True
    started[0].kill()
    fleet.threads[0].join(20)
    assert not fleet.is_starting() and "no memory for another process" in fleet.failed()
    assert "giving up on server 0: it could not be started: no memory for another process" in said
    fleet.close()


def test_a_log_that_holds_the_key_is_its_owners_alone(tmp_path, monkeypatch):
    # SGLang writes all its arguments to its log.
    monkeypatch.setenv("A_KEY", "open sesame")
    for name, others_read in (("A_KEY", False), (None, True)):
        settings = SGLangSettings(python="/bin/true", api_key_env=name)
        logs = tmp_path / str(name)
        logs.mkdir()
        launch = SGLangLaunch(
            logs=logs,
            start_timeout=1,
            max_restarts=0,
            secret=name and "open sesame",
            settings=settings,
            model=tmp_path,
            dtype="float32",
            has_gpus=False,
            saves_memory=False,
        )
        for _ in range(2):  # an existing log file kept its mode and received the key
            launch.start(0).wait(20)
            assert bool(launch.log(0).stat().st_mode & 0o077) == others_read
            launch.log(0).chmod(0o644)


def test_a_rank_that_reaches_no_server_says_so_at_the_start():
    # The first rank's 127.0.0.1 is another host to ranks elsewhere, which used to wait for an hour.
    assert re.fullmatch(
        r"rollout.engine: rank 8 on \S+ cannot reach a server: http://127.0.0.1:9/model_info: ConnectError.*",
        find_unreachable(["http://127.0.0.1:9"], RolloutSection(), 8),
    )
    with server(lambda path, body: (200, {"weight_version": "default"})) as (url, _):
        assert find_unreachable([url], RolloutSection(), 8) is None
    said = find_unreachable([], RolloutSection(sglang=SGLangSettings(api_key_env="NOBODY_SETS_THIS")), 8)
    assert "rank 8 on " in said and "NOBODY_SETS_THIS" in said


def asking(url):
    """Return (a rank that uses the server at `url`, a function that samples, the completions so far)."""
    settings = SGLangSettings(health_timeout=0.3, retries=2)
    made = Generation(SGLangAPI(3, False), [url], settings, 3, 0, 1, lambda *_: None, lambda seconds: None)
    made.versions, done = ["0"], []

    def generate():
        for new in made.generate([Request((0, 1), "x")], Sampling(1.0, 1.0, 4, (2,)), threading.Event()):
            done.extend(new.values())

    return made, generate, done


def reply(ids, reason):
    rows = [[-0.5, token, None] for token in ids]
    return 200, {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": reason},
            "weight_version": "0",
            "output_token_logprobs": rows,
        },
    }


def test_a_response_aborted_with_its_last_token_is_complete():
    # In SGLang an abort takes precedence over a stop token of the same pass; nothing may be sampled after
    # that token.
    with server(lambda path, body: reply([1, 2], "abort")) as (url, asked):
        _, generate, done = asking(url)
        generate()
    assert [(completion.ids, completion.finish_reason) for completion in done] == [([1, 2], "stop")]
    assert [path for path, _ in asked] == ["/generate"]


def test_a_server_that_hangs_is_not_used_again_for_the_version_it_names(monkeypatch):
    # Its HTTP side answers /model_info; the part that makes tokens hangs, as /health shows.
    monkeypatch.setattr(generation, "_HEALTH_INTERVAL", 0.02)
    is_stuck = threading.Event()
    is_stuck.set()

    def answer(path, body):
        if path == "/health" and is_stuck.is_set():
            time.sleep(0.5)
        return reply([2], "stop") if path == "/generate" else (200, {"weight_version": "0"})

    with server(answer) as (url, asked):
        made, generate, done = asking(url)
        made.targets[0].quarantined = "it hung"
        thread = threading.Thread(target=generate)
        thread.start()
        time.sleep(1.0)
        assert not done and {path for path, _ in asked} == {"/model_info", "/health"}
        is_stuck.clear()
        thread.join(20)
    assert [completion.ids for completion in done] == [[2]]
