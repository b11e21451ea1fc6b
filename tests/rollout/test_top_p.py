"""Test training with top_p below 1: exact importance weights, or a warning with the size of the bias."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from servers import ALONE, QUICKSTART, START
from small_run import small_run

from megatron_srpo.config.load import load_config
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.observe.alarms import Limits
from megatron_srpo.observe.stopwatch import Stopwatch
from megatron_srpo.rollout import source


def test_a_run_with_the_embedded_engine_weighs_tokens_by_the_nucleus(tmp_path):
    # top_p < 1 trained with an unreported bias: importance_mean said 1.0000.
    (row,) = small_run(tmp_path / "run", "rollout.top_p=0.7", "train.steps=1")
    assert 0.7 <= row["importance_mean"] < 0.99
    # a token's weight is exp(-gap), as trainer and engine agree but for the nucleus
    assert row["importance_mean"] >= math.exp(-row["engine_logprob_gap"]) - 1e-6
    assert row["engine_logprob_gap_max"] <= math.log(1 / 0.7) + 1e-4
    assert row["alarms"] == []


@pytest.mark.parametrize(
    ("engine", "top_p", "expected"),
    [
        ("openai", 0.7, "top_p: 0.7 biases training.* openai .* up to 1.43 times too large (0.357 nats)"),
        ("openai", 0.9, "top_p: 0.9 biases training.* unless its servers .* up to 1.11 times"),
        ("sglang", 0.7, None),
        ("sglang", 1.0, None),
        ("transformers", 0.7, None),
    ],
)
def test_a_run_whose_engine_does_not_renormalise_warns_once(engine, top_p, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(source, "create_engine", lambda *_: SimpleNamespace(close=lambda: None))
    given = [f"model.hf_path={START}", f"rollout.engine={engine}", f"rollout.top_p={top_p}"]
    given += ["rollout.servers=0", f"logging.dir={tmp_path / 'run'}"]
    if engine != "transformers":
        given.append("rollout.urls=[http://127.0.0.1:9]")
    config, said = load_config(QUICKSTART, given), []
    rollouts = source.open_rollouts(config, HFFolder(START), ALONE, said.append, Stopwatch(lambda name: None))
    rollouts.close()
    warnings = [line for line in said if "rollout.top_p" in line]
    assert len(warnings) == (expected is not None)
    if expected is not None:
        position = 0
        for part in expected.split(".*"):
            position = warnings[0].index(part.strip(), position)


def test_the_alarm_of_the_gap_allows_for_the_nucleus():
    def limit(*overrides):
        given = [f"model.hf_path={START}", "rollout.engine=transformers", "rollout.servers=0", *overrides]
        return Limits.of(load_config(QUICKSTART, given)).logprob_gap

    assert limit() == 0.05
    assert limit("rollout.top_p=0.7") == pytest.approx(0.05 + math.log(1 / 0.7))
    assert limit("rollout.engine=sglang", "rollout.servers=1") == 0.05
