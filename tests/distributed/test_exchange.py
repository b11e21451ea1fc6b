"""Test that every rank receives the tokens that it trains, bit for bit, and outlines of all samples."""

from __future__ import annotations

import json
from pathlib import Path

from launch import launch

TP, PP, CP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)
LAYOUTS = {
    "dp4": {},
    "tp2": {TP: 2},
    "pp2": {PP: 2},
    "cp2": {CP: 2},
    "tp2-pp2": {TP: 2, PP: 2},
    "tp2-cp2": {TP: 2, CP: 2},
    "pp2-cp2": {PP: 2, CP: 2},
}
# groups, share of the samples that are trained, data-parallel ranks with work
STEPS = {
    "many": (11, 0.8, 4),
    "two ranks without groups": (2, 1.0, 4),
    "one rank trains all": (5, 1.0, 1),
    "nothing to train": (3, 0.0, 1),
    "no groups": (0, 0.0, 1),
}
FOR_EVERY_LAYOUT = ("many", "two ranks without groups")


def test_tokens_arrive_at_the_ranks_that_train_them(tmp_path):
    # exchange_worker.py compares what each rank receives with what was sent.
    jobs = []
    for layout, parallel in LAYOUTS.items():
        for number, (step, (groups, share, workers)) in enumerate(STEPS.items()):
            if parallel and step not in FOR_EVERY_LAYOUT:
                continue
            folder = tmp_path / layout / step
            folder.mkdir(parents=True)
            given = {"groups": groups, "share": share, "workers": workers, "seed": number}
            jobs.append({"parallel": parallel, "folder": str(folder), **given})
    launch(4, "exchange_worker.py", jobs, tmp_path / "jobs.json")
    for job in jobs:
        shares = [json.loads((Path(job["folder"]) / f"rank_{rank}.json").read_text()) for rank in range(4)]
        replicas = {tuple(numbers) for numbers in shares if numbers}
        numbers = [number for numbers in replicas for number in numbers]
        assert len(numbers) == len(set(numbers)) == int(job["share"] * 4 * job["groups"])
