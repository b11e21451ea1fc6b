"""Test model families: reading config.json, refusals, and the tensors that transformers saves."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tables import each_row
from tiny import FAMILIES, LLAMA3, make_model, save_folder
from transformers import AutoConfig

from megatron_srpo.config.schema import ModelSection, ParallelSection
from megatron_srpo.model.architecture import RopeScaling
from megatron_srpo.model.families import architecture_from_dict, architecture_of, families
from megatron_srpo.model.hf_folder import FolderError, HFFolder
from megatron_srpo.model.settings import transformer_config


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Return family → config.json of a tiny untied model of two layers."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        save_folder(root / family, family=family, tied=False, layers=2)
    return root, {family: json.loads((root / family / "config.json").read_text()) for family in FAMILIES}


def changed(config: dict, **changes) -> dict:
    """Set keys; None deletes them."""
    merged = {**config, **changes}
    return {key: value for key, value in merged.items() if key not in changes or value is not None}


def refusal(tmp_path, config: dict) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError) as caught:
        _ = HFFolder(tmp_path).architecture
    assert "config.json" in str(caught.value)
    return str(caught.value)


def test_every_family_is_tested():
    # One entry in tiny.FAMILIES for each file in model/families/.
    assert set(families()) == set(FAMILIES)


@pytest.mark.parametrize("family", families())
def test_tensors_are_those_that_transformers_saves(configs, family):
    root, _ = configs
    saved = load_file(root / family / "model.safetensors")
    folder = HFFolder(root / family)
    assert folder.architecture.tensor_shapes() == {name: tuple(t.shape) for name, t in saved.items()}
    assert set(folder.file_of) == set(saved)
    architecture, found = folder.architecture, {}  # stored_tensors: the embedded engine copies into these
    for name, parameter in make_model(family, tied=False, layers=2).named_parameters():
        found |= architecture.stored_tensors(name, parameter)
    assert set(found) == set(saved)
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


def test_an_architecture_comes_back_from_json(configs):
    for family in families():
        architecture = architecture_of(configs[1][family])
        text = json.dumps(dataclasses.asdict(architecture))
        assert architecture_from_dict(json.loads(text)) == architecture


def test_an_architecture_of_an_older_run_folder(configs):
    # It names the parts of the layers and not the family.
    for family, norm, bias in (("qwen3", True, False), ("qwen2", False, True), ("llama", False, False)):
        architecture = architecture_of(configs[1][family])
        older = dataclasses.asdict(architecture) | {"qk_norm": norm, "qkv_bias": bias}
        older.pop("model_type")
        assert architecture_from_dict(older) == architecture


EXPERTS = dict(model_type="qwen3_moe", head_dim=128, num_experts=128, num_experts_per_tok=8)


def sizes(vocabulary, hidden, ffn, layers, heads, groups):
    """Return the sizes under their names in config.json."""
    widths = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers)
    heads_ = dict(num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=40960)
    return widths | heads_


PUBLISHED = {
    "Llama-3.1-8B": (
        8_030_261_248,
        dict(model_type="llama", rope_scaling=LLAMA3) | sizes(128256, 4096, 14336, 32, 32, 8),
    ),
    "Mistral-7B-v0.3": (
        7_248_023_552,
        dict(model_type="mistral", sliding_window=None) | sizes(32768, 4096, 14336, 32, 32, 8),
    ),
    "Qwen2.5-7B": (7_615_616_512, dict(model_type="qwen2") | sizes(152064, 3584, 18944, 28, 28, 4)),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        dict(EXPERTS, moe_intermediate_size=768) | sizes(151936, 2048, 6144, 48, 32, 4),
    ),
    "Qwen3-235B-A22B": (
        235_093_634_560,
        dict(EXPERTS, moe_intermediate_size=1536) | sizes(151936, 4096, 12288, 94, 64, 4),
    ),
}


@each_row("model", list(PUBLISHED))
def test_published_models_have_their_number_of_parameters(model):
    parameters, config = PUBLISHED[model]
    assert sum(map(math.prod, architecture_of(config).tensor_shapes().values())) == parameters


OPTIONAL = ("rms_norm_eps", "tie_word_embeddings", "rope_parameters", "head_dim", "norm_topk_prob")
OPTIONAL += ("hidden_act", "attention_bias")


@pytest.mark.parametrize("family", families())
def test_absent_keys_have_transformers_defaults(configs, tmp_path, family):
    absent = [*OPTIONAL] + ["num_key_value_heads"] * (family in ("llama", "mistral"))
    config = changed(configs[1][family], **dict.fromkeys(absent))
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = architecture_of(config), AutoConfig.from_pretrained(tmp_path)
    assert (ours.rms_norm_eps, ours.tie_word_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", False)


def test_experts(configs):
    # transformers 5 writes num_local_experts; the folders on the hub say num_experts.
    moe = configs[1]["qwen3_moe"]
    for changes in ({}, {"num_local_experts": None, "num_experts": 8}):
        a = architecture_of(changed(moe, **changes))
        assert (a.num_experts, a.num_experts_per_tok, a.moe_intermediate_size) == (8, 3, 48)
        assert a.norm_topk_prob
    assert architecture_of(configs[1]["qwen2"]).num_experts == 0


def test_llama3_rope(configs):
    # Under transformers 5's key, and under the older one with the base frequency next to it.
    config = changed(configs[1]["llama"], rope_parameters=None)
    for key in ("rope_parameters", "rope_scaling"):
        architecture = architecture_of(config | {key: LLAMA3, "rope_theta": 5e5})
        assert architecture.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64) and architecture.rope_theta == 5e5


def test_a_window_over_all_positions_is_none(configs):
    for window in (None, 1024, 4096):
        config = configs[1]["mistral"] | {"sliding_window": window}
        assert architecture_of(config).max_position_embeddings == 1024


def test_an_absent_window_is_transformers_default(configs, tmp_path):
    config = changed(configs[1]["mistral"], sliding_window=None)
    architecture_of(config)
    message = refusal(tmp_path, config | {"max_position_embeddings": 32768})
    assert "sliding_window is 4096, max_position_embeddings 32768" in message


@each_row(
    "family, changes, named",
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3_moe", {"num_local_experts": None}, "missing num_experts"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1, expected bool"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but num_experts is 8"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        (
            "llama",
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3, expected a divisor of num_attention",
        ),
        ("llama", {"head_dim": 15}, "head_dim is 15"),
        ("llama", {"rope_parameters": {**LLAMA3, "factor": None}}, "missing factor"),
        ("llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": "four"}}, "high_freq_factor is 'four'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ("mistral", {"sliding_window": 1023}, "sliding_window is 1023, max_position_embeddings 1024"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window is 'wide'"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "yarn"),
        ("qwen3", {"rope_parameters": "yarn"}, "rope_parameters"),
        ("qwen3", {"layer_types": 5}, "layer_types"),
        ("qwen3", {"model_type": ["qwen3"]}, "model_type"),
        (
            "qwen3",
            {"model_type": "mamba"},
            "model_type is 'mamba'; supported: llama, mistral, qwen2, qwen3, qwen3",
        ),
        ("qwen3", {"model_type": None}, "model_type is None"),
        ("qwen3", {"num_attention_heads": 0}, "num_attention_heads is 0, expected a number above 0"),
        ("qwen3", {"num_hidden_layers": "four"}, "num_hidden_layers is 'four', expected int"),
        ("qwen3", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("qwen3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("qwen3", {"num_key_value_heads": None, "vocab_size": None}, "vocab_size, num_key_value_heads"),
    ],
)
def test_what_our_layers_do_not_compute(configs, tmp_path, family, changes, named):
    assert named in refusal(tmp_path, changed(configs[1][family], **changes))


@pytest.mark.parametrize(
    "family, has_bias, has_norm, head_dim",
    [
        ("qwen3", False, True, 16),
        ("qwen2", True, False, 8),
        ("llama", False, False, 8),
        ("mistral", False, False, 24),
        ("qwen3_moe", False, True, 16),
    ],
)
def test_transformer_config_of_families(configs, family, has_bias, has_norm, head_dim):
    core = transformer_config(
        architecture_of(configs[1][family]), ModelSection(hf_path="x"), ParallelSection(), {}
    )
    assert (core.add_qkv_bias, core.qk_layernorm, core.kv_channels) == (has_bias, has_norm, head_dim)
    assert (core.num_layers, core.hidden_size, core.ffn_hidden_size) == (2, 64, 96)
    assert (core.num_attention_heads, core.num_query_groups, core.layernorm_epsilon) == (8, 4, 1e-6)
    assert not core.add_bias_linear and core.gated_linear_unit


@pytest.mark.parametrize("renormalised", [True, False])
def test_transformer_config_of_experts(configs, renormalised):
    architecture = architecture_of(configs[1]["qwen3_moe"] | {"norm_topk_prob": renormalised})
    parallel = ParallelSection(expert_model_parallel_size=2)
    core = transformer_config(architecture, ModelSection(hf_path="x"), parallel, {})
    assert (core.num_moe_experts, core.moe_router_topk, core.moe_ffn_hidden_size) == (8, 3, 48)
    assert (core.moe_router_pre_softmax, core.moe_router_load_balancing_type) == (not renormalised, "none")
    assert core.moe_expert_capacity_factor is None and core.expert_model_parallel_size == 2
