"""Weights from Hugging Face and back at several layouts: logits equal transformers', exports are bit exact."""

from __future__ import annotations

import pytest
import torch
from launch import torchrun
from safetensors.torch import load_file
from tiny import make_model, save_folder

TP, PP, VPP = (f"parallel.{name}_model_parallel_size=" for name in ("tensor", "pipeline", "virtual_pipeline"))
SP = "parallel.sequence_parallel=true"
LAYOUTS = {
    1: {"one": []},
    2: {"tp2": [TP + "2"], "tp2-sp": [TP + "2", SP], "pp2": [PP + "2"], "pp2-vpp2": [PP + "2", VPP + "2"]},
    4: {"tp2-pp2": [TP + "2", PP + "2"], "tp4": [TP + "4"]},
}
NAMES = [layout for layouts in LAYOUTS.values() for layout in layouts]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{(layout, tied): what the ranks wrote}, with {tied: (HF logits, the folder's own tensors)} under "hf"."""
    root = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(0, 261, (length,), generator=generator).tolist() for length in (9, 2, 30, 17)]
    config = root / "config.yaml"
    config.write_text("model: {hf_path: set, dtype: float32}\ntrain: {steps: 1}\nlogging: {dir: unused}\n")
    wanted, expected = {}, {}
    for tied in (True, False):
        model = make_model(tied=tied, vocab_size=261)  # 261 rows: padded and uneven shards
        folder = save_folder(root / f"hf-{tied}", model)
        with torch.no_grad():
            logits = torch.cat([model(torch.tensor([ids])).logits[0, :-1] for ids in documents])
        expected[tied] = logits, load_file(folder / "model.safetensors")
        for ranks, layouts in LAYOUTS.items():
            for layout, overrides in layouts.items():
                output = root / f"{layout}-{tied}.safetensors"
                job = {"config": str(config), "overrides": [f"model.hf_path={folder}", *overrides]}
                wanted.setdefault(ranks, []).append({**job, "documents": documents, "output": str(output)})
    for ranks, jobs in wanted.items():
        torchrun(ranks, "weights_worker.py", jobs, root / f"jobs-{ranks}.json")
    return expected, {(layout, tied): load_file(root / f"{layout}-{tied}.safetensors") for layout in NAMES for tied in (True, False)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", NAMES)
def test_logits_equal_transformers(results, layout, tied):
    """Packed documents on shards against one transformers forward pass a document, fp32, to 1e-5."""
    expected, got = results
    torch.testing.assert_close(got[layout, tied]["logits"], expected[tied][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", NAMES)
def test_import_then_export_is_bit_exact(results, layout, tied):
    """Every tensor of the HF file comes back, the same bits, and no other."""
    expected, got = results
    exported = {name.removeprefix("export."): tensor for name, tensor in got[layout, tied].items() if name != "logits"}
    assert set(exported) == set(expected[tied][1])
    for name, tensor in expected[tied][1].items():
        assert torch.equal(exported[name], tensor), name
