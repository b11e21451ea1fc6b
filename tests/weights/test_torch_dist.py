"""Test damaged torch_dist folders, the messages that name the damage, and pickles that must not run."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)

from megatron_srpo.distributed.files import FileError
from megatron_srpo.weights.torch_dist import Folder, RankFile, Writer, write_metadata

STACK = torch.arange(48, dtype=torch.float32).reshape(2, 6, 4)


@pytest.fixture
def folder(tmp_path):
    """Write `stack` [2, 6, 4] from two ranks and `plain` [3] in bfloat16.

    Layer 0 of the stack is in two pieces by different ranks, layer 1 in one.
    """
    path = tmp_path / "checkpoint"
    path.mkdir()
    first, second = Writer(path, 0), Writer(path, 1)
    first.write("stack", STACK[0, :2], (2, 6, 4), (0, 0, 0))
    second.write("stack", STACK[0, 2:], (2, 6, 4), (0, 2, 0))
    second.write("stack", STACK[1], (2, 6, 4), (1, 0, 0))
    first.write("plain", torch.tensor([1, 2, 3]).bfloat16(), (3,), (0,))
    files = [RankFile.from_json(writer.close().to_json()) for writer in (first, second)]
    write_metadata(path, files, ["a._extra_state/shard_0_1"])
    return path


def refusal(path) -> str:
    with pytest.raises(FileError) as caught:
        opened = Folder(path)
        for key in opened.chunks:
            opened.read(key)
    return str(caught.value)


def edit_metadata(path, change) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_parts_are_put_together(folder):
    opened = Folder(folder)
    assert set(opened.chunks) == {"stack", "plain"} and opened.shape("stack") == (2, 6, 4)
    assert opened.dtype("plain") == torch.bfloat16
    assert torch.equal(opened.read("stack"), STACK)
    assert torch.equal(opened.read("stack", (0,)), STACK[0]) and torch.equal(
        opened.read("stack", (1,)), STACK[1]
    )
    assert torch.equal(opened.read("stack", (1, 4)), STACK[1, 4])


def test_torchs_reader_knows_where_things_lie(folder):
    metadata = FileSystemReader(folder).read_metadata()
    assert metadata.state_dict_metadata["stack"].size == torch.Size([2, 6, 4])
    assert len(metadata.storage_data) == 5


def test_a_transposed_tensor_that_torch_saved(tmp_path):
    # torch keeps the strides of its input.
    tensor = torch.arange(12.0).reshape(3, 4).t()
    save({"t": tensor}, checkpoint_id=tmp_path / "x", no_dist=True)
    (tmp_path / "x" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    assert torch.equal(Folder(tmp_path / "x").read("t"), tensor)


class Evil:
    """Make a folder when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("place", ["metadata", "planner_data", "storage_meta"])
def test_a_pickle_that_runs_code_is_refused_unrun(folder, tmp_path, place):
    evil = Evil(tmp_path / "pwned")
    if place == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(evil))
    else:
        edit_metadata(folder, lambda metadata: setattr(metadata, place, evil))
    message = refusal(folder)
    assert ".metadata" in message and "mkdir" in message and not (tmp_path / "pwned").exists()


def test_a_tensor_that_runs_code_is_refused_unrun(folder, tmp_path):
    torch.save(Evil(tmp_path / "pwned"), folder / "__1_0.distcp")
    size = (folder / "__1_0.distcp").stat().st_size

    def point_there(metadata):
        for index, place in metadata.storage_data.items():
            if place.relative_path == "__1_0.distcp":
                place.offset, place.length = 0, size
                assert index.fqn == "stack"

    edit_metadata(folder, point_there)
    message = refusal(folder)
    assert "__1_0.distcp" in message and "stack" in message and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"junk", pickle.dumps({"a": 1}), pickle.dumps(Metadata({}, None, None))[:40]]
)
def test_invalid_metadata(folder, content):
    (folder / ".metadata").write_bytes(content)
    assert ".metadata" in refusal(folder)


def test_metadata_without_places(folder):
    edit_metadata(folder, lambda metadata: setattr(metadata, "storage_data", None))
    assert ".metadata" in refusal(folder)


@pytest.mark.parametrize("content", [None, "", "[]", '{"sharded_backend": "zarr"}'])
def test_another_format(folder, content):
    (folder / "metadata.json").unlink()
    if content is not None:
        (folder / "metadata.json").write_text(content)
    assert "metadata.json" in refusal(folder)


def test_a_missing_file(folder):
    (folder / "__1_0.distcp").unlink()
    message = refusal(folder)
    assert "__1_0.distcp: is missing" in message and "stack" in message


def test_a_truncated_file(folder):
    file = folder / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    message = refusal(folder)
    assert "__1_0.distcp: is truncated" in message and "stack" in message


def test_a_file_outside_the_folder(folder, tmp_path):
    shutil.copy(folder / "__1_0.distcp", tmp_path / "outside")

    def point_there(metadata):
        for place in metadata.storage_data.values():
            place.relative_path = "../outside"

    edit_metadata(folder, point_there)
    assert "../outside" in refusal(folder)


def test_a_hole(folder):
    edit_metadata(folder, lambda metadata: metadata.state_dict_metadata["stack"].chunks.pop(0))
    assert "stack: its chunks hold 40 of 48 elements" in refusal(folder)


def test_another_dtype_than_announced(folder):
    edit_metadata(
        folder,
        lambda metadata: setattr(metadata.state_dict_metadata["plain"].properties, "dtype", torch.float16),
    )
    message = refusal(folder)
    assert "__0_0.distcp" in message and "plain" in message and "bfloat16" in message


@pytest.mark.parametrize(
    "place",
    [
        {"relative_path": 5},
        {"relative_path": [1]},
        {"relative_path": "../checkpoint/__0_0.distcp"},
        {"offset": "x"},
        {"offset": -5},
    ],
    ids=str,
)
def test_impossible_places_are_refused(folder, place):
    def change(metadata):
        for stored in metadata.storage_data.values():
            vars(stored).update(place)

    edit_metadata(folder, change)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize(
    "chunks", [[], [((1,), (3,))], [((-1,), (3,))], [((0, 0), (3, 1))], [((0,), (4,))]], ids=str
)
def test_impossible_chunks_are_refused(folder, chunks):
    # No chunks, or chunks that are shifted, before the start, of other dimensions, too long.

    def change(metadata):
        pieces = [ChunkStorageMetadata(torch.Size(start), torch.Size(shape)) for start, shape in chunks]
        metadata.state_dict_metadata["plain"].chunks = pieces
        stored = metadata.storage_data.pop(MetadataIndex("plain", (0,)))
        metadata.storage_data |= {MetadataIndex("plain", piece.offsets): stored for piece in pieces}

    edit_metadata(folder, change)
    assert str(folder / ".metadata") in refusal(folder)


def test_a_missing_dtype_is_refused(folder):
    edit_metadata(
        folder,
        lambda metadata: setattr(
            metadata.state_dict_metadata["plain"], "properties", TensorProperties(dtype=None)
        ),
    )
    assert "plain" in refusal(folder)
