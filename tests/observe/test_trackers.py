"""TensorBoard, Weights & Biases and the profiler in one small run: the same names and numbers as metrics.jsonl."""

from __future__ import annotations

import gzip
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from small_run import small_config, small_run

from megatron_srpo.config import ConfigError
from megatron_srpo.observe import trackers
from megatron_srpo.observe.trackers import check_trackers


@pytest.fixture
def wandb(monkeypatch):
    """Stands for the package: `inits` and `logged` are what it was told."""
    module = ModuleType("wandb")
    module.inits, module.logged = [], []

    def init(**options):
        module.inits.append(options)
        return SimpleNamespace(log=lambda row, step: module.logged.append((step, row)), finish=lambda: module.logged.append("finished"))

    module.init, module.Settings = init, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "check_trackers", lambda config: None)
    monkeypatch.setattr("megatron_srpo.preflight.check_trackers", lambda config: None)
    return module


def numbers(row):
    """What a tracker can draw of a row."""
    return {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}


def test_the_same_numbers_everywhere(wandb, tmp_path):
    run = tmp_path / "run"
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard (the test extra)")
    overrides = ["logging.tensorboard=true", "logging.wandb_project=p", "logging.wandb_mode=offline", "logging.profile_steps=[2,2]"]
    smaller = ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_response_tokens=8"]
    rows = small_run(run, *smaller, "train.steps=3", "evaluation.every=2", "evaluation.prompts=4", *overrides)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 3]  # evaluations beside steps
    assert wandb.logged == [*((row["step"], numbers(row)) for row in rows), "finished"]
    (init,) = wandb.inits
    assert (init["project"], init["name"], init["mode"], init["id"]) == ("p", "run", "offline", (run / "wandb_id").read_text())
    events = tensorboard.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    expected = {(row["step"], name): value for row in rows for name, value in numbers(row).items()}
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(value, rel=1e-6) for key, value in expected.items())
    trace = json.loads(gzip.decompress((run / "profile" / "rank_00000.trace.json.gz").read_bytes()))
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])
    assert "Self CPU" in (run / "profile" / "rank_00000.table.txt").read_text()


def test_what_is_not_installed_is_said_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    check_trackers(small_config(tmp_path))
    for override, package in (("logging.tensorboard=true", "tensorboard"), ("logging.wandb_project=p", "wandb")):
        with pytest.raises(ConfigError, match=f"needs the package {package}"):
            check_trackers(small_config(tmp_path, override))
    with pytest.raises(ConfigError, match="profile_steps"):
        small_config(tmp_path, "logging.profile_steps=[3,2]")
