"""Test writing HF folders: several shards, the index, and the order in which files appear."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, make_model, save_folder
from transformers import AutoModelForCausalLM

from megatron_srpo.distributed.files import FileError
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights import transfer


@pytest.fixture
def source(tmp_path):
    """Return a tiny folder and the stream of an export."""
    model = make_model(tied=False)
    folder = HFFolder(save_folder(tmp_path / "source", model))
    return folder, list(model.state_dict().items())


def test_many_shards_load_in_transformers_and_in_our_reader(source, tmp_path, monkeypatch):
    folder, tensors = source
    monkeypatch.setattr(transfer, "SHARD_BYTES", 100_000)
    transfer.save_hf(tensors, folder, tmp_path / "out", write=True)
    written = HFFolder(tmp_path / "out")
    assert len(set(written.file_of.values())) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for _, tensor in tensors)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors)
    assert len(written.tokenizer) == len(folder.tokenizer)


def test_files_beside_the_weights_are_copied_by_name_and_never_through_a_link_elsewhere(source, tmp_path):
    """The written folder is one that people upload."""
    folder, tensors = source
    secret = tmp_path / "secret"
    secret.write_text('{"token": "hf_xyz"}')
    (folder.path / "notes.txt").symlink_to(secret)
    (folder.path / "passwords.json").write_text("{}")
    (folder.path / "additional_chat_templates").mkdir()
    (folder.path / "additional_chat_templates" / "rag.jinja").write_text("a")
    transfer.save_hf(tensors, folder, tmp_path / "out", write=True)
    copied = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*")}
    assert {"tokenizer.json", "additional_chat_templates/rag.jinja", "generation_config.json"} <= copied
    assert not {"notes.txt", "passwords.json"} & copied
    (folder.path / "special_tokens_map.json").symlink_to(secret)
    with pytest.raises(FileError, match="outside of the folder"):
        transfer.save_hf(tensors, folder, tmp_path / "again", write=True)
    assert not (tmp_path / "again").exists()


def test_the_dtype_written_is_the_dtype_declared(source, tmp_path):
    folder, tensors = source
    transfer.save_hf(
        ((name, tensor.bfloat16()) for name, tensor in tensors), folder, tmp_path / "out", write=True
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_stream_that_breaks_leaves_no_folder_that_looks_complete(source, tmp_path):
    folder, tensors = source

    def breaks():
        yield tensors[0]
        raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        transfer.save_hf(breaks(), folder, tmp_path / "out", write=True)
    assert not (tmp_path / "out").exists()


def test_ranks_that_do_not_write_consume_the_stream(source, tmp_path):
    folder, tensors = source
    stream = iter(tensors)
    transfer.save_hf(stream, folder, tmp_path / "out", write=False)
    assert next(stream, None) is None and not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_rank_reads_only_its_own_slices(tmp_path, monkeypatch, family, rank):
    # Of two tensor-parallel ranks, each reads as many numbers from the file as its parameters hold, and no
    # more.
    folder = HFFolder(save_folder(tmp_path, family=family, tied=False))
    full, size = load_file(tmp_path / "model.safetensors"), 2
    read = 0

    class Slice:
        def __init__(self, inner):
            self.inner = inner

        def get_shape(self):
            return self.inner.get_shape()

        def __getitem__(self, index):
            nonlocal read
            piece = self.inner[index]
            read += piece.numel()
            return piece

    class File:
        def __init__(self, inner):
            self.inner = inner

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return False

        def get_slice(self, name):
            return Slice(self.inner.get_slice(name))

    locations = list(folder.architecture.locations())
    assert sum(len(location.names) for location in locations) == len(full)

    def own(location):
        mapping, pieces = location.mapping, [full[name] for name in location.names]
        if mapping.dim is not None:
            pieces = [piece.chunk(size, mapping.dim)[rank] for piece in pieces]
        return mapping.fusion.merge(pieces)

    parameters = [(each, torch.nn.Parameter(torch.zeros_like(own(each)))) for each in locations]
    real = transfer.safe_open
    assert folder.file_of  # its own checks read headers before
    monkeypatch.setattr(
        transfer, "safe_open", lambda *arguments, **options: File(real(*arguments, **options))
    )
    monkeypatch.setattr(transfer, "parameters_of", lambda chunks, architecture: parameters)
    group = SimpleNamespace(rank=lambda: rank, size=lambda: size)
    for kind in ("tensor_model", "expert_tensor"):
        monkeypatch.setattr(transfer.parallel_state, f"get_{kind}_parallel_group", lambda: group)
    transfer.load([], folder)
    assert read == sum(parameter.numel() for _, parameter in parameters)
    assert read < 0.6 * sum(tensor.numel() for tensor in full.values())
    assert all(torch.equal(parameter, own(location)) for location, parameter in parameters)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Return the architecture of a tiny Qwen3-MoE."""
    return HFFolder(save_folder(tmp_path_factory.mktemp("moe"), family="qwen3_moe")).architecture


@pytest.mark.parametrize("name", ["local_experts.3.linear_fc1.weight", "linear_fc1.weight3"])
def test_experts_are_numbered_over_all_ranks(experts, name):
    # A module for each expert (local layers) or their matrices in one module (Transformer Engine).
    location = experts.locate(f"decoder.layers.1.mlp.experts.{name}", layer_offset=4, expert_offset=8)
    prefix = "model.layers.5.mlp.experts.11."
    assert location.names == (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.mlp.router.bias", "decoder.layers.0.mlp.experts.weight1", "decoder.final_norm"]
)
def test_unknown_parameters_are_refused(experts, name):
    with pytest.raises(KeyError):
        experts.locate(name)
