"""Test the folder of checkpoints: complete and damaged ones, and which are kept."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import write

from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.checkpoint.folder import DamagedCheckpoint, Manifest, SavedFile
from megatron_srpo.checkpoint.slices import TensorSlice
from megatron_srpo.weights.torch_dist import METADATA_FILES


def make(directory, step, score=None, value=0.0):
    """Write a checkpoint with two ranks' files and return its folder."""
    partial = directory / f".step_{step:06d}.test"
    partial.mkdir(parents=True)
    ranks = write(partial, slices(value, 0), slices(value, 4))
    files = {file.name: SavedFile(bytes=file.bytes, crc32=file.crc32) for file in ranks}
    files |= {name: folders.describe(partial / name) for name in METADATA_FILES}
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


def slices(value, start):
    return [TensorSlice("weights", torch.full((4,), value), (8,), (start,))]


def test_a_checkpoint_appears_at_once_and_latest_names_it(tmp_path):
    folder = make(tmp_path, 10)
    assert folder.name == "step_000010" and sorted(file.name for file in folder.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "common.pt",
        "manifest.json",
        "metadata.json",
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


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "common.pt", "metadata.json"])
def test_every_flipped_bit_is_found(tmp_path, name):
    folder = make(tmp_path, 10)
    manifest, file = folders.read_manifest(folder), folder / name
    content, number = file.read_bytes(), sorted(manifest.files).index(name)
    for position in (0, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(DamagedCheckpoint, match=name):
            folders.check_files(folder, manifest)
        folders.check_files(folder, manifest, slice(0, number))  # the other ranks' shares
        folders.check_files(folder, manifest, slice(number + 1, None))


def test_truncated_and_missing_files_are_named(tmp_path):
    folder = make(tmp_path, 10)
    manifest, file = folders.read_manifest(folder), folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"__0_0.distcp: has \d+ bytes, the manifest says \d+"):
        folders.check_files(folder, manifest)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match="__0_0.distcp: cannot be read"):
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


def test_the_newest_valid_one_is_used_and_damaged_ones_are_reported(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    (tmp_path / "step_000030" / "manifest.json").write_text("half")
    said = []
    check = lambda folder, manifest: "__0_0.distcp: truncated" if manifest.step == 20 else None  # noqa: E731
    folder, manifest = folders.newest_valid(tmp_path, check, said.append)
    assert folder.name == "step_000010" and manifest.step == 10
    assert (
        len(said) == 2
        and "skipping checkpoint at step 30" in said[0]
        and "manifest.json" in said[0]
        and "truncated" in said[1]
    )
    assert folders.newest_valid(tmp_path, lambda *_: "no", said.append) is None


def test_the_newest_and_the_best_stay(tmp_path):
    # The best has the highest avg@K of the first task, the later one of equals; a checkpoint without score or
    # manifest is never the best.
    for step, score in ((1, 0.9), (2, 0.5), (3, 0.9), (4, None), (5, 0.1), (6, 0.2)):
        make(tmp_path, step, score)
    (tmp_path / "step_000002" / "manifest.json").write_text("")
    assert folders.retain(tmp_path, keep_last=2, keep_best=1) == [6, 5, 3]
    assert folders.steps(tmp_path) == [6, 5, 3] and not [
        entry for entry in tmp_path.iterdir() if entry.name.startswith(".")
    ]
    assert folders.retain(tmp_path, keep_last=1, keep_best=0) == [6]


def test_a_damaged_one_of_a_step_taken_back_is_not_the_newest(tmp_path):
    # 30 is damaged, so the run resumed from 20 and saves at 25: with one checkpoint to keep, 25 stays.
    for step in (20, 30):
        make(tmp_path, step)
    (tmp_path / "step_000030" / "manifest.json").write_text("half")
    make(tmp_path, 25)
    assert folders.retain(tmp_path, keep_last=1, keep_best=0) == [25] and folders.steps(tmp_path) == [25]
    assert (tmp_path / "latest").read_text() == "step_000025\n"


def test_what_killed_saves_leave_is_removed(tmp_path):
    make(tmp_path, 10)
    (tmp_path / ".step_000020.abc").mkdir()
    (tmp_path / ".step_000020.abc" / "__0_0.distcp").write_text("half")
    assert folders.steps(tmp_path) == [10]
    folders.tidy(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_000010"]
    folders.tidy(tmp_path / "nowhere")
    assert folders.steps(tmp_path / "nowhere") == []
