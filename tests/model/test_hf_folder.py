"""Test damaged model folders, one fault at a time, and the messages that name the fault."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer, save_folder

from megatron_srpo.config.base import ConfigError
from megatron_srpo.model.hf_folder import FolderError, HFFolder, naming_key


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Return one good folder per kind: tied in one file, untied in two shards with an index."""
    root = tmp_path_factory.mktemp("pristine")
    save_folder(root / "tied")
    make_model(tied=False).save_pretrained(root / "untied", max_shard_size="400KB")
    make_tokenizer().save_pretrained(root / "untied")
    return root


@pytest.fixture
def tied(pristine, tmp_path):
    """Return a copy to damage."""
    return shutil.copytree(pristine / "tied", tmp_path / "tied")


@pytest.fixture
def untied(pristine, tmp_path):
    """Return a sharded copy to damage."""
    return shutil.copytree(pristine / "untied", tmp_path / "untied")


def edit_json(file, **changes):
    """Set keys; None deletes them."""
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
    with pytest.raises(FolderError) as caught:
        read()
    return str(caught.value)


# ---- good folders ----


@pytest.mark.parametrize("kind, tie", [("tied", True), ("untied", False)])
def test_good_folder(pristine, kind, tie):
    folder = HFFolder(pristine / kind)
    architecture = folder.architecture
    a = architecture
    assert (a.vocab_size, a.hidden_size, a.intermediate_size, a.num_hidden_layers) == (270, 64, 96, 4)
    assert (a.num_attention_heads, a.num_key_value_heads, a.head_dim) == (8, 4, 16)
    assert (a.rms_norm_eps, a.rope_theta) == (1e-6, 1e6)
    assert (a.max_position_embeddings, a.tie_word_embeddings) == (1024, tie)
    assert folder.stop_ids == (2,)
    parameters = dict(make_model(tied=tie).named_parameters())
    assert architecture.tensor_shapes() == {
        name: tuple(parameter.shape) for name, parameter in parameters.items()
    }
    assert set(folder.file_of) == set(parameters)
    assert (len(set(folder.file_of.values())) >= 2) == (kind == "untied")
    for name, file in folder.file_of.items():
        assert torch.equal(load_file(file)[name], parameters[name])


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


def test_stop_ids(tied):
    for given, expected in (([1, 2], (1, 2)), (0, (0, 2)), (None, (2,))):
        edit_json(tied / "generation_config.json", eos_token_id=given)
        assert HFFolder(tied).stop_ids == expected


def test_generation_config_that_is_no_object(tied):
    (tied / "generation_config.json").write_text("[]")
    assert "generation_config.json" in refusal(lambda: HFFolder(tied).stop_ids)


def test_rope_theta_of_older_folders(tied):
    # Before transformers 5 rope_theta was at the top level.
    edit_json(tied / "config.json", rope_parameters=None, rope_theta=5e5, rope_scaling=None)
    assert HFFolder(tied).architecture.rope_theta == 5e5


# ---- config.json ----


def test_missing_folder(tmp_path):
    # The folder does not know the configuration's key; the reader of the configuration adds it.
    message = refusal(lambda: HFFolder(tmp_path / "nowhere"))
    assert message.startswith(f"{tmp_path / 'nowhere'} is not a folder")
    with pytest.raises(ConfigError) as caught, naming_key("model.hf_path"):
        HFFolder(tmp_path / "nowhere")
    assert str(caught.value) == f"model.hf_path: {message}"


def test_file_instead_of_folder(tied):
    assert "is not a folder" in refusal(lambda: HFFolder(tied / "config.json"))


def test_missing_config(tied):
    (tied / "config.json").unlink()
    assert "config.json is missing" in refusal(lambda: HFFolder(tied).architecture)


def test_broken_config(tied):
    for content in (b"", b'{"model_type": "qwen3",', b"\xff", b"[]", b"null"):
        (tied / "config.json").write_bytes(content)
        assert "config.json cannot be read" in refusal(lambda: HFFolder(tied).architecture)


def test_an_unsupported_config(tied):
    edit_json(tied / "config.json", hidden_act="gelu")
    message = refusal(HFFolder(tied).validate)
    assert message == f"{tied / 'config.json'}: hidden_act is 'gelu'; only 'silu' is supported"


# ---- tensors ----


def test_no_weights(tied):
    (tied / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(HFFolder(tied).validate)


def test_missing_shard(untied):
    shard = sorted(untied.glob("model-*.safetensors"))[-1]
    shard.unlink()
    message = refusal(HFFolder(untied).validate)
    assert f"{shard} is missing" in message and "model.safetensors.index.json" in message


def test_broken_index(untied):
    (untied / "model.safetensors.index.json").write_text('{"weight_map": {')
    assert "model.safetensors.index.json cannot be read" in refusal(HFFolder(untied).validate)
    for weight_map in ("[1]", '{"a": 5}', "null"):
        (untied / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
        assert "model.safetensors.index.json: weight_map is not" in refusal(HFFolder(untied).validate)


def test_missing_tensor(tied):
    name = "model.layers.2.self_attn.q_norm.weight"
    edit_tensors(tied / "model.safetensors", lambda tensors: tensors.pop(name))
    assert f"{name} is missing" in refusal(HFFolder(tied).validate)


def test_missing_output_matrix(untied):
    for file in untied.glob("model-*.safetensors"):
        edit_tensors(file, lambda tensors: tensors.pop("lm_head.weight", None))
    assert "lm_head.weight is missing" in refusal(HFFolder(untied).validate)


def test_wrong_shape(tied):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tied / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(95, 64)}))
    message = refusal(HFFolder(tied).validate)
    assert (
        name in message and "[95, 64]" in message and "[96, 64]" in message and "model.safetensors" in message
    )


def test_config_that_disagrees_with_the_weights(tied):
    edit_json(tied / "config.json", num_key_value_heads=2)
    message = refusal(HFFolder(tied).validate)
    assert (
        "model.layers.0.self_attn.k_proj.weight" in message
        and "[64, 64]" in message
        and "[32, 64]" in message
    )


def test_unexpected_tensor(tied):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(tied / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(128)}))
    message = refusal(HFFolder(tied).validate)
    assert f"unexpected tensor {name}" in message and "model.safetensors" in message


def test_more_layers_than_config_says(tied):
    edit_json(tied / "config.json", num_hidden_layers=3)
    assert "unexpected tensor model.layers.3." in refusal(HFFolder(tied).validate)


@pytest.mark.parametrize("keep", [0, 200, -1000])
def test_truncated_safetensors(tied, keep):
    file = tied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(HFFolder(tied).validate)
    assert str(file) in message and "damaged" in message


def test_safetensors_that_is_something_else(tied):
    (tied / "model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n" * 10
    )
    assert "damaged" in refusal(HFFolder(tied).validate)


# ---- tokenizer ----


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", None])
def test_no_tokenizer(tied, kind):
    # transformers makes an empty Qwen2Tokenizer for such folders, which encodes every word to nothing.
    (tied / "tokenizer.json").unlink()
    if kind is None:
        (tied / "tokenizer_config.json").unlink()
    else:
        edit_json(tied / "tokenizer_config.json", tokenizer_class=kind)
    assert str(tied) in refusal(HFFolder(tied).validate)


@pytest.mark.parametrize("file, content", [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")])
def test_tokenizer_files_that_hold_something_else(tied, file, content):
    (tied / file).write_text(content)
    assert str(tied) in refusal(HFFolder(tied).validate)


def test_truncated_tokenizer(tied):
    file = tied / "tokenizer.json"
    file.write_text(file.read_text()[:500])
    assert "tokenizer" in refusal(HFFolder(tied).validate)


def test_tokenizer_larger_than_the_embedding(tmp_path):
    save_folder(tmp_path / "small", vocab_size=258)
    message = refusal(HFFolder(tmp_path / "small").validate)
    assert "259" in message and "258" in message


def test_tokenizer_as_large_as_the_embedding(tmp_path):
    save_folder(tmp_path / "exact", vocab_size=259)
    assert len(HFFolder(tmp_path / "exact").tokenizer) == 259


def test_no_chat_template(tied):
    (tied / "chat_template.jinja").unlink()
    assert "chat template" in refusal(HFFolder(tied).validate)


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no system messages') }}"])
def test_chat_template_that_cannot_be_applied(tied, template):
    (tied / "chat_template.jinja").write_text(template)
    assert "the chat template cannot be applied" in refusal(
        lambda: HFFolder(tied).encode([{"role": "user", "content": "x"}])
    )


def test_no_end_of_sequence_token(tied):
    edit_json(tied / "tokenizer_config.json", eos_token=None)
    assert "end-of-sequence" in refusal(HFFolder(tied).validate)
