"""The folder of checkpoints: what is whole, what is damaged, what stays."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.checkpoint.folder import DamagedCheckpoint, Manifest
from megatron_srpo.checkpoint.saver import write_tensors


def make(directory, step, score=None, value=0.0):
    """A checkpoint of two ranks' files; returns its folder."""
    partial = directory / f".step_{step:06d}.test"
    partial.mkdir(parents=True)
    files = {
        f"rank_{r:05d}.safetensors": write_tensors(partial / f"rank_{r:05d}.safetensors", tensors(value))
        for r in range(2)
    }
    evaluation = (
        None
        if score is None
        else {"step": step, "eval/addition/avg@4": score, "eval/addition/pass@4": 1 - score}
    )
    manifest = Manifest(
        format=folders.FORMAT,
        step=step,
        session="test",
        architecture={},
        dtype="float32",
        config={},
        versions={},
        world_size=2,
        state={},
        evaluation=evaluation,
        files=files,
    )
    return folders.commit(partial, manifest, directory)


def tensors(value):
    return {"policy|a|0/1|4|0": torch.full((4,), value), "rng|cpu": torch.arange(100, dtype=torch.uint8)}


def test_a_checkpoint_appears_whole_and_latest_names_it(tmp_path):
    folder = make(tmp_path, 10)
    assert folder.name == "step_000010" and sorted(file.name for file in folder.iterdir()) == [
        "manifest.json",
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    ]
    assert (tmp_path / "latest").read_text() == "step_000010\n"
    make(tmp_path, 20)
    assert folders.steps(tmp_path) == [20, 10] and (tmp_path / "latest").read_text() == "step_000020\n"
    folders.check_files(folder, folders.read_manifest(folder))


def test_one_of_the_same_step_is_replaced(tmp_path):
    make(tmp_path, 10, value=1.0)
    folder = make(tmp_path, 10, value=2.0)
    folders.check_files(folder, folders.read_manifest(folder))
    assert (
        folders.steps(tmp_path) == [10]
        and [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    )


@pytest.mark.parametrize("where", ["header", "first number", "last number"])
def test_every_flipped_bit_is_found(tmp_path, where):
    folder = make(tmp_path, 10)
    file = folder / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[
        {"header": content.index(b"policy"), "first number": start, "last number": len(content) - 1}[where]
    ] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="rank_00001.safetensors"):
        folders.check_files(folder, folders.read_manifest(folder))
    folders.check_files(
        folder, folders.read_manifest(folder), slice(0, None, 2)
    )  # the other rank's share is whole


def test_truncated_and_missing_files_are_named(tmp_path):
    folder = make(tmp_path, 10)
    manifest, file = folders.read_manifest(folder), folder / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        DamagedCheckpoint, match=r"rank_00000.safetensors: has \d+ bytes, the manifest says \d+"
    ):
        folders.check_files(folder, manifest)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match="rank_00000.safetensors: cannot be read"):
        folders.check_files(folder, manifest)


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}', None, "other"])
def test_bad_manifests_are_named(tmp_path, text):
    folder = make(tmp_path, 10)
    file = folder / "manifest.json"
    if text is None:
        file.unlink()
    elif text == "other":
        file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    else:
        file.write_text(text)
    with pytest.raises(DamagedCheckpoint, match="manifest.json"):
        folders.read_manifest(folder)


def test_the_newest_valid_one_is_used_and_the_damaged_are_said(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    (tmp_path / "step_000030" / "manifest.json").write_text("half")
    said = []
    check = lambda folder, manifest: "rank_00000.safetensors: torn" if manifest.step == 20 else None  # noqa: E731
    folder, manifest = folders.newest_valid(tmp_path, check, said.append)
    assert folder.name == "step_000010" and manifest.step == 10
    assert (
        len(said) == 2
        and "skipping checkpoint at step 30" in said[0]
        and "manifest.json" in said[0]
        and "torn" in said[1]
    )
    assert folders.newest_valid(tmp_path, lambda *_: "no", said.append) is None


def test_the_newest_and_the_best_stay(tmp_path):
    """Best by avg@K of the first task, the later of equals; one that has no score or no manifest is not the
    best.
    """
    for step, score in ((1, 0.9), (2, 0.5), (3, 0.9), (4, None), (5, 0.1), (6, 0.2)):
        make(tmp_path, step, score)
    (tmp_path / "step_000002" / "manifest.json").write_text("")
    assert folders.retain(tmp_path, keep_last=2, keep_best=1) == [6, 5, 3]
    assert folders.steps(tmp_path) == [6, 5, 3] and not [
        entry for entry in tmp_path.iterdir() if entry.name.startswith(".")
    ]
    assert folders.retain(tmp_path, keep_last=1, keep_best=0) == [6]


def test_a_damaged_one_of_a_step_taken_back_is_not_the_newest(tmp_path):
    """30 is damaged, so the run went on from 20 and saves at 25: with one to keep, that is 25."""
    for step in (20, 30):
        make(tmp_path, step)
    (tmp_path / "step_000030" / "manifest.json").write_text("half")
    make(tmp_path, 25)
    assert folders.retain(tmp_path, keep_last=1, keep_best=0) == [25] and folders.steps(tmp_path) == [25]
    assert (tmp_path / "latest").read_text() == "step_000025\n"


def test_what_killed_saves_leave_is_removed(tmp_path):
    make(tmp_path, 10)
    (tmp_path / ".step_000020.abc").mkdir()
    (tmp_path / ".step_000020.abc" / "rank_00000.safetensors").write_text("half")
    assert folders.steps(tmp_path) == [10]
    folders.tidy(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_000010"]
    folders.tidy(tmp_path / "nowhere")
    assert folders.steps(tmp_path / "nowhere") == []
