"""Start the quick start's SGLang servers for benchmarks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _report import QUICKSTART, ROOT

from megatron_srpo.config.load import load_config
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engines import create_engine
from megatron_srpo.rollout.sglang.engine import SGLangEngine
from megatron_srpo.rollout.sglang.settings import SGLangSettings

START = QUICKSTART / "start"
# Leaves memory for a large model's weights on a CPU.
LARGE_MODEL = ("--mem-fraction-static=0.8", "--max-total-tokens=2048")


def add_server_options(parser: argparse.ArgumentParser, servers: int) -> None:
    """Add --servers, --python and --port."""
    parser.add_argument("--servers", type=int, default=servers)
    parser.add_argument(
        "--python", default=str(ROOT / ".venv-sglang/bin/python"), help="interpreter of SGLang's environment"
    )
    parser.add_argument("--port", type=int, default=30100)


def start_servers(options: argparse.Namespace, model: HFFolder, run: Path, *overrides: str) -> SGLangEngine:
    """Start the quick start's servers with a model; the caller closes the engine.

    Args:
        options: Parsed with `add_server_options`.
        model: Folder of the weights that the servers start with.
        run: Folder for the servers' logs.
        overrides: More of the configuration, as section.key=value.
    """
    file = QUICKSTART / "sglang.yaml"
    settings = [
        f"model.hf_path={model.path}",
        f"logging.dir={run}",
        f"rollout.servers={options.servers}",
        f"rollout.sglang.python={options.python}",
        f"rollout.sglang.port={options.port}",
        *overrides,
    ]
    config = load_config(file, settings)
    if model.path != START:
        arguments = [*config.rollout.section(SGLangSettings).arguments, *LARGE_MODEL]
        config = load_config(file, [*settings, f"rollout.sglang.arguments={json.dumps(arguments)}"])
    engine = create_engine(config, model, Layout(), lambda text: None)
    assert isinstance(engine, SGLangEngine)
    return engine
