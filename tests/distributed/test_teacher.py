"""Test the EMA teacher on several layouts: sharded over data-parallel ranks, fp32 at any model dtype."""

from __future__ import annotations

import json

import pytest
from launch import launch
from tiny import save_folder

TP, PP, EP = (f"parallel.{name}_model_parallel_size=2" for name in ("tensor", "pipeline", "expert"))
CP = "parallel.context_parallel_size=2"
BF16, REPLICATED = "model.dtype=bfloat16", "parallel.use_distributed_optimizer=false"
JOBS = {  # an expert-parallel layout has a mixture of experts, the others are dense
    "dp2": [],
    "dp2-replicated": [REPLICATED],
    "dp2-bf16": [BF16],
    "dp2-bf16-replicated": [BF16, REPLICATED],
    "tp2": [TP],
    "pp2": [PP],
    "cp2": [CP],
    "cp2-replicated": [CP, REPLICATED],
    "ep2": [EP],
    "ep2-replicated": [EP, REPLICATED],
    "ep2-bf16": [EP, BF16],
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Return {layout: the worker's report}, from one launch."""
    root = tmp_path_factory.mktemp("teacher")
    config = root / "config.yaml"
    config.write_text("model: {hf_path: set, dtype: float32}\ntrain: {steps: 1}\nlogging: {dir: unused}\n")
    dense, experts = save_folder(root / "dense"), save_folder(root / "experts", family="qwen3_moe")
    jobs = [
        {
            "config": str(config),
            "overrides": [f"model.hf_path={experts if EP in overrides else dense}", *overrides],
            "output": str(root / name),
        }
        for name, overrides in JOBS.items()
    ]
    launch(2, "teacher_worker.py", jobs, root / "jobs.json")
    return {name: json.loads((root / name).read_text()) for name in JOBS}


@pytest.mark.parametrize("layout", list(JOBS))
def test_teacher_follows_by_its_rate_in_fp32_and_keeps_each_number_once(reports, layout):
    # The distance to a constant student shrinks by 0.95 a step (METHOD §7 (g)), to the dtype's precision. All
    # data-parallel ranks together hold each fp32 element once, all experts included.
    report = reports[layout]
    precision = 5e-3 if "bf16" in layout else 1e-5
    assert report["ratios"] == pytest.approx([0.95] * 3, rel=precision)
    assert report["fp32"] and report["elements"] == report["parameters"]
