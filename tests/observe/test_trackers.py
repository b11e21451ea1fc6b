"""Compare TensorBoard, Weights & Biases and the profiler with metrics.jsonl in one small run."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from types import ModuleType, SimpleNamespace

import pytest
from small_run import small_config, small_run
from tables import each_row

from megatron_srpo.config.base import ConfigError
from megatron_srpo.observe import trackers
from megatron_srpo.observe.trackers import check_trackers


@pytest.fixture
def wandb(monkeypatch):
    """Replace the package; `inits`, `axes` and `logged` record the calls."""
    module = ModuleType("wandb")
    module.inits, module.axes, module.logged = [], [], []

    def init(**options):
        module.inits.append(options)
        return SimpleNamespace(
            define_metric=lambda name, step_metric: module.axes.append((name, step_metric)),
            log=lambda row: module.logged.append(row),
            finish=lambda: module.logged.append("finished"),
        )

    module.init, module.Settings = init, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "check_trackers", lambda config: None)
    monkeypatch.setattr("megatron_srpo.preflight.check_trackers", lambda config: None)
    return module


def numbers(row):
    """Return the values of a row that a tracker can draw."""
    return {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}


def test_the_same_numbers_everywhere(wandb, tmp_path):
    run = tmp_path / "run"
    tensorboard = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard (the test extra)"
    )
    overrides = [
        "logging.tensorboard=true",
        "logging.wandb_project=p",
        "logging.wandb_mode=offline",
        "logging.profile_steps=[2,2]",
    ]
    smaller = ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_response_tokens=8"]
    rows = small_run(run, *smaller, "train.steps=3", "evaluation.every=2", "evaluation.prompts=4", *overrides)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 3]  # evaluations next to steps
    assert wandb.logged == [*({"step": row["step"], **numbers(row)} for row in rows), "finished"]
    assert wandb.axes == [("*", "step")]
    (init,) = wandb.inits
    assert (init["project"], init["name"], init["mode"], init["id"]) == (
        "p",
        "run",
        "offline",
        (run / "wandb_id").read_text(),
    )
    events = tensorboard.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = {
        (event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)
    }
    expected = {(row["step"], name): value for row in rows for name, value in numbers(row).items()}
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(value, rel=1e-6) for key, value in expected.items())
    trace = json.loads(gzip.decompress((run / "profile" / "rank_00000.trace.json.gz").read_bytes()))
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])
    assert "Self CPU" in (run / "profile" / "rank_00000.table.txt").read_text()


def test_a_failing_tracker_is_reported_once_and_the_others_continue():
    # It fails when it is written to, or when it is closed: before the trained model is exported.
    said, rows = [], []

    def fail(*_):
        raise ConnectionResetError("gone")

    lost = SimpleNamespace(write=fail, close=fail)
    healthy = SimpleNamespace(write=rows.append, close=lambda: rows.append("closed"))
    late = SimpleNamespace(write=rows.append, close=fail)
    group = trackers.Trackers([lost, healthy, late], said.append)
    group.write({"step": 1})
    group.write({"step": 2})
    group.close()
    assert rows == [{"step": 1}, {"step": 1}, {"step": 2}, {"step": 2}, "closed"]
    assert said == ["disabling SimpleNamespace: ConnectionResetError: gone"] * 2


@each_row(
    "mode, failing, started, said",
    [
        ("online", {"online"}, ["online", "offline"], ["falling back to"]),
        ("online", {"online", "offline"}, ["online", "offline"], ["falling back to", "which is disabled"]),
        ("offline", {"offline"}, ["offline"], ["which is disabled"]),
        ("online", set(), ["online"], []),
    ],
)
def test_wandb_that_cannot_start_does_not_end_the_run(wandb, tmp_path, mode, failing, started, said):
    # It ended the run with a traceback: no login, no network, a broken package.
    inner, tried, lines = wandb.init, [], []

    def init(**options):
        tried.append(options["mode"])
        if options["mode"] in failing:
            raise ConnectionError("no API key\nconfigured")
        return inner(**options)

    wandb.init = init
    config = small_config(tmp_path / "run", "logging.wandb_project=p", f"logging.wandb_mode={mode}")
    config.logging.dir.mkdir(exist_ok=True)
    try:
        found = trackers.start_trackers(config, 0, lines.append)
    finally:
        wandb.init = inner
    assert tried == started and len(found) == (0 if "offline" in failing else 1)
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert part in line and line.endswith("ConnectionError: no API key configured")


def test_weights_and_biases_keeps_the_steps_of_a_run_that_goes_back(tmp_path):
    # The package itself, offline: a run of five steps resumes from its checkpoint after the third; every row
    # is kept with its step.
    pytest.importorskip("wandb", reason="needs wandb (the wandb extra)")
    config, logged = small_config(tmp_path, "logging.wandb_project=p", "logging.wandb_mode=offline"), []
    config.logging.dir.mkdir(parents=True, exist_ok=True)
    for steps in (
        [0, 1, 2, 2, 3, 4, 5, 4],
        [4, 5, 5, 6],
    ):  # evaluations next to steps; the first tracker also goes back by itself
        tracker = trackers.WandB(config, "offline")
        for step in steps:
            logged.append((step, 100.0 * len(logged)))
            tracker.write({"step": step, "loss": logged[-1][1], "alarms": ["not a number"]})
        tracker.close()
    files = sorted(
        (config.logging.dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns
    )
    assert len({file.name for file in files}) == 1  # one run, by its id
    found = [entry for file in files for entry in history_of(file)]
    assert [(row["step"], row["loss"]) for row, _ in found] == logged
    assert {(name, axis) for _, axes in found for name, axis in axes} == {("*", "step")}


def history_of(file):
    """Return (row, (metrics, their x axis) defined before) of every row in a file of wandb's.

    The file is a LevelDB log of protobuf messages.
    """
    from wandb.proto import wandb_internal_pb2

    content, place, data, axes = file.read_bytes(), 7, b"", []  # after the magic number
    while place + 7 <= len(content):
        if place % 32768 > 32768 - 7:  # no header fits into the rest of the block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (2, 3):  # the record continues in the next block
            continue
        record, data = wandb_internal_pb2.Record.FromString(data), b""
        if record.WhichOneof("record_type") == "metric":
            axes.append((record.metric.name or record.metric.glob_name, record.metric.step_metric))
        if record.WhichOneof("record_type") == "history":
            yield (
                {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                },
                list(axes),
            )


def test_a_missing_package_is_reported_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    check_trackers(small_config(tmp_path))
    for override, package in (
        ("logging.tensorboard=true", "tensorboard"),
        ("logging.wandb_project=p", "wandb"),
    ):
        with pytest.raises(ConfigError, match=f"needs the package {package}"):
            check_trackers(small_config(tmp_path, override))
    with pytest.raises(ConfigError, match="profile_steps"):
        small_config(tmp_path, "logging.profile_steps=[3,2]")
