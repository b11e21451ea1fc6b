"""Test weights from Hugging Face and back at several layouts.

Logits equal transformers', exports are bit-exact.
"""

from __future__ import annotations

import pytest
import torch
from launch import launch
from safetensors.torch import load_file
from tiny import FAMILIES, make_model, save_folder

TP, PP, VPP, EP, ETP = (
    f"parallel.{name}_parallel_size="
    for name in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "expert_model", "expert_tensor")
)
SP = "parallel.sequence_parallel=true"
# model → how tiny.make_model makes it; 261 rows: padded and uneven shards
MODELS = {family: dict(family=family, tied=False) for family in FAMILIES}
DENSE = [family for family in FAMILIES if "num_experts" not in FAMILIES[family][1]]
MODELS |= {
    "tied": dict(tied=True),
    "not_renormalised": dict(family="qwen3_moe", tied=False, norm_topk_prob=False),
}
# ranks → {layout: (overrides, the models it holds)}
LAYOUTS = {
    1: {"one": ([], list(MODELS))},
    2: {
        "tp2": ([TP + "2"], ["tied"]),
        "tp2-sp": ([TP + "2", SP], ["tied", "qwen3_moe"]),
        "pp2": ([PP + "2"], ["tied"]),
        "pp2-vpp2": ([PP + "2", VPP + "2"], ["tied", "qwen3_moe"]),
        "ep2": ([EP + "2"], ["qwen3_moe"]),
    },
    4: {
        "tp2-pp2": ([TP + "2", PP + "2"], [*DENSE, "tied"]),
        "tp4": ([TP + "4"], ["tied", "qwen2"]),
        "pp2-ep2": ([PP + "2", EP + "2"], ["qwen3_moe"]),
        "tp2-sp-ep2": ([TP + "2", SP, EP + "2"], ["qwen3_moe"]),
        "tp2-sp-ep4-etp1": ([TP + "2", SP, EP + "4", ETP + "1"], ["qwen3_moe"]),
    },
}
PAIRS = [
    (layout, model)
    for layouts in LAYOUTS.values()
    for layout, (_, models) in layouts.items()
    for model in models
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return {model: (HF logits, the folder's own tensors)} and {(layout, model): the ranks' output}."""
    root = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(5)
    # The longest one is beyond the 64 positions of the tiny Llama's own rotary frequencies.
    documents = [torch.randint(0, 261, (length,), generator=generator).tolist() for length in (9, 2, 30, 90)]
    config = root / "config.yaml"
    config.write_text("model: {hf_path: set, dtype: float32}\ntrain: {steps: 1}\nlogging: {dir: unused}\n")
    expected = {}
    for name, options in MODELS.items():
        model = make_model(vocab_size=261, **options)
        folder = save_folder(root / name, model)
        with torch.no_grad():
            logits = torch.cat([model(torch.tensor([ids])).logits[0, :-1] for ids in documents])
        expected[name] = logits, load_file(folder / "model.safetensors")
    for ranks, layouts in LAYOUTS.items():
        jobs = [
            {
                "config": str(config),
                "overrides": [f"model.hf_path={root / model}", *overrides],
                "documents": documents,
                "output": str(root / f"{layout}-{model}.safetensors"),
            }
            for layout, (overrides, models) in layouts.items()
            for model in models
        ]
        launch(ranks, "weights_worker.py", jobs, root / f"jobs-{ranks}.json")
    return expected, {
        (layout, model): load_file(root / f"{layout}-{model}.safetensors") for layout, model in PAIRS
    }


@pytest.mark.parametrize(("layout", "model"), PAIRS)
def test_logits_are_transformers_and_the_export_is_the_import(results, layout, model):
    # Logits in fp32 to 1e-5, of packed documents on shards against one transformers forward pass each. Every
    # tensor of the HF file is exported with the same bits, and no other.
    (logits, tensors), got = results[0][model], results[1][layout, model]
    torch.testing.assert_close(got.pop("logits"), logits, atol=1e-5, rtol=0)
    exported = {name.removeprefix("export."): tensor for name, tensor in got.items()}
    assert set(exported) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(exported[name], tensor), name
