"""Model folders that transformers reads otherwise, or that are not what they seem: refused by name."""

import codecs
import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_hf_folder import edit_json, edit_tensors, refusal
from tiny import FAMILIES, LLAMA3, make_model, make_tokenizer, save_folder
from tokenizers import decoders, models
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_srpo.model.families import families
from megatron_srpo.model.folder_files import companions
from megatron_srpo.model.hf_folder import FolderError, HFFolder
from megatron_srpo.model.reference import check_tokens


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
    # A copy to damage.
    return shutil.copytree(pristine / "tied", tmp_path / "tied")


@pytest.fixture
def untied(pristine, tmp_path):
    # A sharded copy to damage.
    return shutil.copytree(pristine / "untied", tmp_path / "untied")


# ---- what transformers reads otherwise ----


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        {"type": "linear", "factor": 2.0},
        {**LLAMA3, "factor": 4.0},
    ],
)
def test_rope_scaling_beside_rope_parameters(tied, scaling):
    edit_json(tied / "config.json", rope_scaling=scaling)
    message = refusal(lambda: HFFolder(tied).architecture)
    assert "config.json: rope_scaling is" in message and "rope_parameters" in message


def test_rope_scaling_equal_to_rope_parameters(tied):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    edit_json(tied / "config.json", rope_scaling=rope, rope_parameters=rope)
    HFFolder(tied).validate()


def test_a_default_of_ours_that_is_not_transformers(tied, monkeypatch):
    """The self-check compares what our reader returns with AutoConfig, key by key."""
    edit_json(tied / "config.json", rms_norm_eps=None)
    defaults = families()["qwen3"].defaults | {"rms_norm_eps": 1e-5}
    monkeypatch.setattr(families()["qwen3"], "defaults", defaults)
    config = AutoConfig.from_pretrained(tied)
    monkeypatch.setattr(
        type(config),
        "to_dict",
        lambda self: {**json.loads((tied / "config.json").read_text()), "rms_norm_eps": 1e-6},
    )
    assert "rms_norm_eps is 1e-06 for transformers, but 1e-05 here" in refusal(HFFolder(tied).validate)


def test_tied_config_beside_another_output_matrix(tied):
    # transformers unties the two, so its logits are others than those of a tied model.
    edit_tensors(
        tied / "model.safetensors",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0.01}),
    )
    message = refusal(HFFolder(tied).validate)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "tie_word_embeddings" in message
    ids = torch.arange(8)[None]
    theirs, meant = AutoModelForCausalLM.from_pretrained(tied)(ids).logits, make_model()(ids).logits
    assert (theirs - meant).abs().max() > 1e-3


def test_tied_config_beside_an_equal_output_matrix(tied):
    edit_tensors(
        tied / "model.safetensors",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    HFFolder(tied).validate()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_without_scales(tied, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tied / "model.safetensors", lambda t: t.update({name: t[name].to(dtype)}))
    message = refusal(HFFolder(tied).validate)
    assert name in message and "has dtype" in message and "BF16" in message


def test_quantisation_in_config(tied):
    edit_json(tied / "config.json", quantization_config={"quant_method": "fp8"})
    assert "quantization_config: quantised weights" in refusal(HFFolder(tied).validate)


# ---- saved twice ----


def weights_of(folder) -> dict:
    return {name: load_file(file)[name] for name, file in HFFolder(folder).file_of.items()}


def test_saved_in_shards_and_then_in_one_file(untied):
    # transformers removes the old shards and leaves their index.
    newer = make_model(tied=False, seed=1)
    newer.save_pretrained(untied)
    assert (untied / "model.safetensors.index.json").exists()
    HFFolder(untied).validate()
    theirs = AutoModelForCausalLM.from_pretrained(untied).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in weights_of(untied).items())
    assert torch.equal(weights_of(untied)["lm_head.weight"], newer.lm_head.weight)


def test_saved_in_shards_and_then_in_one_file_with_the_old_shards_there(pristine, untied):
    make_model(tied=False, seed=1).save_pretrained(untied)
    for file in (pristine / "untied").glob("model-*.safetensors"):
        shutil.copy(file, untied)
    assert "two sets of weights" in refusal(HFFolder(untied).validate)


def test_saved_in_one_file_and_then_in_shards(tmp_path):
    # transformers reads the older model.safetensors, other programs the newer shards.
    save_folder(tmp_path, tied=False)
    make_model(tied=False, seed=1).save_pretrained(tmp_path, max_shard_size="400KB")
    assert "two sets of weights" in refusal(HFFolder(tmp_path).validate)


def test_shards_that_the_index_does_not_list(untied):
    shutil.copy(next(untied.glob("model-00001*")), untied / "model-00001-of-00009.safetensors")
    assert "model-00001-of-00009.safetensors" in refusal(HFFolder(untied).validate)


def test_a_tensor_in_two_shards(untied):
    first, second = sorted(untied.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    edit_tensors(second, lambda tensors: tensors.update({name: tensor}))
    message = refusal(HFFolder(untied).validate)
    assert name in message and first.name in message and second.name in message


def test_an_index_of_files_elsewhere(untied):
    index = untied / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../tied/model-00001"))
    assert "expected a file of this folder" in refusal(HFFolder(untied).validate)


# ---- tokenizer ----


def foreign(folder, kind):
    """Write a tokenizer that keeps "= " together, under a class that splits text in its own way."""
    inner = make_tokenizer().backend_tokenizer
    vocabulary = {**inner.get_vocab(with_added_tokens=False), "=Ġ": 259}
    inner.model = models.BPE(vocab=vocabulary, merges=[("=", "Ġ")])
    inner.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", tokenizer_class=kind)
    assert inner.encode("= ").ids == [259]


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer", "GemmaTokenizer"])
def test_a_class_that_changes_the_tokenizer(tied, kind):
    # As the installed transformers does with some class names: tokenizer.json's ids are the model's.
    foreign(tied, kind)
    message = refusal(HFFolder(tied).validate)
    assert "tokenizer_class" in message and kind in message and str(tied) in message


def test_a_class_that_keeps_the_tokenizer(tied):
    foreign(tied, "PreTrainedTokenizerFast")
    HFFolder(tied).validate()


def test_a_decoder_that_drops_spaces(pristine):
    folder = HFFolder(pristine / "tied")
    tokenizer = deepcopy(folder.tokenizer)
    check_tokens(folder.path, tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.Strip(" ", 1, 0)
    assert "is decoded as" in refusal(lambda: check_tokens(folder.path, tokenizer))


def test_a_decoder_of_tokenizer_json_that_drops_spaces(tied):
    tokenizer = json.loads((tied / "tokenizer.json").read_text())
    dropping = {"type": "Replace", "pattern": {"String": "Ġ"}, "content": ""}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [dropping, tokenizer["decoder"]]}
    (tied / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refusal(HFFolder(tied).validate)
    assert "Compute347+58612=?" in message and "with other white space" in message


def test_decoding_keeps_spaces_before_punctuation(tied):
    edit_json(tied / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    tokenizer = HFFolder(tied).tokenizer
    assert tokenizer.clean_up_tokenization_spaces is False


def test_an_end_token_that_tokenizer_json_lacks(tied):
    """AutoTokenizer gives it a new id, a row of the embedding that was never trained."""
    edit_json(tied / "tokenizer_config.json", eos_token="<|done|>")
    assert "<|done|>" in refusal(HFFolder(tied).validate)


# ---- stop tokens ----


@pytest.mark.parametrize("generation", [None, {}])
def test_a_list_of_stop_tokens_in_config_alone(tied, generation):
    edit_json(tied / "config.json", eos_token_id=[1, 2, 7])
    (tied / "generation_config.json").unlink()
    if generation is not None:
        (tied / "generation_config.json").write_text(json.dumps(generation))
    assert HFFolder(tied).stop_ids == (1, 2, 7)


@pytest.mark.parametrize("given", ["2", [2, "x"], {"a": 1}, 2.0, True, -1, 270, [[2]]])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_stop_tokens_of_a_wrong_type(tied, file, given):
    edit_json(tied / "generation_config.json", eos_token_id=None)
    edit_json(tied / file, eos_token_id=given)
    assert f"{file}: eos_token_id is" in refusal(lambda: HFFolder(tied).stop_ids)


def test_the_template_ends_a_turn_with_a_token_that_is_no_stop_token(tied):
    edit_json(tied / "tokenizer_config.json", eos_token="<|endoftext|>")
    edit_json(tied / "generation_config.json", eos_token_id=0)
    message = refusal(HFFolder(tied).validate)
    assert "'<|im_end|>' (2)" in message and "generation_config.json" in message
    edit_json(tied / "generation_config.json", eos_token_id=[0, 2])
    HFFolder(tied).validate()


# ---- chat templates ----


def test_named_chat_templates_without_a_default(tied):
    (tied / "chat_template.jinja").unlink()
    named = [{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}]
    edit_json(tied / "tokenizer_config.json", chat_template=named)
    message = refusal(HFFolder(tied).validate)
    assert "'rag', 'tool_use'" in message and "'default'" in message


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ none() }}", "{{ 'a' * messages }}", "{{ range(10**9) }}"]
    + ["{{ messages[0]['content'].nothing.at_all }}", "{{ '%d' % 'x' }}"],
)
def test_template_errors_that_are_no_template_error(tied, template):
    (tied / "chat_template.jinja").write_text(template)
    message = refusal(lambda: HFFolder(tied).encode([{"role": "user", "content": "x"}]))
    assert "the chat template cannot be applied" in message and str(tied) in message


# ---- files that are no text, or no files ----

TEXT_FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
TEXT_FILES += ["chat_template.jinja"]


@pytest.mark.parametrize("name", TEXT_FILES)
def test_a_byte_order_mark(tied, name):
    file = tied / name
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    message = refusal(HFFolder(tied).validate)
    assert f"{file} cannot be read" in message and "byte order mark" in message


@pytest.mark.parametrize("name", TEXT_FILES)
def test_latin_1(tied, name):
    file = tied / name
    file.write_bytes(file.read_bytes().rstrip() + " {# ä #}".encode("latin-1"))
    message = refusal(HFFolder(tied).validate)
    assert f"{file} cannot be read" in message and "UTF-8" in message


@pytest.mark.parametrize("name", [*TEXT_FILES, "model.safetensors", "model.safetensors.index.json"])
def test_a_fifo_ends(tied, name):
    (tied / name).unlink(missing_ok=True)
    os.mkfifo(tied / name)
    assert name in refusal(HFFolder(tied).validate)


def test_a_config_nested_without_end(tied):
    (tied / "config.json").write_text('{"a":' * 100_000)
    assert "config.json cannot be read" in refusal(HFFolder(tied).validate)


@pytest.mark.parametrize("family, key", [("qwen3", "num_hidden_layers"), ("qwen3_moe", "num_local_experts")])
def test_a_billion_layers_or_experts_end(tmp_path, family, key):
    save_folder(tmp_path, family=family, layers=1)
    edit_json(tmp_path / "config.json", layer_types=None, **{key: 10**9})
    message = refusal(HFFolder(tmp_path).validate)
    assert "1000000000" in message and "expected at most" in message


def test_wrong_types_in_config(tied):
    """Whatever a key holds, the folder is accepted or refused by a message."""
    config = json.loads((tied / "config.json").read_text())
    wrong = [None, True, -1, 1.5, "x", ["x"], {"a": [1]}, 10**400, float("nan")]
    keys = [
        *config,
        "rope_scaling",
        "rope_theta",
        "quantization_config",
        "auto_map",
        "head_dim",
        "layer_types",
    ]
    refused = 0
    for key in keys:
        for value in wrong:
            (tied / "config.json").write_text(json.dumps({**config, key: value}))
            folder = HFFolder(tied)
            try:
                _ = folder.file_of
                folder.check_weights()
                _ = folder.stop_ids
            except FolderError as error:
                refused += 1
                assert str(tied) in str(error), (key, value)
    assert refused > len(keys)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "generation_config.json"])
def test_wrong_types_beside_config(tied, file):
    content = json.loads((tied / file).read_text())
    keys = [*content, "chat_template", "added_tokens_decoder", "auto_map", "tokenizer_class", "bos_token"]
    for key in keys:
        for value in [True, -1, "x", ["x"], {"a": [1]}]:
            (tied / file).write_text(json.dumps({**content, key: value}))
            folder = HFFolder(tied)
            try:
                folder.validate()
                folder.encode([{"role": "user", "content": "x"}])
            except FolderError as error:
                assert str(tied) in str(error), (key, value)


# ---- links ----


@pytest.fixture
def secret(tmp_path):
    # A file that no upload may contain.
    file = tmp_path / "home" / "secret.json"
    file.parent.mkdir()
    file.write_text('{"token": "hf_xyz"}')
    return file


@pytest.mark.parametrize(
    "name", ["special_tokens_map.json", "LICENSE.txt", "additional_chat_templates/x.jinja"]
)
def test_a_companion_that_is_a_link_out_of_the_folder(tied, secret, name):
    (tied / name).parent.mkdir(exist_ok=True)
    (tied / name).symlink_to(secret)
    message = refusal(HFFolder(tied).validate)
    assert name in message and str(secret) in message and "outside of the folder" in message
    with pytest.raises(FolderError):
        companions(tied)


def test_files_of_other_names_are_no_companions(tied, secret):
    (tied / "notes.txt").symlink_to(secret)
    (tied / "passwords.json").write_text("{}")
    HFFolder(tied).validate()
    assert not {"notes.txt", "passwords.json"} & set(companions(tied))


def test_a_snapshot_of_the_hub_cache(pristine, secret, tmp_path):
    """Its files are links to ../../blobs; a link to another repository's is refused."""
    repository = tmp_path / "hub" / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate((pristine / "tied").iterdir()):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    HFFolder(snapshot).validate()
    (tmp_path / "named").symlink_to(snapshot)
    HFFolder(tmp_path / "named").validate()
    assert companions(snapshot)["tokenizer.json"].parent == blobs
    (snapshot / "added_tokens.json").symlink_to(secret)
    assert "outside of the folder" in refusal(HFFolder(snapshot).validate)
    (snapshot / "added_tokens.json").unlink()
    (blobs / "f").symlink_to(secret)
    (snapshot / "added_tokens.json").symlink_to("../../blobs/f")
    assert "outside of the folder" in refusal(HFFolder(snapshot).validate)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_good_folders_of_all_families(tmp_path, family, is_tied):
    HFFolder(save_folder(tmp_path, family=family, tied=is_tied, layers=2)).validate()


def test_the_quick_starts_model():
    HFFolder(Path(__file__).parents[2] / "examples/quickstart/start").validate()
