"""Compare the engine on two real servers with Hugging Face's model in fp32.

Log-probabilities, updates of all kinds, partial rollouts.
"""

from __future__ import annotations

import math

import pytest
from servers import sample

from megatron_srpo.rollout.engine import EngineFailed, Request
from megatron_srpo.rollout.servers.http import ServerFailed
from megatron_srpo.rollout.sglang.server import SGLangServer

pytestmark = pytest.mark.needs_sglang


def test_the_first_update_must_leave_the_start_model_as_it_was(servers):
    # Version "0" is the model that the servers loaded at their start: their checksums show if the transfer is
    # exact.
    servers.publish(seed=None)
    servers.forget_updates()
    with pytest.raises(EngineFailed, match="changed the start model's weights on http.*checksums"):
        servers.publish(seed=5)
    servers.publish(seed=None)
    servers.forget_updates()
    assert servers.publish(seed=None) == "0"
    assert all(target.quarantined is None for target in servers.engine.generation.targets)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_hugging_faces(servers, temperature):
    servers.publish(seed=None)
    requests = servers.requests(24)
    completions = sample(servers.engine, requests, servers.sampling(temperature))
    assert servers.gap(requests, completions, temperature) < 1e-4
    assert {completion.finish_reason for completion in completions} <= {"stop", "length"}
    assert all(
        (completion.finish_reason == "stop") == (completion.ids[-1] in servers.folder.stop_ids)
        for completion in completions
    )
    assert len({tuple(completion.ids) for completion in completions}) > 12


@pytest.mark.parametrize("top_p", [0.7, 0.95])
def test_logprobs_under_top_p_are_of_the_distribution_sampled_from(servers, monkeypatch, top_p):
    # A request with top_p 1 among them has those of the complete softmax.
    monkeypatch.setattr(servers.engine.generation.api, "renormalises", True)
    servers.publish(seed=None)
    requests, sampling = servers.requests(24), servers.sampling()._replace(top_p=top_p)
    completions = sample(servers.engine, requests, sampling)
    assert servers.gap(requests, completions, top_p=top_p) < 1e-4
    assert servers.gap(requests, completions) > 0.5 * -math.log(top_p)
    assert len({tuple(completion.ids) for completion in completions}) > 12
    completions = sample(servers.engine, requests, servers.sampling())
    assert servers.gap(requests, completions) < 1e-4


@pytest.mark.parametrize("way", ["disk", "tensor", "distributed"])
def test_every_kind_of_update_brings_every_server_to_the_weights(servers, updating, way):
    # Twice each, in one bucket and in many; then every server alone samples with these weights, and reports
    # their version.
    for seed, bucket in ((1, 512), (2, 1)):
        updating(way, f"rollout.sglang.bucket_mib={bucket}")
        transport = servers.engine.publisher.transport
        if bucket == 1 and way != "disk":
            transport.limit = 100_000  # bytes: the embedding is larger, the norms are not
        version = servers.publish(seed)
        for target in servers.engine.generation.targets:
            others = [other for other in servers.engine.generation.targets if other is not target]
            for other in others:
                other.quarantined = "left out by the test"
            requests = servers.requests(6)
            completions = sample(servers.engine, requests, servers.sampling())
            assert servers.gap(requests, completions) < 1e-4
            assert all(
                completion.versions == [(version, 0, len(completion.ids))] for completion in completions
            )
            for other in others:
                other.quarantined = None


def test_stopping_aborts_the_rest_which_can_be_continued(servers):
    # Six of 40 long responses are waited for; the others are returned as they are, queued ones empty, and are
    # finished later.
    servers.publish(seed=3)
    requests, sampling = servers.requests(40), servers.sampling(max_tokens=60, stops=False)
    few = sampling._replace(max_tokens=45)
    for handle in servers.engine.publisher.fleet.handles:
        handle.server.post("/slow_down", {"forward_sleep_time": 0.04})
    servers.engine.generation.concurrency = 24
    try:
        begun = sample(servers.engine, requests[:8], few)
        longer = [
            *[request._replace(start=start) for request, start in zip(requests, begun, strict=False)],
            *requests[8:],
        ]
        # the eight have 45 tokens already, so they are the first to have all 60
        broken = sample(servers.engine, longer, sampling, enough=lambda done: done == 6)
    finally:
        for handle in servers.engine.publisher.fleet.handles:
            handle.server.post("/slow_down", {"forward_sleep_time": None})
        servers.engine.generation.concurrency = 64
    assert sum(completion.finish_reason == "length" for completion in broken) < 20
    partial = [completion for completion in broken if completion.finish_reason == "abort"]
    assert any(0 < len(completion.ids) < 60 for completion in partial) and any(
        not completion.ids for completion in partial
    )
    assert all(completion.ids[:45] == start.ids for completion, start in zip(broken, begun, strict=False))
    old = str(servers.version)
    new = servers.publish(
        seed=3
    )  # the same weights under another name: each version's tokens can be identified and checked
    rest = [request._replace(start=completion) for request, completion in zip(requests, broken, strict=True)]
    finished = sample(servers.engine, rest, sampling)
    assert all(len(completion.ids) == 60 and completion.finish_reason == "length" for completion in finished)
    assert servers.gap(requests, finished) < 1e-4
    for start, completion in zip(broken, finished, strict=True):
        assert completion.ids[: len(start.ids)] == start.ids
        spans = [(old, 0, len(start.ids)), (new, len(start.ids), 60)]
        assert completion.versions == [span for span in spans if span[1] < span[2]]


def test_a_thousand_requests_have_one_answer_each(servers):
    # At concurrency 64 on two servers none is lost or answered twice, and each answer belongs to its request.
    servers.publish(seed=3)
    tails = [
        (20 + number % 200, 20 + number // 200) for number in range(1000)
    ]  # so that no two prompts are alike
    prompts = zip(servers.requests(1000), tails, strict=True)
    requests = [
        Request((*request.prompt_ids, *tail), str(number)) for number, (request, tail) in enumerate(prompts)
    ]
    completions = sample(servers.engine, requests, servers.sampling(max_tokens=8, stops=False))
    assert len(completions) == 1000 and all(len(completion.ids) == 8 for completion in completions)
    assert servers.gap(requests[::40], completions[::40]) < 1e-4


def test_ids_outside_the_vocabulary_are_not_sent(servers):
    # One of them would end the server.
    servers.publish(seed=None)
    size = servers.folder.architecture.vocab_size
    for wrong in ((5, size), (-1,), ()):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            sample(servers.engine, [*servers.requests(1), Request(wrong, "x")], servers.sampling())
    assert len(sample(servers.engine, servers.requests(2), servers.sampling())) == 2


def test_without_the_key_servers_answer_nothing(servers):
    settings = servers.engine.publisher.settings.sglang.model_copy(update={"api_key_env": None})
    stranger = SGLangServer(servers.engine.generation.targets[0].url, settings)
    for path, body in (
        ("/generate", {"input_ids": [5]}),
        ("/update_weights_from_disk", {"model_path": "x"}),
        ("/pause_generation", {}),
    ):
        with pytest.raises(ServerFailed, match=f"{path}: 401"):
            stranger.post(path, body)


def test_a_request_that_no_server_takes_is_reported(servers):
    servers.publish(seed=None)
    with pytest.raises(EngineFailed, match="refuses a request of .* tokens: .*maximum context length"):
        sample(servers.engine, servers.requests(1), servers.sampling(max_tokens=5000))


def test_memory_is_released_and_resumed(servers, updating):
    # On a CPU the calls do nothing, but must be accepted; after them the servers sample with the newest
    # weights.
    publisher = servers.engine.publisher
    publisher.release_memory()
    assert len(publisher.released) == 2 and not publisher.fleet.starts_allowed
    updating("tensor")
    servers.publish(seed=4)
    assert not publisher.released and publisher.fleet.starts_allowed
    requests = servers.requests(4)
    assert servers.gap(requests, sample(servers.engine, requests, servers.sampling())) < 1e-4
