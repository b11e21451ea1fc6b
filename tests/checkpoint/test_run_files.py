"""Test a run's files: written aside safely, checksums, a lost folder of checkpoints, damaged metrics."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from checkpoints import write

from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.checkpoint.folder import DamagedCheckpoint, Manifest
from megatron_srpo.checkpoint.inputs import inputs_of
from megatron_srpo.checkpoint.run_folder import check_run_folder
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config, save_config
from megatron_srpo.data.rollout_file import dump
from megatron_srpo.distributed.files import SavedFile, describe, write_text
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.observe.metrics_file import MetricsFile

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    start = ROOT / "examples/quickstart/start"
    settings = [f"model.hf_path={start}", f"logging.dir={tmp_path / 'run'}"]
    (tmp_path / "run").mkdir()
    return load_config(ROOT / "examples/quickstart/config.yaml", settings)


def save(run, step, **changes):
    """Commit a checkpoint of `step` without tensors."""
    directory = run / "checkpoints"
    partial = directory / f".step_{step:06d}.test"
    partial.mkdir(parents=True)
    write(partial, [])
    state = {"skipped_in_a_row": 0, "next_prompt": 8, "schedule_steps": 2, "optimizer_updates": 2}
    facts = {"architecture": {}, "dtype": "float32", "config": {"lr": 1e-6}, "versions": {}, "world_size": 1}
    manifest = Manifest(
        **{**facts, **changes},
        format=folders.FORMAT,
        step=step,
        session="s",
        state=state,
        evaluation={"step": step, "eval/addition/avg@4": 0.1},
        files={},
    )
    return folders.commit(partial, manifest, directory)


@pytest.mark.parametrize("name", ["text", "rollouts", "config.yaml"])
def test_a_link_at_the_partial_name_is_not_followed(tmp_path, config, name):
    # Row: report follows a link at the predictable partial name and overwrites any file of yours.
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "rollouts").mkdir()
    file = {"text": "report.html", "rollouts": "rollouts/step_000001.jsonl"}.get(name, name)
    file = tmp_path / file
    for partial in (f".{file.name}.partial", file.with_suffix(".partial").name, file.name):
        (file.parent / partial).unlink(missing_ok=True)
        (file.parent / partial).symlink_to(precious)
    if name == "text":
        write_text(file, "page")
    elif name == "rollouts":
        dump([], tmp_path / "rollouts", 1)
    else:
        save_config(config, file)
    assert precious.read_text() == "mine" and file.is_file() and not file.is_symlink()


def test_a_failed_write_leaves_the_old_configuration(tmp_path, config, monkeypatch):
    # Row: config.yaml is rewritten in place: a failed write locks the run out of its own folder.
    file = tmp_path / "config.yaml"
    save_config(config, file)
    before = file.read_text()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_config(config.model_copy(update={"lr": 1}), file)
    assert file.read_text() == before and os.listdir(tmp_path).count(".config.yaml.partial") == 0


def test_every_changed_number_of_a_manifest_is_found(tmp_path):
    # Row: manifest state is not covered by checksums: flips train on silently or end in tracebacks.
    folder = save(tmp_path, 10)
    file = folder / "manifest.json"
    intact = file.read_text()
    folders.read_manifest(folder)
    changes = [('"next_prompt": 8', '"next_prompt": 9'), ('"next_prompt"', '"next_promqt"')]
    changes += [
        ('"skipped_in_a_row": 0', '"skipped_in_a_row": 4'),
        ("0.1", "0.7"),
        ('"step": 10', '"step": 11'),
    ]
    changes += [('"crc32": ', '"crc32": 1'), ('"crc32": ', '"crc33": '), ("{", "[{"), ("{", '{"a": ' * 9999)]
    for old, new in changes:
        assert old in intact
        file.write_text(intact.replace(old, new, 1))
        with pytest.raises(DamagedCheckpoint, match="manifest.json"):
            folders.read_manifest(folder)
    file.write_text(json.dumps(json.loads(intact)))  # the same content
    assert folders.read_manifest(folder).counters.next_prompt == 8


@pytest.mark.parametrize("is_emptied", [False, True])
def test_a_lost_folder_of_checkpoints_is_not_a_new_run(config, tmp_path, is_emptied):
    # Row: checkpoints/ missing (unmounted, purged): the run starts from scratch and erases its metrics.
    run, model = tmp_path / "run", HFFolder(config.model.hf_path)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n')
    save_config(config, run / "config.yaml")
    check_run_folder(config, model)  # killed before its first checkpoint: it may start again
    save(run, 10)
    (run / "checkpoints").rename(tmp_path / "lost")
    if is_emptied:
        (run / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"whose checkpoint step_000010 is missing from .*checkpoints"):
        check_run_folder(config, model)


def test_a_run_folder_refuses_changed_inputs_before_anything_is_read(config, tmp_path):
    # Row: resume trains on other data without a word. The newest readable manifest has the checksums.
    run, model = tmp_path / "run", HFFolder(config.model.hf_path)
    save_config(config, run / "config.yaml")
    inputs = inputs_of(config, model)
    save(run, 10, architecture=dataclasses.asdict(model.architecture), inputs=inputs)
    check_run_folder(config, model)
    inputs["model.hf_path"]["tokenizer.json"] = "0"
    inputs["task.name"] = {"the training prompts of task addition": "0"}
    save(run, 20, architecture=dataclasses.asdict(model.architecture), inputs=inputs)
    with pytest.raises(ConfigError, match=r"task.name: the training .*\n.*tokenizer.json is not"):
        check_run_folder(config, model)
    allowed = config.resume.model_copy(update={"override": ("task", "model", "resume")})
    check_run_folder(config.model_copy(update={"resume": allowed}), model)
    (run / "checkpoints" / "step_000020" / "manifest.json").write_text("half")
    check_run_folder(config, model)


def row(step, **changes):
    names = ("pass_rate", "zero_advantage_share", "sdpo_token_share", "updates", "updates_skipped", "lr")
    return {"step": step, "loss": None, **dict.fromkeys(names, 0.5), "alarms": ["collapse"], **changes}


def metrics_of(tmp_path, rows):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"step": 2', '"step": "2"', ":2: is damaged (step: found '2', expected a whole number)"),
        ('"step": 2', '"stfp": 2', ":2: is damaged (step: found None, expected"),
        ('"step": 2, "loss": null', '"step": 2, "lnss": null', ":2: is damaged (it has no loss)"),
        ('"step": 2, "loss": null', '"step": 2, "loss": "a"', ":2: is damaged (loss: found 'a'"),
        (
            '"step": 2, "loss": null, "pass_rate": 0.5',
            '"step": 2, "loss": 1, "pass_rate": null',
            "(pass_rate",
        ),
        ('"step": 2, "loss": null', '"step": 2, "loss": true', ":2: is damaged (loss: found 'True'"),
        ('"step": 2', '"step": 2}', ":2: is damaged"),
        ('"step": 2, "loss": null', '"step": 2, "loss": 0.25', "has changed since step 2 was saved (CRC-32)"),
    ],
)
def test_damaged_metrics_are_reported_and_do_not_block_a_resume(tmp_path, old, new, said):
    # Row: metrics are not covered by checksums: tracebacks that block resume for good, rows dropped silently.
    evaluation = {"step": 2, "eval/addition/avg@4": 0.25}
    file = metrics_of(tmp_path, [row(1), row(2), evaluation])
    saved, intact = describe(file), file.read_text()
    assert old in intact
    file.write_text(intact.replace(old, new, 1) + json.dumps(row(3)) + '\n{"step": 4, "lo')
    metrics = MetricsFile(file)
    rows, problem = metrics.rewind(2, True, saved)
    assert said in problem and "kept as metrics.damaged.jsonl" in problem
    assert rows[0] == row(1) and rows[-1] == evaluation and metrics.evaluations() == [evaluation]
    assert (tmp_path / "metrics.damaged.jsonl").read_text().startswith(intact.replace(old, new, 1))
    metrics.write(row(3))
    assert json.loads(file.read_text().splitlines()[-1]) == row(3)
    assert metrics.rewind(3, True, describe(file))[1] == ""


def test_a_line_that_a_kill_has_cut_is_no_damage(tmp_path):
    file = metrics_of(tmp_path, [row(1), row(2)])
    saved = SavedFile(**describe(file).model_dump())
    file.write_text(file.read_text() + json.dumps(row(3)) + '\n{"step": 4, "lo')
    assert MetricsFile(file).rewind(2, True, saved) == ([row(1), row(2)], "")
    assert describe(file) == saved and not (tmp_path / "metrics.damaged.jsonl").exists()


def test_every_row_of_the_metrics_is_synced(tmp_path, monkeypatch):
    # Row: metrics.jsonl is flushed, not fsynced.
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append((tmp_path / "metrics.jsonl").read_text())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1})
    metrics.write({"step": 2})
    assert [text.count("\n") for text in synced] == [1, 2]
    MetricsFile(Path(os.devnull)).write({"step": 1})  # of other ranks
