"""Compare shards of parameters, written at one layout and read at another, with the original tensors."""

from __future__ import annotations

import pytest
import torch
from checkpoints import write
from tiny import make_model, save_folder

from megatron_srpo.checkpoint.folder import DamagedCheckpoint
from megatron_srpo.checkpoint.slices import ShardLocation
from megatron_srpo.distributed.files import FileError
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights.sources import MegatronTensors, checkpoint_slice
from megatron_srpo.weights.torch_dist import Folder
from megatron_srpo.weights.transfer import ParameterShard

NAMES = [
    "embedding.word_embeddings.weight",  # 261 rows, padded differently at every layout
    "decoder.final_layernorm.weight",
    "decoder.layers.1.self_attention.linear_qkv.weight",  # interleaved
    "decoder.layers.2.mlp.linear_fc1.weight",  # gate over up
    "decoder.layers.0.self_attention.linear_proj.weight",  # sharded by columns
    "decoder.layers.3.mlp.linear_fc2.weight",
    "decoder.layers.3.input_layernorm.weight",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return (architecture, HF tensors)."""
    hf = make_model(vocab_size=261)
    folder = HFFolder(save_folder(tmp_path_factory.mktemp("slices"), hf))
    return folder.architecture, {name: tensor.detach() for name, tensor in hf.state_dict().items()}


def shard(model, name, index, count):
    """Return (location, values) of a tensor-parallel shard, cut by hand from the HF tensors."""
    architecture, tensors = model
    location = architecture.locate(name)
    mapping = location.mapping
    unsharded = [tensors[name] for name in location.names]
    if mapping.dim is None:
        index, count = 0, 1
        pieces = unsharded
    elif mapping.padded:
        rows = -(-261 // (16 * count)) * 16
        padded = torch.cat([unsharded[0], torch.zeros(rows * count - 261, 64)])
        pieces = [padded[index * rows : (index + 1) * rows]]
    else:
        pieces = [tensor.chunk(count, mapping.dim)[index] for tensor in unsharded]
    values = mapping.fusion.merge(pieces)
    held = ParameterShard(location.names[0], index, count, True)
    return ShardLocation(checkpoint_slice(location, architecture), held, tuple(values.shape)), values


def save(folder, model, name, count, cuts=(0.13, 0.5)):
    """Write the parameter from `count` tensor-parallel ranks, in flat ranges that end at `cuts`."""
    ranks = []
    for index in range(count):
        location, values = shard(model, name, index, count)
        bounds = [0, *(int(cut * values.numel()) for cut in cuts), values.numel()]
        for start, end in zip(bounds, bounds[1:], strict=False):
            ranks.append([*location.cut("teacher.", values.reshape(-1)[start:end], start)])
        if location.shard.count == 1:
            break
    write(folder, *ranks)
    return Folder(folder)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (4, 1), (4, 2), (2, 4)])
def test_any_layout_reads_any_other(tmp_path, model, before, after):
    # Complete shards and odd ranges of them, bit for bit.
    for number, name in enumerate(NAMES):
        (tmp_path / str(number)).mkdir()
        saved = save(tmp_path / str(number), model, name, before)
        for index in range(after):
            location, values = shard(model, name, index, after)
            size = values.numel()
            for start, end in ((0, size), (size // 3, size - 1), (1, 3), (5, 5)):
                found = location.read(saved, "teacher.", start, end)
                assert torch.equal(found, values.reshape(-1)[start:end]), (name, index, start, end)


@pytest.mark.parametrize("count", [1, 4])
def test_the_hugging_face_tensors_come_back(tmp_path, model, count):
    # The converters read them, which know nothing of shards.
    architecture, tensors = model
    ranks = []
    for index in range(count):
        slices = []
        for location in architecture.locations():
            name = location.mapping.megatron
            if location.mapping.in_layer:
                name = f"decoder.layers.{location.layer}.{name}"
            part, values = shard(model, name, index, count)
            if part.shard.count > 1 or index == 0:
                slices += part.cut("teacher.", values.reshape(-1), 0)
        ranks.append(slices)
    write(tmp_path, *ranks)
    found = MegatronTensors(tmp_path, architecture, "teacher.")
    for name in found.names():
        assert torch.equal(found.tensor(name), tensors[name]), name


def test_a_missing_range_and_a_missing_parameter_are_named(tmp_path, model):
    name = NAMES[2]
    location, values = shard(model, name, 0, 2)
    flat, half = values.reshape(-1), values.numel() // 2
    write(tmp_path, [*location.cut("", flat[half:], half)])
    saved = Folder(tmp_path)
    key = "decoder.layers.self_attention.linear_qkv.weight"
    assert torch.equal(location.read(saved, "", half, len(flat)), flat[half:])
    with pytest.raises(FileError, match=f"{key}: its chunks hold {half} of {len(flat)} elements"):
        location.read(saved, "", 0, len(flat))
    with pytest.raises(DamagedCheckpoint, match=f"optimizer.state.exp_avg.{key} is not in the checkpoint"):
        location.read(saved, "optimizer.state.exp_avg.", 0, len(flat))


def test_another_shape_is_named(tmp_path, model):
    location, values = shard(model, NAMES[3], 0, 1)
    write(tmp_path, [*location.cut("", values.reshape(-1), 0)])
    other, _ = shard(model, NAMES[3], 0, 2)
    other = ShardLocation(other.place, other.shard, (other.shape[0] + 2, other.shape[1]))
    with pytest.raises(DamagedCheckpoint, match="has shape .*, expected"):
        other.read(Folder(tmp_path), "", 0, 4)
