"""Pieces of parameters, written at one layout and read at another, against the Hugging Face tensors they
came from.
"""

from __future__ import annotations

import pytest
import torch
from megatron_srpo.checkpoint.pieces import Piece, SavedTensors
from tiny import make_model, save_folder

from megatron_srpo.checkpoint.folder import DamagedCheckpoint
from megatron_srpo.checkpoint.saver import write_tensors
from megatron_srpo.model.hf_folder import HFFolder

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
NAMES = [
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    QKV,
    "decoder.layers.2.mlp.linear_fc1.weight",
]
NAMES += ["decoder.layers.0.self_attention.linear_proj.weight", "decoder.layers.3.mlp.linear_fc2.weight"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(architecture, HF tensors) of a model whose 261 vocabulary rows are padded differently at every
    layout.
    """
    hf = make_model(vocab_size=261)
    folder = HFFolder(save_folder(tmp_path_factory.mktemp("pieces"), hf))
    return folder.architecture, {name: tensor.detach() for name, tensor in hf.state_dict().items()}


def local(name, part, parts, model):
    """(mapping, first HF name, the parameter) of one tensor-parallel part, cut by hand."""
    architecture, tensors = model
    location = architecture.locate(name)
    mapping, first = location.mapping, location.names[0]
    whole = [tensors[name] for name in location.names]
    if name == NAMES[0]:
        rows = -(-261 // (16 * parts)) * 16
        padded = torch.cat([whole[0], torch.zeros(rows * parts - 261, 64)])
        return mapping, first, padded[part * rows : (part + 1) * rows]
    pieces = whole if mapping.dim is None else [tensor.chunk(parts, mapping.dim)[part] for tensor in whole]
    return mapping, first, mapping.fusion.merge(pieces)


def write(folder, model, parts, cuts, name):
    """Files of `parts` tensor-parallel ranks × ranges that end at `cuts` (shares of the elements)."""
    files = []
    for part in range(parts):
        mapping, first, parameter = local(name, part, parts, model)
        if mapping.dim is None and part:
            continue
        flat = parameter.reshape(-1)
        bounds = [0, *(int(cut * len(flat)) for cut in cuts), len(flat)]
        for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            piece = Piece(
                "policy",
                first,
                0 if mapping.dim is None else part,
                1 if mapping.dim is None else parts,
                tuple(parameter.shape),
                start,
            )
            files.append(folder / f"{part}-{number}.safetensors")
            write_tensors(files[-1], {piece.key: flat[start:end].clone()})
    return files


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (2, 1), (4, 2), (2, 4)])
def test_any_layout_reads_any_other(tmp_path, model, name, before, after):
    """Whole parameters and odd ranges of them, bit for bit."""
    files = write(tmp_path, model, before, (0.13, 0.5), name)
    with SavedTensors(files) as saved:
        assert saved.kinds() == {"policy"}
        for part in range(after):
            mapping, first, parameter = local(name, part, after, model)
            place = (0, 1) if mapping.dim is None else (part, after)
            for start, end in (
                (0, parameter.numel()),
                (parameter.numel() // 3, parameter.numel() - 1),
                (5, 5),
            ):
                own = Piece("policy", first, *place, tuple(parameter.shape), start)
                assert torch.equal(saved.read(own, end, mapping), parameter.reshape(-1)[start:end])


@pytest.mark.parametrize("parts", [1, 4])
def test_the_hugging_face_tensors_come_back(tmp_path, model, parts):
    for name in NAMES:
        (tmp_path / name).mkdir()
        with SavedTensors(write(tmp_path / name, model, parts, (0.4,), name)) as saved:
            location = model[0].locate(name)
            found = saved.whole("policy", location.names[0], location.mapping)
            for stored, tensor in zip(location.names, found, strict=True):
                assert torch.equal(tensor, model[1][stored])


def test_a_missing_range_and_a_missing_parameter_are_named(tmp_path, model):
    files = write(tmp_path, model, 2, (0.5,), QKV)
    mapping, first, parameter = local(QKV, 0, 2, model)
    own = Piece("policy", first, 0, 2, tuple(parameter.shape), 0)
    with SavedTensors(files[1:]) as saved:
        half = parameter.numel() // 2
        assert torch.equal(
            saved.read(own._replace(start=half), parameter.numel(), mapping), parameter.reshape(-1)[half:]
        )
        with pytest.raises(
            DamagedCheckpoint, match="policy model.layers.1.self_attn.q_proj.weight: .* of part 0 are there"
        ):
            saved.read(own, parameter.numel(), mapping)
        with pytest.raises(
            DamagedCheckpoint,
            match="exp_avg model.layers.1.self_attn.q_proj.weight: is not in the checkpoint",
        ):
            saved.read(own._replace(kind="exp_avg"), parameter.numel(), mapping)


def test_keys_are_read_back():
    piece = Piece("exp_avg_sq", "model.layers.7.mlp.gate_proj.weight", 3, 8, (96, 64), 1024)
    assert Piece.parse(piece.key) == piece


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x10\0\0\0\0\0\0\0{}"])
def test_damaged_files_are_named(tmp_path, model, content):
    (tmp_path / "rank_00000.safetensors").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="rank_00000.safetensors: is damaged"):
        SavedTensors([tmp_path / "rank_00000.safetensors"])
    write_tensors(tmp_path / "odd.safetensors", {"who|knows": torch.zeros(2)})
    with pytest.raises(DamagedCheckpoint, match="odd.safetensors: is damaged"):
        SavedTensors([tmp_path / "odd.safetensors"])
