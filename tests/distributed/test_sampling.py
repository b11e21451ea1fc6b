"""Test runs that sample, on several layouts.

Every rank samples its share with weights exported from the ranks' shards; the layout changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import run_jobs
from samples import sample_rows

ROOT = Path(__file__).parents[2]
SMALL = [
    "train.steps=3",
    "rollout.prompts_per_step=6",
    "evaluation.every=3",
    "evaluation.prompts=5",
    "evaluation.samples=2",
]
LAYOUTS = {
    1: {"one": [], "evaluation of one": []},
    2: {
        "tp2": ["parallel.tensor_model_parallel_size=2"],
        "dp2": [],
        "choosy": [
            "rollout.dynamic_filtering=true",
            "rollout.over_sampling=1.5",
            "rollout.batch_size=8",
            "train.steps=2",
        ],
        "evaluation": [],
        "ahead": ["rollout.async_steps=1", "evaluation.every=2"],
    },
    3: {
        "pp3": ["parallel.pipeline_model_parallel_size=3"],
        "dp3": ["parallel.use_distributed_optimizer=false"],
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train the quick start's first steps, scaled down, on several layouts."""
    root = tmp_path_factory.mktemp("sampling")
    overrides = [*SMALL, f"model.hf_path={ROOT / 'examples/quickstart/start'}", "optimizer.lr_warmup_steps=0"]
    done = {}
    for ranks, layouts in LAYOUTS.items():
        jobs = {name: [*overrides, *layout] for name, layout in layouts.items()}
        done |= run_jobs(
            ranks,
            ROOT / "examples/quickstart/config.yaml",
            jobs,
            root,
            evaluated=("evaluation", "evaluation of one"),
        )
    return done


def lines(run, step):
    """Return the dumped samples of one step."""
    return sample_rows(run.folder / "rollouts" / f"step_{step:06d}.jsonl")


@pytest.mark.parametrize("layout", ["tp2", "dp2", "pp3", "dp3"])
def test_prompts_samples_and_routes_are_those_of_one_process(runs, layout):
    # All prompts in order. Random numbers belong to the sample, so the tokens are the same: all of them in
    # the first step, where the weights are the same bits; nearly all after two updates, whose last bits
    # depend on the order of sums.
    for step, share in ((1, 1.0), (3, 0.9)):
        one, other = lines(runs["one"], step), lines(runs[layout], step)
        assert [(s["prompt"]["id"], s["index"]) for s in one] == [
            (s["prompt"]["id"], s["index"]) for s in other
        ]
        same = [a["response_ids"] == b["response_ids"] for a, b in zip(one, other, strict=True)]
        assert sum(same) >= share * len(same)


@pytest.mark.parametrize("layout", ["one", "tp2", "dp2", "pp3", "dp3"])
def test_the_engine_samples_with_the_published_weights(runs, layout):
    # The trainer's log-probabilities equal the engine's to 1e-4 at every step, with updates in between;
    # versions are counted.
    rows = runs[layout].rows
    assert [row["weight_version"] for row in rows] == ["0", "1", "2"]
    assert max(row["engine_logprob_gap_max"] for row in rows) < 1e-4
    assert all(row["grad_norm"] > 0 for row in rows)


def test_ranks_fill_a_batch_together(runs):
    # Every group trained on has a signal, the batch is full, and all ranks count the same left-over groups.
    for row in runs["choosy"].rows:
        assert row["zero_advantage_share"] == 0 and row["groups_filtered"] + row["groups_carried"] > 0
        samples = lines(runs["choosy"], row["step"])
        assert len(samples) == 6 * 8 and len({sample["prompt"]["id"] for sample in samples}) == 6
    trained = [sample["prompt"]["id"] for step in (1, 2) for sample in lines(runs["choosy"], step)]
    assert len(set(trained)) == 12  # no prompt twice


def test_one_step_off(runs):
    # From the second step on a batch is one version older than the policy; evaluations still use the newest
    # weights.
    rows = runs["ahead"].rows
    assert [row["weight_version"] for row in rows] == ["0", "0", "1"] and [
        row["staleness_max"] for row in rows
    ] == [0, 1, 1]
    assert (
        rows[0]["engine_logprob_gap_max"] < 1e-4 < rows[1]["engine_logprob_gap_max"]
    )  # the policy has moved since
    assert [sample["versions"][0][0] for sample in lines(runs["ahead"], 3)] == ["1"] * 48


def test_the_eval_command_gives_the_same_on_two_processes(runs):
    # The samples are the same, in the same order, though each process samples every second question.
    one, two = (
        sample_rows(runs[name].folder / "samples/addition.jsonl")
        for name in ("evaluation of one", "evaluation")
    )
    assert len(one) == 10
    assert [(s["prompt"]["id"], s["index"], s["response_ids"]) for s in one] == [
        (s["prompt"]["id"], s["index"], s["response_ids"]) for s in two
    ]
    results = [
        json.loads((runs[name].folder / "result.json").read_text())
        for name in ("evaluation of one", "evaluation")
    ]
    assert results[0]["tasks"]["addition"]["questions"] == results[1]["tasks"]["addition"]["questions"]
