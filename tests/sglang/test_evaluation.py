"""Test the eval command on servers that it did not start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from samples import sample_rows
from servers import KEY, QUICKSTART, ROOT, START, sample
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.needs_sglang


@torch.no_grad()
def greedy(model, prompt_ids, stop_ids, limit):
    """Return the answers of transformers' own generate."""
    prompt = torch.tensor([prompt_ids])
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(stop_ids),
        pad_token_id=0,
    )
    return answer[0, len(prompt_ids) :].tolist()


def test_a_models_table_from_servers_that_held_another_one(servers, tmp_path):
    # The servers get the weights of hf_path, keep them, and can be used afterwards.
    servers.publish(seed=12)
    urls = [target.url for target in servers.engine.generation.targets]
    settings = [
        "evaluation.prompts=12",
        "evaluation.samples=2",
        "rollout.max_response_tokens=48",
        f"rollout.sglang.api_key_env={KEY}",
    ]
    where = ["rollout.servers=0", f"rollout.urls=[{','.join(urls)}]", f"logging.dir={tmp_path}"]
    command = [
        sys.executable,
        "-m",
        "megatron_srpo",
        "eval",
        QUICKSTART,
        f"hf_path={START}",
        *where,
        *settings,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    try:
        task = json.loads((tmp_path / "result.json").read_text())["tasks"]["addition"]
        rows = sample_rows(tmp_path / "samples/addition.greedy.jsonl")
        model = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32).eval()
        assert (
            len(rows) == task["question_count"] == 12
            and (tmp_path / "result.md").read_text().strip() in done.stdout
        )
        for row in rows:
            assert row["response_ids"] == greedy(model, row["prompt"]["ids"], servers.folder.stop_ids, 48)
        assert task["greedy"] == sum(row["verdict"]["correct"] for row in rows) / 12
        sampled = [json.loads(line) for line in (tmp_path / "samples/addition.jsonl").open()]
        assert len(sampled) == 24 and task["avg@2"] == sum(row["verdict"]["correct"] for row in sampled) / 24
        assert [handle.server.version() for handle in servers.engine.publisher.fleet.handles] == ["0", "0"]
    finally:
        servers.engine.publisher.forget()  # the servers have had other weights since
    servers.publish(seed=None)
    requests = servers.requests(4)
    assert servers.gap(requests, sample(servers.engine, requests, servers.sampling())) < 1e-4
