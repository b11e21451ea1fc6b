"""Compare the planner's memory with a GPU's allocator, in bf16.

With local layers and with Transformer Engine's.

python -m pytest tests/gpu
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_srpo.config.load import load_config
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.plan.machine import MACHINES
from megatron_srpo.plan.memory import Batch, memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parents[2]
RECOMPUTE = [
    "megatron.recompute_granularity=full",
    "megatron.recompute_method=uniform",
    "megatron.recompute_num_layers=1",
]


@pytest.mark.parametrize("recompute", [[], RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_peak_memory_of_a_step(layers, recompute, tmp_path):
    # The 0.6B shape, GRPO and SRPO, micro-batches of 8,192 tokens: within 10 %.
    if layers == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    overrides = [f"model.transformer_impl={layers}", "train.micro_batch_tokens=8192", *recompute]
    lengths = [
        "--prompts",
        "8",
        "--samples",
        "8",
        "--prompt-tokens",
        "128",
        "--response-tokens",
        "896",
        "--repeats",
        "1",
    ]
    command = [
        sys.executable,
        "tools/bench/bench_step.py",
        *overrides,
        "--shape",
        "0.6b",
        "--algorithms",
        "grpo",
        "srpo",
        *lengths,
        "--json",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    (tmp_path / "config.json").write_text(json.dumps(report["shape"]["model"]))
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{hf_path: {tmp_path}}}\ntrain: {{steps: 1}}\nlogging: {{dir: unused}}\n")
    for row in report["rows"]:
        config = load_config(file, [f"algorithm.name={row['name']}", "rollout.replay=elsewhere", *overrides])
        parts = memory(HFFolder(tmp_path).architecture, config, MACHINES["h100"], 1, Batch(*row["batch"]))
        assert sum(parts.values()) - parts["reserve"] == pytest.approx(row["extra_bytes"], rel=0.1), row[
            "name"
        ]
