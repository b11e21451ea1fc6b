"""Test verify_checkpoint: equal and different models, the size of differences, and the exit status."""

from __future__ import annotations

import shutil

import pytest
import torch
from _compare import LOGIT_TOKENS, difference, logits
from _folders import open_tensors
from _transformers import TransformersTensors, layer_of
from safetensors.torch import load_file, save_file
from tables import each_row
from test_convert import there, tool
from tiny import FAMILIES, make_model, save_folder
from transformers import AutoModelForCausalLM

from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights.sources import MegatronTensors

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Return a folder with hf (a Qwen3-MoE) and qwen3 (a dense one); -megatron: converted."""
    root = tmp_path_factory.mktemp("pristine")
    for name, family in (("qwen3", "qwen3"), ("moe", "qwen3_moe")):
        save_folder(root / name, make_model(family, vocab_size=261))
        assert there(root / name, root / f"{name}-megatron") == 0
    return root


def verify(*arguments) -> int:
    return tool("verify_checkpoint", *arguments)


def changed(source, target, change):
    """Return a copy of the folder with `change` applied to its tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_equal_in_any_format(pristine, capsys):
    assert verify(pristine / "qwen3", pristine / "qwen3-megatron") == 0
    out = capsys.readouterr().out
    assert "46 tensors are equal" in out and "logits are equal" in out
    assert verify(pristine / "qwen3-megatron", pristine / "qwen3-megatron", "--no-logits") == 0
    assert "logits" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["qwen3", "moe"])
def test_logits_are_those_of_the_hf_folder(pristine, name):
    # From a Megatron folder's tensors, against transformers' own loading.
    source = MegatronTensors(pristine / f"{name}-megatron", HFFolder(pristine / name).architecture)
    ids = torch.randint(0, 261, LOGIT_TOKENS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(pristine / name)(ids).logits
    assert torch.equal(logits(source, pristine / name), expected)


def test_what_differs_and_by_how_much(pristine, tmp_path, capsys):
    original = load_file(pristine / "qwen3" / "model.safetensors")[UP]
    other = changed(pristine / "qwen3", tmp_path / "other", lambda t: t[UP][5, 7:9].add_(0.25))
    assert verify(pristine / "qwen3-megatron", other) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("logits:")
    assert lines[0] == f"different: 1 of 46 tensors differ, by at most 0.25 ({UP})"
    relative = f"({0.25 / original.abs().max():.3g} of its largest element)"
    assert lines[2] == f"{UP}: 2 of 6144 elements differ, by at most 0.25 {relative}"
    assert verify(pristine / "qwen3", other, "--no-logits", "--tolerance", "0.2") == 1
    assert verify(pristine / "qwen3", other, "--no-logits", "--tolerance", "0.3") == 0


def test_equal_tensors_of_another_dtype(tmp_path, capsys):
    model = make_model().bfloat16()
    save_folder(tmp_path / "half", model)
    save_folder(tmp_path / "full", model.float())
    assert verify(tmp_path / "half", tmp_path / "full") == 0


def test_other_names(pristine, capsys):
    assert verify(pristine / "qwen3", pristine / "moe") == 1
    out = capsys.readouterr().out
    assert (
        f"{UP}: missing from the second" in out
        and "model.layers.0.mlp.gate.weight: missing from the first" in out
    )


def test_what_cannot_be_read(pristine, tmp_path, capsys):
    assert verify(pristine / "qwen3", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    bare = shutil.copytree(pristine / "qwen3-megatron", tmp_path / "bare")
    (bare / "config.json").unlink()
    assert verify(bare, bare) == 2 and "--hf-reference" in capsys.readouterr().err
    assert verify(bare, bare, "--no-logits", "--hf-reference", pristine / "qwen3") == 0
    assert open_tensors(bare, HFFolder(pristine / "qwen3")).shape(UP) == (96, 64)


def test_a_tied_config_beside_another_output_matrix_is_different(pristine, tmp_path, capsys):
    # transformers uses both matrices; a converter that drops one must not be confirmed.

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.01

    other = changed(pristine / "qwen3", tmp_path / "other", add_head)
    assert verify(pristine / "qwen3-megatron", other) == 1
    assert "lm_head.weight: missing from the first" in capsys.readouterr().out
    assert there(other, tmp_path / "converted") == 2
    assert "lm_head.weight differs from model.embed_tokens.weight" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_folders_are_read_as_transformers_loads_them(tmp_path, family):
    """In several shards, in bf16; the names are those that transformers saves."""
    model = make_model(family, tied=False, vocab_size=261).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    read = TransformersTensors(tmp_path)
    stored = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    assert set(read.names()) == set(stored)
    for name, tensor in stored.items():
        assert (read.shape(name), read.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(read.tensor(name), tensor)


def test_a_layer_at_a_time_is_in_memory(tmp_path):
    """No part holds more than one layer, or the matrices outside the layers."""
    make_model("qwen3", vocab_size=261, layers=4).save_pretrained(tmp_path)
    read = TransformersTensors(tmp_path)
    for name in read.names():
        read.tensor(name)
        assert len({layer_of(each) for each in read._last[1]}) == 1
        assert all(parameter.is_meta for parameter in read._reference.model.parameters())


NAN, INF = float("nan"), float("inf")


@each_row(
    "first, second, expected",
    [
        ([1.0, 2.0], [1.0, 2.5], (0.5, 0.25, 1)),
        ([0.0, 0.0], [0.0, 3.0], (3.0, INF, 1)),
        ([NAN, 1.0], [NAN, 1.0], None),
        ([INF, 1.0], [INF, 1.0], None),
        ([NAN, 1.0], [0.0, 1.0], (INF, INF, 1)),
        ([INF, 1.0], [-INF, 2.0], (INF, INF, 2)),
        ([0.0], [-0.0], None),
    ],
)
def test_difference(first, second, expected):
    found = difference("x", torch.tensor(first), torch.tensor(second))
    if expected is None:
        assert found is None
    else:
        assert (found.largest, found.relative, found.elements) == expected
