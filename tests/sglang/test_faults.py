"""Test servers that crash, hang or answer wrongly in the middle of sampling.

Every sample is returned once, from the right weights, and the servers come back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from servers import ALONE, ROOT, START, config_of, free_ports, listening, sample

from megatron_srpo.config.base import ConfigError
from megatron_srpo.rollout.engine import EngineFailed
from megatron_srpo.rollout.engines import create_engine
from megatron_srpo.weights.transfer import Repeatable

pytestmark = pytest.mark.needs_sglang


def proxy(url: str, spoil):
    """Forward everything to a server, but `spoil` (status, body) of every answer to /generate."""

    def answer(request, body):
        headers = {"Content-Type": "application/json", "Authorization": request.headers["Authorization"]}
        forwarded = urllib.request.Request(
            url + request.path, body if request.command == "POST" else None, headers, method=request.command
        )
        try:
            with urllib.request.urlopen(forwarded, timeout=60) as response:
                status, content = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        if request.path == "/generate" and b'"max_new_tokens": 1}' not in body.replace(
            b'":1}', b'": 1}'
        ):  # not the request at the start
            status, content = spoil(status, content)
        return status, content

    return listening(answer)


def changed(change):
    """Return a spoiler that edits the reply."""

    def spoil(status, content):
        reply = json.loads(content)
        change(reply)
        return status, json.dumps(reply).encode()

    return spoil


def with_first_logprob(value):
    return changed(lambda reply: reply["meta_info"]["output_token_logprobs"][0].__setitem__(0, value))


def _rename_first_token(reply, token):
    reply["output_ids"][0] = reply["meta_info"]["output_token_logprobs"][0][1] = token


FAULTS = {
    "answers 500": (lambda status, content: (500, b"oops"), "/generate: 500: oops"),
    "garbage": (lambda status, content: (200, b'{"text": "ha'), "/generate: "),
    "no log-probabilities": (
        changed(lambda reply: reply["meta_info"].pop("output_token_logprobs")),
        "not of the shape of a reply",
    ),
    "NaN": (with_first_logprob(float("nan")), "not a finite number below 0"),
    "positive": (with_first_logprob(0.5), "not a finite number below 0"),
    "lost token": (changed(lambda reply: reply["output_ids"].pop()), "the log-probabilities are those of"),
    "strange id": (
        changed(lambda reply: _rename_first_token(reply, 384)),
        "an output id is outside the vocabulary of 384",
    ),
    "old weights": (
        changed(lambda reply: reply["meta_info"]["weight_versions"][0].__setitem__("version", "-1")),
        "made by weights ['-1']",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lying_server_is_quarantined_and_the_other_does_its_work(servers, fault):
    # The faulty server is a proxy of a real one; nothing that it said is in a completion.
    servers.publish(seed=6)
    spoil, reason = FAULTS[fault]
    good, behind = (target.url for target in servers.engine.generation.targets)
    said: list[str] = []
    with proxy(behind, spoil) as bad:
        config = config_of(
            servers.run,
            "rollout.servers=0",
            f"rollout.urls=[{bad.url},{good}]",
            "rollout.sglang.concurrency=8",
        )
        engine = create_engine(config, servers.folder, ALONE, said.append)
        try:
            engine.update_weights(list(servers.model.named_parameters()), str(servers.version))
            requests = servers.requests(16)
            completions = sample(engine, requests, servers.sampling())
            assert servers.gap(requests, completions) < 1e-4
            out, used = (
                engine.generation.targets
                if engine.generation.targets[0].url == bad.url
                else engine.generation.targets[::-1]
            )
            assert reason in out.quarantined and used.quarantined is None
            assert any(bad.url in line and reason in line for line in said)
            # a server that answers 500 may recover; one with wrong replies stays quarantined
            engine.update_weights(list(servers.model.named_parameters()), str(servers.version))
            assert (out.quarantined is None) == (fault == "answers 500")
        finally:
            engine.close()


def test_a_run_without_servers_stops_and_says_why(servers):
    servers.publish(seed=None)
    behind = servers.engine.generation.targets[0].url
    with proxy(behind, lambda status, content: (status, content)) as server:
        config = config_of(
            servers.run,
            "rollout.servers=0",
            f"rollout.urls=[{server.url}]",
            "rollout.sglang.return_timeout=1",
        )
        engine = create_engine(config, servers.folder, ALONE, lambda text: None)
        engine.update_weights(list(servers.model.named_parameters()), str(servers.version))
        server.shutdown()
        server.server_close()
        left = f"no server is left: none has come back in 1 s .*{server.url}: /health: ConnectError"
        with pytest.raises(EngineFailed, match=left):
            sample(engine, servers.requests(4), servers.sampling())
        engine.close()


def tree(process: int) -> list[int]:
    """Return a process and all its descendants."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(below for child in children for below in tree(int(child)))]


def signal_server(servers, number: int, what: signal.Signals) -> None:
    """Signal a server's complete process tree, but not its guard."""
    for process in tree(servers.engine.publisher.fleet.handles[number].process.pid)[1:]:
        os.kill(process, what)


def slow_down(servers, seconds: float) -> None:
    for handle in servers.engine.publisher.fleet.handles:
        handle.server.post("/slow_down", {"forward_sleep_time": seconds})


def test_a_server_killed_while_it_samples(servers):
    # The other server completes the batch; after the next publication both are there and sample with its
    # weights.
    servers.publish(seed=7)
    slow_down(servers, 0.01)
    before = [handle.server.incarnation for handle in servers.engine.publisher.fleet.handles]
    requests = servers.requests(64)
    kill = lambda done: signal_server(servers, 1, signal.SIGKILL) if done == 8 else None  # noqa: E731
    completions = sample(servers.engine, requests, servers.sampling(), seen=kill)
    assert servers.gap(requests, completions) < 1e-4
    version = servers.publish(seed=8)
    after = [handle.server.incarnation for handle in servers.engine.publisher.fleet.handles]
    assert after[0] == before[0] and after[1] > before[1], (
        servers.said
    )  # a start may fail, and is tried again
    assert all(target.quarantined is None for target in servers.engine.generation.targets)
    completions = sample(servers.engine, requests, servers.sampling())
    assert servers.gap(requests, completions) < 1e-4
    assert {span[0] for completion in completions for span in completion.versions} == {version}


def test_all_servers_hang_while_they_sample(servers, monkeypatch):
    # SIGSTOP to both: nothing answers any more. They are ended and restarted, load the newest weights from
    # disk, and the batch is completed without a publication in between.
    impatient = servers.engine.generation.settings.model_copy(update={"health_timeout": 8.0})
    monkeypatch.setattr(servers.engine.generation, "settings", impatient)
    version = servers.publish(seed=9)
    slow_down(servers, 0.02)
    requests = servers.requests(48)

    def stop(done: int) -> None:
        if done == 6:
            signal_server(servers, 0, signal.SIGSTOP)
            signal_server(servers, 1, signal.SIGSTOP)

    completions = sample(servers.engine, requests, servers.sampling(), seen=stop)
    assert servers.gap(requests, completions) < 1e-4
    assert {span[0] for completion in completions for span in completion.versions} == {version}


def test_a_server_killed_while_weights_are_broadcast(servers, updating):
    # The broadcast's group is broken: the other server gets the same version from disk, and so does the
    # killed one after its restart.
    updating("distributed")
    servers.publish(seed=10)
    servers.engine.publisher.transport.limit = 100_000
    weights = {name: tensor.clone() for name, tensor in servers.model.named_parameters()}
    iterations = []

    def stream():
        iterations.append(0)
        for number, item in enumerate(weights.items()):
            if number == len(weights) // 2 and len(iterations) == 1:
                signal_server(servers, 1, signal.SIGKILL)
            yield item

    servers.version += 1
    servers.engine.update_weights(Repeatable(stream), str(servers.version))
    assert len(iterations) == 2
    requests, usable = (
        servers.requests(12),
        [target for target in servers.engine.generation.targets if target.quarantined is None],
    )
    assert servers.engine.publisher.fleet.handles[0].server.url in {target.url for target in usable}
    completions = sample(servers.engine, requests, servers.sampling())
    assert servers.gap(requests, completions) < 1e-4
    fleet = servers.engine.publisher.fleet
    fleet.wait(300)
    assert [handle.state for handle in fleet.handles] == ["ready", "ready"]
    assert [handle.server.version() for handle in fleet.handles] == [str(servers.version)] * 2


def test_servers_that_a_killed_trainer_left_in_the_middle_of_an_update(servers):
    # Paused, and with a session open, as after kill -9 of a trainer on external servers; the next run uses
    # them as they are.
    servers.publish(seed=11)
    for handle in servers.engine.publisher.fleet.handles:
        handle.server.post("/pause_generation", {"mode": "retract"})
        handle.server.post("/begin_weight_update", {})
    urls = ",".join(target.url for target in servers.engine.generation.targets)
    given = [
        "rollout.servers=0",
        f"rollout.urls=[{urls}]",
        "rollout.sglang.update=tensor",
        "rollout.sglang.request_timeout=20",
    ]
    engine = create_engine(config_of(servers.run, *given), servers.folder, ALONE, lambda text: None)
    try:
        engine.update_weights(list(servers.model.named_parameters()), str(servers.version))
        requests = servers.requests(8)
        assert servers.gap(requests, sample(engine, requests, servers.sampling())) < 1e-4
        assert all(target.quarantined is None for target in engine.generation.targets)
    finally:
        engine.close()


def test_a_server_that_cannot_be_started_is_reported_with_its_last_output(servers, tmp_path):
    port = free_ports(1)
    config = config_of(
        tmp_path,
        "rollout.servers=1",
        f"rollout.sglang.port={port}",
        "rollout.sglang.arguments=[--no-such-option]",
    )
    with pytest.raises(
        ConfigError,
        match=r"server 0 could not be started: exited with status 2; .*server_0.log(.|\n)*no-such",
    ):
        create_engine(config, servers.folder, ALONE, lambda text: None)


def test_no_server_outlives_a_killed_trainer(servers, tmp_path):
    # kill -9 to the process that started a server, once the server has workers of its own.
    config = config_of(tmp_path, "rollout.servers=1", f"rollout.sglang.port={free_ports(1)}")
    code = (
        "import sys, time; from pathlib import Path; from megatron_srpo.config.load import load_config;"
        "from megatron_srpo.rollout.sglang.server import launch_of;"
        "launch = launch_of(load_config(Path(sys.argv[1]), sys.argv[2:])); launch.logs.mkdir(parents=True);"
        "print(launch.start(0).pid, flush=True); time.sleep(600)"
    )
    given = [
        f"model.hf_path={START}",
        "rollout.servers=1",
        f"rollout.sglang.port={config.rollout.sglang.port}",
        f"logging.dir={tmp_path}",
    ]
    given.append(f"rollout.sglang.python={config.rollout.sglang.python}")
    command = [sys.executable, "-c", code, str(ROOT / "examples/quickstart/sglang.yaml"), *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        guard = int(trainer.stdout.readline())
        until = time.monotonic() + 180
        while (
            len(processes := tree(guard)) < 4 and time.monotonic() < until
        ):  # guard, server, resource tracker, scheduler …
            time.sleep(0.1)
        assert len(processes) >= 4
        trainer.kill()
    until = time.monotonic() + 20
    while (left := [process for process in processes if is_running(process)]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


def is_running(process: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
