"""Test converted checkpoints against megatron-core, in both directions.

It loads what we write at any layout, and we read what it saves.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from launch import launch
from safetensors.torch import load_file
from tiny import FAMILIES, make_model, save_folder
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_srpo.distributed.processes import Processes
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights.convert import to_hf, to_megatron
from megatron_srpo.weights.sources import HFTensors, MegatronTensors

TP2, PP2, VPP2, EP2, SP = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.virtual_pipeline_model_parallel_size=2",
    "parallel.expert_model_parallel_size=2",
    "parallel.sequence_parallel=true",
)
ONE = Processes(rank=0, world_size=1)
MODELS = {name: dict(family=name, tied=False) for name in FAMILIES} | {
    "qwen3-tied": dict(family="qwen3", tied=True)
}
DENSE = [family for family in FAMILIES if "num_experts" not in FAMILIES[family][1]]
# layout → (overrides, the models it loads, those it saves as well); the rest of the four processes are data
# parallel
LAYOUTS = {
    "tp1": ([], ["qwen3"], []),
    "pp2-vpp2": ([PP2, VPP2], ["qwen3-tied"], ["qwen3-tied"]),
    "tp2-pp2": ([TP2, PP2], [*DENSE, "qwen3-tied"], DENSE),
    "ep2": ([EP2], ["qwen3_moe"], ["qwen3_moe"]),
    "tp2-sp-ep2": ([TP2, SP, EP2], ["qwen3_moe"], ["qwen3_moe"]),
}
LAYER_BY_LAYER = ("ep2",)  # saved with keys for each layer
LOADED = [(layout, model) for layout, (_, models, _) in LAYOUTS.items() for model in models]
SAVED = [(layout, model) for layout, (_, _, models) in LAYOUTS.items() for model in models]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with hf-MODEL, converted-MODEL and one launch's results.

    The results are LAYOUT-MODEL.json and saved-LAYOUT-MODEL.
    """
    root = tmp_path_factory.mktemp("convert")
    (root / "config.yaml").write_text(
        "model: {hf_path: set, dtype: float32}\ntrain: {steps: 1}\nlogging: {dir: unused}\n"
    )
    for model, options in MODELS.items():
        folder = HFFolder(
            save_folder(root / f"hf-{model}", make_model(vocab_size=261, **options))
        )  # padded to 272, 288 at TP 2
        to_megatron(HFTensors(folder), folder, root / f"converted-{model}", ONE)
    jobs = [
        {
            "config": str(root / "config.yaml"),
            "overrides": [f"model.hf_path={root / f'hf-{model}'}", *LAYOUTS[layout][0]],
            "checkpoint": str(root / f"converted-{model}"),
            "save": str(root / f"saved-{layout}-{model}") if (layout, model) in SAVED else None,
            "stacked": layout not in LAYER_BY_LAYER,
            "output": str(root / f"{layout}-{model}.json"),
        }
        for layout, model in LOADED
    ]
    launch(4, "convert_worker.py", jobs, root / "jobs.json")
    return root


@pytest.mark.parametrize("layout, model", LOADED)
def test_megatron_loads_what_we_write(world, layout, model):
    # Bit for bit what weights/transfer.load reads from the HF folder, padding included, on each of the four
    # ranks.
    reports = json.loads((world / f"{layout}-{model}.json").read_text())
    assert [report["wrong"] for report in reports] == [[]] * 4
    assert all(report["compared"] > 10 and report["unexpected"] == [] for report in reports)


@pytest.mark.parametrize("layout, model", SAVED)
def test_we_read_what_megatron_saves(world, tmp_path, layout, model):
    # The resulting folder holds the tensors of the folder that the model was loaded from, bit for bit.
    reference, saved = HFFolder(world / f"hf-{model}"), world / f"saved-{layout}-{model}"
    keys = FileSystemReader(saved).read_metadata().state_dict_metadata
    assert any(key.startswith("decoder.layers.0.") for key in keys) == (layout in LAYER_BY_LAYER)
    to_hf(MegatronTensors(saved, reference.architecture), reference, tmp_path / "out", ONE)
    expected, got = (load_file(folder / "model.safetensors") for folder in (reference.path, tmp_path / "out"))
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("layout, model", [pair for pair in SAVED if pair[0] not in LAYER_BY_LAYER])
def test_names_shapes_and_dtypes_are_megatrons(world, layout, model):
    # As torch reads the metadata of either. Only the vocabulary's padding may differ; ours has more empty
    # objects, never fewer.
    theirs, ours = (
        FileSystemReader(world / name).read_metadata().state_dict_metadata
        for name in (f"saved-{layout}-{model}", f"converted-{model}")
    )
    tensors = [name for name, entry in theirs.items() if isinstance(entry, TensorStorageMetadata)]
    assert sorted(tensors) == sorted(
        name for name, entry in ours.items() if isinstance(entry, TensorStorageMetadata)
    )
    assert {name for name in theirs if not name.startswith("common_state/")} <= set(
        ours
    )  # 0.16 writes common.pt
    for name in tensors:
        vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        assert ours[name].size[vocabulary:] == theirs[name].size[vocabulary:], name
        assert ours[name].properties.dtype == theirs[name].properties.dtype
        assert sum(math.prod(chunk.sizes) for chunk in ours[name].chunks) == math.prod(ours[name].size)
