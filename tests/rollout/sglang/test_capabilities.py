"""Test the capabilities that servers must have, and settings that contradict.

The answers are those of a real server (SGLang 0.5.23), some of them changed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tables import each_row

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engines import check_engine
from megatron_srpo.rollout.sglang.capabilities import Capabilities, check

ROOT = Path(__file__).parents[3]
MODEL = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "weight_version": "default",
    "is_generation": True,
}
SERVER = {
    **{
        "version": "0.5.23",
        "context_length": None,
        "max_total_num_tokens": 16384,
        "tp_size": 2,
        "dp_size": 1,
    },
    **{"enable_deterministic_inference": False, "enable_memory_saver": False},
}
FOLDER = HFFolder(ROOT / "examples/quickstart/start")


def config(*overrides):
    """Return the quick start's configuration on servers, with changes."""
    return load_config(ROOT / "examples/quickstart/sglang.yaml", list(overrides))


def look(server=(), model=(), overrides=()):
    return check(
        "http://a:1", {**SERVER, **dict(server)}, {**MODEL, **dict(model)}, config(*overrides).rollout, FOLDER
    )


def test_what_a_server_can_do():
    assert look() == Capabilities("0.5.23", needs_session=True, is_seeded=False, tensor_parallel_size=2)
    assert look({"enable_deterministic_inference": True}).is_seeded
    assert not any(look({"version": version}).needs_session for version in ("0.5.19", "0.5.20.post1"))
    assert all(look({"version": version}).needs_session for version in ("0.5.21", "0.6.0rc1"))
    assert look({"sampling_mask_max_tokens": 4096}, overrides=["rollout.top_p=0.7"])


@pytest.mark.parametrize(
    "server, model, overrides, message",
    [
        ({"version": "0.5.18"}, {}, (), "http://a:1 is SGLang 0.5.18; 0.5.19 or newer is needed"),
        ({"version": None}, {}, (), "is SGLang None"),
        ({}, {"model_type": "llama"}, (), "model_type is 'llama'; that of model.hf_path is 'qwen3'"),
        ({}, {"architectures": ["LlamaForCausalLM"]}, (), "architectures is"),
        ({"context_length": 100}, {}, (), "up to 128 tokens; http://a:1 takes 100"),
        ({"max_total_num_tokens": 127}, {}, (), "up to 128 tokens; http://a:1 takes 127"),
        ({}, {}, ["rollout.max_response_tokens=500"], "up to 564 tokens; http://a:1 takes 512"),
        (
            {},
            {},
            ["rollout.colocated=true"],
            "rollout.colocated: http://a:1 was started without --enable-memory-saver",
        ),
        (
            {},
            {},
            ["rollout.top_p=0.7"],
            "rollout.top_p: 0.7 biases training: http://a:1 (SGLang 0.5.23) does not return the log-prob",
        ),
        (
            {"sampling_mask_max_tokens": 1024},
            {},
            ["rollout.top_p=0.7"],
            "set 1, or use 0.5.23 with --sampling-mask-max-tokens 2048 or more",
        ),
        (
            {"dp_size": 2},
            {},
            ["rollout.sglang.update=tensor"],
            "--dp-size 2, which takes updates from disk only",
        ),
        (
            {"pp_size": 2},
            {},
            ["rollout.sglang.update=distributed"],
            "--pp-size 2, which takes updates from disk only",
        ),
    ],
)
def test_unusable_servers_are_refused(server, model, overrides, message):
    with pytest.raises(ConfigError) as caught:
        look(server, model, overrides)
    assert message in str(caught.value)


@each_row(
    "overrides, message",
    [
        (
            ["rollout.servers=0"],
            "needs either urls (externally managed servers) or servers (how many to start)",
        ),
        (["rollout.urls=[http://a:1]"], "needs either urls"),
        (["rollout.overlap=1"], "rollout.overlap: was renamed to rollout.async_steps"),
        (["rollout.engine=transformers"], "rollout.servers: needs rollout.engine: sglang, not transformers"),
        (["rollout.servers=0", "rollout.urls=[a:1]"], "rollout.urls: 'a:1': expected http://host:port"),
        (
            ["rollout.servers=0", "rollout.urls=[http://a:1, http://a:1/]"],
            "rollout.urls: a server is listed twice",
        ),
        (
            ["rollout.servers=0", "rollout.urls=[http://a:1]", "rollout.sglang.update=tensor"],
            "rollout.sglang.update: tensor shares memory",
        ),
        (
            ["rollout.sglang.host=0.0.0.0"],
            "0.0.0.0 can be reached from other machines; set rollout.sglang.api_key_env",
        ),
        (["rollout.sglang.port=65535"], "2 servers from 65535 on pass 65535"),
        (
            ["rollout.colocated=true", "rollout.async_steps=1"],
            "rollout.async_steps: 1 samples while training",
        ),
        (
            ["rollout.colocated=true", "rollout.sglang.update=distributed"],
            "rollout.sglang.update: distributed broadcasts between GPUs",
        ),
        (["rollout.sglang.updat=disk"], "rollout.sglang.updat: unknown key; did you mean update?"),
    ],
)
def test_settings_that_contradict_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["rollout.sglang.api_key_env=NOBODY_SETS_THIS"],
            "api_key_env: the environment variable NOBODY_SETS_THIS is not set",
        ),
        (
            ["rollout.sglang.python=/nowhere/python"],
            "rollout.sglang.python: /nowhere/python is not an interpreter",
        ),
    ],
)
def test_what_this_machine_lacks_is_reported_before_anything_starts(overrides, message):
    with pytest.raises(ConfigError) as caught:
        check_engine(config(*overrides), trains=True)
    assert message in str(caught.value)
