"""Test the engine for OpenAI-compatible servers on a real SGLang server's /v1/completions."""

from __future__ import annotations

import pytest
import torch
from servers import ALONE, KEY, config_of, sample

from megatron_srpo.rollout.engines import create_engine

pytestmark = pytest.mark.needs_sglang


@pytest.fixture
def engine(servers, tmp_path):
    """Yield the engine on the first server, which SGLang's own call updates."""
    servers.publish(seed=12)
    url = servers.engine.generation.targets[0].url
    given = [
        "rollout.engine=openai",
        "rollout.servers=0",
        f"rollout.urls=[{url}]",
        f"rollout.openai.api_key_env={KEY}",
        "rollout.openai.reload_path=/update_weights_from_disk",
        "rollout.openai.reload_body={model_path: '{path}', weight_version: '{version}', flush_cache: true}",
    ]
    engine = create_engine(config_of(tmp_path, *given), servers.folder, ALONE, servers.said.append)
    yield engine
    engine.close()


def test_tokens_and_logprobs_are_hugging_faces(servers, engine):
    # After a reload: log-probabilities at two temperatures, and greedy tokens, equal the fp32 model's.
    engine.update_weights(dict(servers.model.named_parameters()).items(), "0")
    requests = servers.requests(12)
    for temperature in (1.0, 0.6):
        completions = sample(engine, requests, servers.sampling(temperature))
        assert servers.gap(requests, completions, temperature) < 1e-4
        for completion in completions:
            assert completion.versions == [("0", 0, len(completion.ids))]
            assert (completion.finish_reason == "stop") == (completion.ids[-1] in servers.folder.stop_ids)
    for request, completion in zip(requests, sample(engine, requests, servers.sampling(0.0)), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *completion.ids]])
        with torch.no_grad():
            best = servers.model(ids).logits[0, len(request.prompt_ids) - 1 : -1].argmax(-1)
        assert best.tolist() == completion.ids
