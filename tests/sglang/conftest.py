"""Start two real servers once for all tests of this folder.

Without `bash tests/run.sh --with-sglang` the tests are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from servers import ALONE, KEY, START, Servers, config_of, free_ports
from transformers import AutoModelForCausalLM

from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engines import create_engine

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Move the tests of this folder to the end; skip those that need a missing SGLang.

    Until the session ends `servers` holds two servers, their memory and a default process group. Everything
    that uses `servers` needs the environment that --with-sglang installs.
    """
    items.sort(key=lambda item: HERE in item.path.parents)  # stable: the others stay in order
    if "SGLANG_PYTHON" not in os.environ:
        for item in items:
            if HERE in item.path.parents and "needs_sglang" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs SGLang: bash tests/run.sh --with-sglang"))


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """Yield the session's `Servers`.

    A test repairs what it breaks, or the next publication does.
    """
    run, said = tmp_path_factory.mktemp("servers"), []
    os.environ[KEY] = "open sesame"
    folder = HFFolder(START)
    model = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32).eval()
    patience = [
        "rollout.sglang.health_timeout=60",
        "rollout.sglang.return_timeout=300",
        "rollout.sglang.retries=8",
    ]
    config = config_of(run, "rollout.servers=2", f"rollout.sglang.port={free_ports(2)}", *patience)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = create_engine(config, folder, ALONE, said.append)
    servers = Servers(engine, folder, model, run, said)
    servers.publish(seed=None)
    yield servers
    engine.close()
    dist.destroy_process_group()


@pytest.fixture
def updating(servers):
    """Return a function of (way): the servers take weights that way until the test ends."""
    publisher = servers.engine.publisher
    before, settings = publisher.transport, publisher.settings

    def use(way: str, *overrides: str) -> None:
        config = config_of(servers.run, "rollout.servers=2", f"rollout.sglang.update={way}", *overrides)
        publisher.settings = config.rollout
        publisher.transport = publisher.transport_for(config.rollout)

    yield use
    publisher.transport, publisher.settings = before, settings
