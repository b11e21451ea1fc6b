"""Model folders that are not as they should be, one fault at a time, and what the messages name."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LLAMA3, make_model, make_tokenizer, save_folder
from transformers import AutoConfig

from megatron_srpo.config.schema import Config, ConfigError, ParallelSection
from megatron_srpo.distributed.layout import data_parallel_size
from megatron_srpo.model.build import check_layout, padded_vocab_size, transformer_config
from megatron_srpo.model.hf_folder import HFFolder, RopeScaling


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """One good folder per kind: tied in one file, untied in two shards with an index."""
    root = tmp_path_factory.mktemp("pristine")
    save_folder(root / "tied")
    make_model(tied=False).save_pretrained(root / "untied", max_shard_size="400KB")
    make_tokenizer().save_pretrained(root / "untied")
    return root


@pytest.fixture
def tied(pristine, tmp_path):
    """A copy to damage."""
    return shutil.copytree(pristine / "tied", tmp_path / "tied")


@pytest.fixture
def untied(pristine, tmp_path):
    """A sharded copy to damage."""
    return shutil.copytree(pristine / "untied", tmp_path / "untied")


def edit_json(file, **changes):
    """Sets keys; None deletes them."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    file.write_text(json.dumps(content))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(read) -> str:
    with pytest.raises(ConfigError) as caught:
        read()
    return str(caught.value)


def config_with(folder="x", **sections) -> Config:
    return Config(model={"hf_path": folder}, train={"steps": 1}, logging={"dir": "x"}, **sections)


# ---- good folders
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, tie", [("tied", True), ("untied", False)])
def test_good_folder(pristine, kind, tie):
    folder = HFFolder(pristine / kind)
    architecture = folder.architecture
    assert (architecture.vocab_size, architecture.hidden_size, architecture.intermediate_size) == (
        270,
        64,
        96,
    )
    assert (
        architecture.num_hidden_layers,
        architecture.num_attention_heads,
        architecture.num_key_value_heads,
    ) == (4, 8, 4)
    assert (architecture.head_dim, architecture.rms_norm_eps, architecture.rope_theta) == (16, 1e-6, 1e6)
    assert (architecture.max_position_embeddings, architecture.tie_word_embeddings) == (1024, tie)
    assert folder.stop_ids == (2,)
    parameters = dict(make_model(tied=tie).named_parameters())
    assert architecture.tensor_shapes() == {
        name: tuple(parameter.shape) for name, parameter in parameters.items()
    }
    assert set(folder.file_of) == set(parameters)
    for name, file in folder.file_of.items():
        assert torch.equal(load_file(file)[name], parameters[name])


def test_the_untied_folder_is_sharded(pristine):
    assert len(set(HFFolder(pristine / "untied").file_of.values())) >= 2


def test_tied_folder_may_hold_a_copy_of_the_embedding(tied):
    edit_tensors(
        tied / "model.safetensors",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    assert "lm_head.weight" not in HFFolder(tied).file_of


def test_encode_is_the_template_with_header(pristine):
    folder = HFFolder(pristine / "tied")
    text = folder.tokenizer.decode(folder.encode([{"role": "user", "content": "Ünï?"}]))
    assert text == "<|im_start|>user\nÜnï?<|im_end|>\n<|im_start|>assistant\n"


def test_encode_passes_enable_thinking(tied):
    (tied / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{% if enable_thinking %}T{% else %}N{% endif %}"
    )
    folder = HFFolder(tied)
    decode = folder.tokenizer.decode
    assert decode(folder.encode([{"role": "user", "content": "a"}])) == "aN"
    assert decode(folder.encode([{"role": "user", "content": "a"}], enable_thinking=True)) == "aT"


@pytest.mark.parametrize("given, expected", [([1, 2], (1, 2)), (0, (0, 2)), (None, (2,))])
def test_stop_ids(tied, given, expected):
    edit_json(tied / "generation_config.json", eos_token_id=given)
    assert HFFolder(tied).stop_ids == expected


def test_generation_config_that_is_no_object(tied):
    (tied / "generation_config.json").write_text("[]")
    assert "generation_config.json" in refusal(lambda: HFFolder(tied).stop_ids)


def test_rope_theta_of_older_folders(tied):
    """Before transformers 5 rope_theta stood at the top level."""
    edit_json(tied / "config.json", rope_parameters=None, rope_theta=5e5, rope_scaling=None)
    assert HFFolder(tied).architecture.rope_theta == 5e5


# ---- families
# --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_of(tmp_path):
    """folder_of(family, **changes of config.json): an untied folder of that family."""

    def make(family, **changes):
        path = save_folder(tmp_path / family, family=family, tied=False, layers=2)
        edit_json(path / "config.json", **changes)
        return path

    return make


@pytest.mark.parametrize("family", list(FAMILIES))
def test_tensors_are_those_that_transformers_saves(folder_of, family):
    path = folder_of(family)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(path / "model.safetensors").items()}
    folder = HFFolder(path)
    assert folder.architecture.tensor_shapes() == saved and set(folder.file_of) == set(saved)


def sizes(vocabulary, hidden, ffn, layers, heads, groups):
    """As config.json names them."""
    widths = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers)
    return {
        **widths,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 40960,
    }


EXPERTS = dict(model_type="qwen3_moe", head_dim=128, num_experts=128, num_experts_per_tok=8)
PUBLISHED = {
    "Llama-3.1-8B": (
        8_030_261_248,
        dict(model_type="llama", rope_scaling=LLAMA3) | sizes(128256, 4096, 14336, 32, 32, 8),
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


@pytest.mark.parametrize("model", list(PUBLISHED))
def test_published_models_have_their_number_of_parameters(tmp_path, model):
    parameters, config = PUBLISHED[model]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sum(map(math.prod, HFFolder(tmp_path).architecture.tensor_shapes().values())) == parameters


@pytest.mark.parametrize("family", list(FAMILIES))
def test_absent_keys_have_transformers_defaults(folder_of, family):
    optional = [
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        "head_dim",
        "norm_topk_prob",
        "hidden_act",
        "attention_bias",
    ]
    path = folder_of(family, **dict.fromkeys(optional + ["num_key_value_heads"] * (family == "llama")))
    ours, theirs = HFFolder(path).architecture, AutoConfig.from_pretrained(path)
    assert (ours.rms_norm_eps, ours.tie_word_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None
    assert ours.head_dim == (
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    )
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", False)


def test_experts(folder_of):
    """transformers 5 writes num_local_experts; the folders on the hub say num_experts."""
    for changes in ({}, {"num_local_experts": None, "num_experts": 8}):
        a = HFFolder(folder_of("qwen3_moe", **changes)).architecture
        assert (a.num_experts, a.num_experts_per_tok, a.moe_intermediate_size, a.norm_topk_prob) == (
            8,
            3,
            48,
            True,
        )
    assert HFFolder(folder_of("qwen2")).architecture.num_experts == 0


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_llama3_rope(folder_of, key):
    """Under transformers 5's key and the older one, where the base frequency stood beside it."""
    path = folder_of("llama", rope_parameters=None)
    edit_json(path / "config.json", **{key: LLAMA3}, rope_theta=5e5)
    architecture = HFFolder(path).architecture
    assert architecture.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64) and architecture.rope_theta == 5e5


@pytest.mark.parametrize(
    "family, changes, named",
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3_moe", {"num_local_experts": None}, "missing num_experts"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1, expected bool"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but num_experts is 8"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        (
            "llama",
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3, expected a divisor of num_attention_heads (8)",
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
    ],
)
def test_what_our_layers_do_not_compute(folder_of, family, changes, named):
    path = folder_of(family, **changes)
    message = refusal(lambda: HFFolder(path).architecture)
    assert "config.json" in message and named in message


# ---- config.json
# -----------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path):
    message = refusal(lambda: HFFolder(tmp_path / "nowhere"))
    assert "model.hf_path" in message and str(tmp_path / "nowhere") in message


def test_file_instead_of_folder(tied):
    assert "is not a folder" in refusal(lambda: HFFolder(tied / "config.json"))


def test_missing_config(tied):
    (tied / "config.json").unlink()
    assert "config.json is missing" in refusal(lambda: HFFolder(tied).architecture)


@pytest.mark.parametrize("content", ["", '{"model_type": "qwen3",', "not json", "\udcff"])
def test_broken_config(tied, content):
    (tied / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert "config.json cannot be read" in refusal(lambda: HFFolder(tied).architecture)


@pytest.mark.parametrize("content", ["[]", "5", "null", '"qwen3"'])
def test_config_that_is_no_object(tied, content):
    (tied / "config.json").write_text(content)
    assert "config.json" in refusal(lambda: HFFolder(tied).architecture)


@pytest.mark.parametrize("model_type", ["mistral", "qwen3_next", None])
def test_foreign_model_type(tied, model_type):
    edit_json(tied / "config.json", model_type=model_type)
    message = refusal(lambda: HFFolder(tied).architecture)
    assert "config.json" in message and repr(model_type) in message and "qwen3" in message


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "yarn"),
        ({"rope_parameters": "yarn"}, "rope_parameters"),
        ({"layer_types": 5}, "layer_types"),
        ({"model_type": ["qwen3"]}, "model_type"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a number above 0"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": None, "vocab_size": None}, "vocab_size, num_key_value_heads"),
    ],
)
def test_unsupported_config(tied, changes, named):
    edit_json(tied / "config.json", **changes)
    message = refusal(lambda: HFFolder(tied).architecture)
    assert "config.json" in message and named in message


def test_number_that_is_no_number(tied):
    edit_json(tied / "config.json", num_hidden_layers="four")
    assert "num_hidden_layers" in refusal(lambda: HFFolder(tied).file_of)


# ---- tensors
# ---------------------------------------------------------------------------------------------------------


def test_no_weights(tied):
    (tied / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(lambda: HFFolder(tied).file_of)


def test_missing_shard(untied):
    shard = sorted(untied.glob("model-*.safetensors"))[-1]
    shard.unlink()
    message = refusal(lambda: HFFolder(untied).file_of)
    assert f"{shard} is missing" in message and "model.safetensors.index.json" in message


def test_broken_index(untied):
    (untied / "model.safetensors.index.json").write_text('{"weight_map": {')
    assert "model.safetensors.index.json cannot be read" in refusal(lambda: HFFolder(untied).file_of)
    for weight_map in ("[1]", '{"a": 5}', "null"):
        (untied / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
        assert "model.safetensors.index.json: weight_map is not" in refusal(lambda: HFFolder(untied).file_of)


def test_missing_tensor(tied):
    name = "model.layers.2.self_attn.q_norm.weight"
    edit_tensors(tied / "model.safetensors", lambda tensors: tensors.pop(name))
    assert f"{name} is missing" in refusal(lambda: HFFolder(tied).file_of)


def test_missing_output_matrix(untied):
    for file in untied.glob("model-*.safetensors"):
        edit_tensors(file, lambda tensors: tensors.pop("lm_head.weight", None))
    assert "lm_head.weight is missing" in refusal(lambda: HFFolder(untied).file_of)


def test_wrong_shape(tied):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tied / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(95, 64)}))
    message = refusal(lambda: HFFolder(tied).file_of)
    assert (
        name in message and "[95, 64]" in message and "[96, 64]" in message and "model.safetensors" in message
    )


def test_config_that_disagrees_with_the_weights(tied):
    edit_json(tied / "config.json", num_key_value_heads=2)
    message = refusal(lambda: HFFolder(tied).file_of)
    assert (
        "model.layers.0.self_attn.k_proj.weight" in message
        and "[64, 64]" in message
        and "[32, 64]" in message
    )


def test_unexpected_tensor(tied):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(tied / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(128)}))
    message = refusal(lambda: HFFolder(tied).file_of)
    assert f"unexpected tensor {name}" in message and "model.safetensors" in message


def test_more_layers_than_config_says(tied):
    edit_json(tied / "config.json", num_hidden_layers=3)
    assert "unexpected tensor model.layers.3." in refusal(lambda: HFFolder(tied).file_of)


@pytest.mark.parametrize("keep", [0, 4, 200, -1000])
def test_truncated_safetensors(tied, keep):
    file = tied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(lambda: HFFolder(tied).file_of)
    assert str(file) in message and "damaged" in message


def test_safetensors_that_is_something_else(tied):
    (tied / "model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n" * 10
    )
    assert "damaged" in refusal(lambda: HFFolder(tied).file_of)


# ---- tokenizer
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", None])
def test_no_tokenizer(tied, kind):
    """transformers makes up an empty Qwen2Tokenizer for such folders, which encodes every word to nothing."""
    (tied / "tokenizer.json").unlink()
    if kind is None:
        (tied / "tokenizer_config.json").unlink()
    else:
        edit_json(tied / "tokenizer_config.json", tokenizer_class=kind)
    assert str(tied) in refusal(lambda: HFFolder(tied).tokenizer)


@pytest.mark.parametrize(
    "file, content", [("tokenizer.json", "{}"), ("tokenizer.json", "[]"), ("tokenizer_config.json", "[]")]
)
def test_tokenizer_files_that_hold_something_else(tied, file, content):
    (tied / file).write_text(content)
    assert str(tied) in refusal(lambda: HFFolder(tied).tokenizer)


def test_truncated_tokenizer(tied):
    file = tied / "tokenizer.json"
    file.write_text(file.read_text()[:500])
    assert "tokenizer" in refusal(lambda: HFFolder(tied).tokenizer)


def test_tokenizer_larger_than_the_embedding(tmp_path):
    save_folder(tmp_path / "small", vocab_size=258)
    message = refusal(lambda: HFFolder(tmp_path / "small").tokenizer)
    assert "259" in message and "258" in message


def test_tokenizer_as_large_as_the_embedding(tmp_path):
    save_folder(tmp_path / "exact", vocab_size=259)
    assert len(HFFolder(tmp_path / "exact").tokenizer) == 259


def test_no_chat_template(tied):
    (tied / "chat_template.jinja").unlink()
    assert "chat template" in refusal(lambda: HFFolder(tied).tokenizer)


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no system messages') }}"])
def test_chat_template_that_cannot_be_applied(tied, template):
    (tied / "chat_template.jinja").write_text(template)
    assert "the chat template cannot be applied" in refusal(
        lambda: HFFolder(tied).encode([{"role": "user", "content": "x"}])
    )


def test_no_end_of_sequence_token(tied):
    edit_json(tied / "tokenizer_config.json", eos_token=None)
    assert "end-of-sequence" in refusal(lambda: HFFolder(tied).tokenizer)


# ---- layouts and TransformerConfig
# -----------------------------------------------------------------------------------


def parallel(tensor=1, pipeline=1, virtual=None, **more):
    return {
        **more,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
    }


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (1, 2, 2), (2, 2)])
def test_layouts_that_divide(pristine, sizes):
    check_layout(HFFolder(pristine / "tied").architecture, config_with(parallel=parallel(*sizes)))


@pytest.mark.parametrize(
    "sizes, named",
    [
        ((3, 1), ["tensor_model_parallel_size: 3", "num_attention_heads", "8"]),
        ((8, 1), ["tensor_model_parallel_size: 8", "num_key_value_heads", "4"]),
        ((1, 3), ["pipeline_model_parallel_size", "4 layers", "3 stages"]),
        ((1, 2, 3), ["pipeline_model_parallel_size", "4 layers", "6 stages"]),
        ((1, 8), ["pipeline_model_parallel_size", "4 layers", "8 stages"]),
    ],
)
def test_layouts_that_do_not_divide(pristine, sizes, named):
    architecture = HFFolder(pristine / "tied").architecture
    message = refusal(lambda: check_layout(architecture, config_with(parallel=parallel(*sizes))))
    assert all(part in message for part in named)


@pytest.mark.parametrize(
    "family, sizes, named",
    [
        (
            "qwen3_moe",
            dict(expert_model_parallel_size=3),
            ["expert_model_parallel_size: 3", "num_experts", "8"],
        ),
        (
            "qwen3_moe",
            dict(expert_model_parallel_size=2, expert_tensor_parallel_size=5),
            ["expert_tensor_parallel_size: 5", "moe_intermediate_size", "48"],
        ),
        ("qwen3_moe", dict(tensor=2), ["parallel.sequence_parallel", "set it to true"]),
        ("qwen3", dict(expert_model_parallel_size=2), ["expert_model_parallel_size: 2", "no experts"]),
    ],
)
def test_experts_that_do_not_divide(folder_of, family, sizes, named):
    architecture = HFFolder(folder_of(family)).architecture
    message = refusal(lambda: check_layout(architecture, config_with(parallel=parallel(**sizes))))
    assert all(part in message for part in named)


def test_experts_that_divide(folder_of):
    architecture = HFFolder(
        folder_of("qwen3_moe", intermediate_size=97)
    ).architecture  # no layer has this width
    sizes = parallel(
        tensor=4, sequence_parallel=True, expert_model_parallel_size=8, expert_tensor_parallel_size=3
    )
    check_layout(architecture, config_with(parallel=sizes))


@pytest.mark.parametrize("world, data", [(8, 4), (16, 8)])
def test_experts_are_shared_out_over_data_parallel_ranks(world, data):
    sizes = ParallelSection(
        tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=4
    )
    assert data_parallel_size(sizes, world) == data
    message = refusal(lambda: data_parallel_size(sizes, 12))
    assert (
        "expert_tensor_parallel_size × expert_model_parallel_size" in message
        and "= 8" in message
        and "12 processes" in message
    )


@pytest.mark.parametrize(
    "tensor, divisor, expected",
    [(1, 1, 270), (1, 16, 272), (2, 16, 288), (4, 16, 320), (2, 128, 512), (2, 135, 270)],
)
def test_padded_vocabulary(pristine, tensor, divisor, expected):
    config = config_with(parallel=parallel(tensor))
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"make_vocab_size_divisible_by": divisor})}
    )
    assert padded_vocab_size(HFFolder(pristine / "tied").architecture, config) == expected


def test_transformer_config_is_the_architecture(pristine):
    core = transformer_config(
        HFFolder(pristine / "tied").architecture, config_with(megatron={"recompute_granularity": "selective"})
    )
    assert (core.num_layers, core.hidden_size, core.ffn_hidden_size, core.kv_channels) == (4, 64, 96, 16)
    assert (core.num_attention_heads, core.num_query_groups, core.layernorm_epsilon) == (8, 4, 1e-6)
    assert (core.add_bias_linear, core.add_qkv_bias, core.qk_layernorm, core.gated_linear_unit) == (
        False,
        False,
        True,
        True,
    )
    assert (core.hidden_dropout, core.attention_dropout, core.calculate_per_token_loss) == (0, 0, True)
    assert core.recompute_granularity == "selective"


@pytest.mark.parametrize(
    "family, has_bias, has_norm",
    [("qwen2", True, False), ("llama", False, False), ("qwen3_moe", False, True)],
)
def test_transformer_config_of_families(folder_of, family, has_bias, has_norm):
    core = transformer_config(HFFolder(folder_of(family)).architecture, config_with())
    assert (core.add_qkv_bias, core.qk_layernorm, core.kv_channels) == (
        has_bias,
        has_norm,
        16 if family == "qwen3_moe" else 8,
    )


@pytest.mark.parametrize("renormalised", [True, False])
def test_transformer_config_of_experts(folder_of, renormalised):
    architecture = HFFolder(folder_of("qwen3_moe", norm_topk_prob=renormalised)).architecture
    core = transformer_config(architecture, config_with(parallel={"expert_model_parallel_size": 2}))
    assert (core.num_moe_experts, core.moe_router_topk, core.moe_ffn_hidden_size) == (8, 3, 48)
    assert (core.moe_router_pre_softmax, core.moe_router_load_balancing_type) == (not renormalised, "none")
    assert core.moe_expert_capacity_factor is None and core.expert_model_parallel_size == 2
    for key, value in (
        ("moe_aux_loss_coeff", 0.01),
        ("moe_z_loss_coeff", 1e-3),
        ("moe_router_load_balancing_type", "aux_loss"),
    ):
        message = refusal(lambda: transformer_config(architecture, config_with(megatron={key: value})))  # noqa: B023
        assert f"megatron.{key}" in message and "router losses" in message


@pytest.mark.parametrize(
    "settings, named",
    [
        (
            {"recompute_granularty": "full"},
            ["megatron.recompute_granularty", "did you mean recompute_granularity?"],
        ),
        ({"zzzzzz": 1}, ["megatron.zzzzzz", "no such field"]),
        ({"num_layers": 2}, ["megatron.num_layers", "cannot be set here"]),
        ({"attention_dropout": 0.1}, ["megatron.attention_dropout", "depend on how the batch is split"]),
        ({"tensor_model_parallel_size": 2}, ["megatron.tensor_model_parallel_size", "cannot be set here"]),
        ({"calculate_per_token_loss": False}, ["megatron.calculate_per_token_loss", "cannot be set here"]),
        ({"bf16": True}, ["megatron.bf16", "cannot be set here"]),
        ({"cuda_graph_impl": "local"}, ["megatron.cuda_graph_impl", "packed sequences"]),
        ({"recompute_granularity": "sometimes"}, ["megatron", "recompute"]),
    ],
)
def test_megatron_section(pristine, settings, named):
    architecture = HFFolder(pristine / "tied").architecture
    message = refusal(lambda: transformer_config(architecture, config_with(megatron=settings)))
    assert all(part in message for part in named)


def test_small_numbers_in_the_megatron_section_are_numbers(pristine, tmp_path):
    """`1e-2` without a dot is text to YAML; every other section takes it as the number it is."""
    from megatron_srpo.config.load import load_config

    file = tmp_path / "config.yaml"
    file.write_text(
        "model: {hf_path: x}\ntrain: {steps: 1}\nlogging: {dir: x}\nmegatron:\n  init_method_std: 1e-2\n"
    )
    core = transformer_config(HFFolder(pristine / "tied").architecture, load_config(file, []))
    assert core.init_method_std == 0.01
