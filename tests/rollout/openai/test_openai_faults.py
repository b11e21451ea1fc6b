"""Test the engine for OpenAI-compatible servers against an HTTP stub: replies, faults, reloads."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from threading import Event

import pytest
from safetensors.torch import load_file
from servers import ALONE, QUICKSTART, START, listening, sample

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.preflight import preflight
from megatron_srpo.rollout.engine import Completion, EngineFailed, Request, Sampling
from megatron_srpo.rollout.engines import create_engine

SAMPLING = Sampling(1.0, 1.0, 4, (2,))
REQUEST = Request((5, 6), "seed")
REPLY = {
    "model": "m",
    "choices": [
        {
            "token_ids": [7, 8, 2],
            "finish_reason": "stop",
            "logprobs": {"token_logprobs": [-0.5, -0.25, 0.0]},
        }
    ],
}
RELOAD = (
    "rollout.openai.reload_path=/load",
    "rollout.openai.reload_body={folder: '{path}', v: ['{version}']}",
)


@contextmanager
def server(complete=lambda body: (200, REPLY), models=("m",), load=lambda body: (200, {})):
    """Run a server; yield (url, its requests: [(path, body)])."""
    asked = []

    def answer(request, body):
        body = json.loads(body or "null")
        asked.append((request.path, body))
        if request.path == "/v1/completions":
            status, content = complete(body)
        elif request.path == "/load":
            status, content = load(body)
        else:
            status, content = 200, {"data": [{"id": name} for name in models]}
        return status, content if isinstance(content, bytes) else json.dumps(content).encode()

    with listening(answer) as stand_in:
        yield stand_in.url, asked


def config_for(tmp_path, *urls, overrides=()):
    given = [
        f"model.hf_path={START}",
        "rollout.engine=openai",
        "rollout.servers=0",
        f"logging.dir={tmp_path / 'run'}",
    ]
    given += [
        f"rollout.urls=[{','.join(urls)}]",
        "rollout.openai.retries=1",
        "rollout.openai.return_timeout=0",
    ]
    return load_config(QUICKSTART, [*given, *overrides])


@contextmanager
def engine_for(tmp_path, *urls, overrides=()):
    """Return the engine of these servers, with version "0" of the start model."""
    engine = create_engine(config_for(tmp_path, *urls, overrides=overrides), HFFolder(START), ALONE, print)
    try:
        engine.update_weights(load_file(START / "model.safetensors").items(), "0")
        yield engine
    finally:
        engine.close()


def test_request_and_reply(tmp_path):
    with server() as (url, asked), engine_for(tmp_path, url) as engine:
        assert sample(engine, [REQUEST], SAMPLING) == [
            Completion([7, 8, 2], [-0.5, -0.25, 0.0], [("0", 0, 3)], "stop")
        ]
    (body,) = [body for path, body in asked if path == "/v1/completions"]
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("m", [5, 6], 4)
    assert body["return_token_ids"] and body["logprobs"] == 1 and body["stop_token_ids"] == [2]
    assert not any(path == "/load" for path, _ in asked)


def changed(**values):
    reply = copy.deepcopy(REPLY)
    reply["choices"][0] |= values
    return reply


def logprobs(*values):
    return {"logprobs": {"token_logprobs": list(values)}}


FAULTS = {
    "500": ((500, b"oops"), "/v1/completions: 500: oops"),
    "no JSON": ((200, b'{"model": "m'), "/v1/completions: "),
    "no choices": ((200, {"model": "m", "choices": []}), "not of the shape of a reply"),
    "other model": ((200, {**REPLY, "model": "n"}), "made by model 'n', expected 'm'"),
    "no ids": ((200, changed(token_ids=None)), "does not support return_token_ids"),
    "no log-probabilities": ((200, changed(logprobs=None)), "token_logprobs is missing"),
    "a null": ((200, changed(**logprobs(None, -0.25, 0.0))), "a value that is no number"),
    "NaN": ((200, changed(**logprobs(float("nan"), -0.25, 0.0))), "not a finite number below 0"),
    "too few": ((200, changed(**logprobs(-0.5, -0.25))), "3 output ids, but 2 log-probabilities"),
    "outside": ((200, changed(token_ids=[7, 384, 2])), "an output id is outside the vocabulary of 384"),
    "negative": ((200, changed(token_ids=[7, -1, 2])), "an output id is outside the vocabulary of 384"),
    "finish reason": ((200, changed(finish_reason="tired")), "finish_reason 'tired'"),
    "too short": (
        (200, changed(finish_reason="length")),
        "3 tokens and finish_reason length; 4 were requested",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_server_is_quarantined_and_another_one_does_its_work(tmp_path, fault):
    answer, reason = FAULTS[fault]
    with (
        server(lambda body: answer) as (bad, _),
        server() as (good, asked),
        engine_for(tmp_path, bad, good) as engine,
    ):
        (completion,) = sample(engine, [REQUEST], SAMPLING)
        assert completion.ids == [7, 8, 2]
        states = {target.url: target.quarantined for target in engine.generation.targets}
        assert states[good] is None and reason in states[bad]


def test_without_a_usable_server_the_engine_fails_with_each_reason(tmp_path):
    with server(lambda body: (500, b"oops")) as (bad, _), engine_for(tmp_path, bad) as engine:
        reason = f"no server is left: .*{bad}: /v1/completions: 500: oops"
        with pytest.raises(EngineFailed, match=reason):
            sample(engine, [REQUEST], SAMPLING)


def test_a_request_without_an_answer_is_retried_and_then_fails(tmp_path):
    released, patience = Event(), ["rollout.openai.request_timeout=0.2"]

    def hang(body):
        released.wait(20)
        return 200, REPLY

    with server(hang) as (url, asked), engine_for(tmp_path, url, overrides=patience) as engine:
        with pytest.raises(
            EngineFailed, match=r"failed 2 times \(rollout.openai.retries\).* no answer in 0.2 s"
        ):
            sample(engine, [REQUEST], SAMPLING)
        released.set()
    assert [path for path, _ in asked].count("/v1/completions") == 2


def test_a_refused_request_fails_at_once(tmp_path):
    with server(lambda body: (400, b"too long")) as (url, _), engine_for(tmp_path, url) as engine:
        reason = f"{url} refuses a request of 2 tokens: too long"
        with pytest.raises(EngineFailed, match=reason):
            sample(engine, [REQUEST], SAMPLING)


def test_stopping_closes_running_requests(tmp_path):
    # There is no abort call: the rest is returned without new tokens.
    released = Event()

    def answer(body):
        if body["prompt"] != [5, 6]:
            released.wait(20)
        return 200, REPLY

    start = Completion([9], [-1.0], [("0", 0, 1)], "abort")
    requests = [REQUEST, Request((5, 7), "b"), Request((5, 8), "c", start)]
    with server(answer) as (url, _), engine_for(tmp_path, url) as engine:
        completions = sample(engine, requests, SAMPLING, enough=lambda done: done == 1)
        released.set()
    assert [completion.finish_reason for completion in completions] == ["stop", "abort", "abort"]
    assert completions[1].ids == [] and completions[2] == start


def test_weights_are_written_and_loaded_by_every_server(tmp_path):
    # The reload call names folder and version; a server that fails gets no requests until the next one.
    fails = Event()
    load = lambda body: (500, b"no") if fails.is_set() else (200, {})  # noqa: E731
    weights = load_file(START / "model.safetensors")
    with (
        server() as (one, asked),
        server(load=load) as (other, _),
        engine_for(tmp_path, one, other, overrides=RELOAD) as engine,
    ):
        folder = tmp_path / "run/servers/weights/version_0"
        assert ("/load", {"folder": str(folder), "v": ["0"]}) in asked
        assert load_file(folder / "model.safetensors").keys() == weights.keys()
        fails.set()
        engine.update_weights(weights.items(), "1")
        states = {target.url: target.quarantined for target in engine.generation.targets}
        assert states[one] is None and "/load: 500" in states[other]
        assert [completion.versions for completion in sample(engine, [REQUEST] * 4, SAMPLING)] == [
            [("1", 0, 3)]
        ] * 4
        fails.clear()
        engine.update_weights(weights.items(), "2")
        assert all(target.quarantined is None for target in engine.generation.targets)
        assert sorted(path.name for path in folder.parent.iterdir()) == ["version_1", "version_2"]


def test_weights_that_no_server_loads_end_the_run(tmp_path):
    with server(load=lambda body: (500, b"no")) as (url, _):
        reason = "no server has loaded weight version 0: .*/load: 500: no"
        with pytest.raises(EngineFailed, match=reason), engine_for(tmp_path, url, overrides=RELOAD):
            pass


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([], "rollout.openai.reload_path: train needs it"),
        ([*RELOAD, "rollout.openai.api_key_env=NOBODY_SETS_THIS"], "NOBODY_SETS_THIS is not set"),
    ],
)
def test_training_without_a_reload_call_is_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        preflight(config_for(tmp_path, "http://127.0.0.1:9", overrides=overrides))


def test_servers_of_other_models_are_refused(tmp_path):
    with server(models=("m", "n")) as (two, _), server(models=("n",)) as (other, _), server() as (one, _):
        for urls, message in (
            ([two], "rollout.openai.model: None, but .* lists m, n"),
            ([one, other], "the servers serve different models: m, n"),
            (["http://127.0.0.1:9"], "rollout.urls: http://127.0.0.1:9/v1/models: ConnectError"),
        ):
            with pytest.raises(ConfigError, match=message), engine_for(tmp_path, *urls):
                pass
