"""Test the converter programs: round trips by one and two processes, dtypes, padding, error messages."""

from __future__ import annotations

import json
import os
import pickle
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_model, save_folder
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_srpo.weights import convert

TOOLS = Path(__file__).parents[2] / "tools"
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Return a folder with hf (a tied Qwen3 in fp32, vocabulary 261) and megatron (converted from it)."""
    root = tmp_path_factory.mktemp("pristine")
    save_folder(root / "hf", make_model(vocab_size=261))
    assert tool("convert_hf_to_megatron", "--hf-path", root / "hf", "--output", root / "megatron") == 0
    return root


@pytest.fixture
def hf(pristine, tmp_path):
    """Return a copy to damage."""
    return shutil.copytree(pristine / "hf", tmp_path / "hf")


@pytest.fixture
def megatron(pristine, tmp_path):
    """Return a copy to damage."""
    return shutil.copytree(pristine / "megatron", tmp_path / "megatron")


def tool(name: str, *arguments) -> int:
    """Run the program in this process; return its exit status."""
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    sys.path.insert(0, str(TOOLS))  # as for a program that is started: its neighbours can be imported
    try:
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
        sys.path.remove(str(TOOLS))
    raise AssertionError("the program did not say how it ended")


def there(source: Path, output: Path, *more) -> int:
    return tool("convert_hf_to_megatron", "--hf-path", source, "--output", output, *more)


def back(source: Path, reference: Path, output: Path, *more) -> int:
    return tool(
        "convert_megatron_to_hf",
        "--checkpoint",
        source,
        "--hf-reference",
        reference,
        "--output",
        output,
        *more,
    )


def error_line(capsys) -> str:
    """Return the one line on standard error that says what is wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_metadata(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata.state_dict_metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def same(first: Path, second: Path) -> bool:
    """Return whether the folders hold the same tensors, bit for bit, in any number of files."""
    one, other = (
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (first, second)
    )
    return set(one) == set(other) and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


# ---- round trips
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_round_trip_of_each_family(tmp_path, family):
    save_folder(tmp_path / "hf", make_model(family, tied=False, vocab_size=261).bfloat16())
    assert there(tmp_path / "hf", tmp_path / "megatron") == 0
    assert back(tmp_path / "megatron", tmp_path / "hf", tmp_path / "out") == 0
    assert same(tmp_path / "hf", tmp_path / "out") and not list(tmp_path.glob("*.partial"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(
        AutoTokenizer.from_pretrained(tmp_path / "hf")
    )
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
        tmp_path / "hf" / "generation_config.json"
    ).read_bytes()


def test_two_processes_write_what_one_does(pristine, tmp_path):
    # Each writes its share: files of similar size, with the same content.
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    commands = [
        ["convert_hf_to_megatron.py", "--hf-path", pristine / "hf", "--output", tmp_path / "megatron"],
        [
            "convert_megatron_to_hf.py",
            "--checkpoint",
            tmp_path / "megatron",
            "--hf-reference",
            pristine / "hf",
            "--output",
            tmp_path / "out",
        ],
    ]
    for name, *arguments in commands:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOLS.parent)}
        done = subprocess.run(
            [*run, TOOLS / name, *arguments], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count(" s left") == 1 and not list(
            tmp_path.glob("*.partial")
        )  # progress of the first alone
    assert same(pristine / "hf", tmp_path / "out")
    for pattern, folder in (("*.distcp", "megatron"), ("*.safetensors", "out")):
        sizes = [file.stat().st_size for file in (tmp_path / folder).glob(pattern)]
        assert len(sizes) >= 2 and max(sizes) < 0.6 * sum(sizes)


def test_shards_of_bounded_size(pristine, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_BYTES", 100_000)
    assert back(pristine / "megatron", pristine / "hf", tmp_path / "out") == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 4
    assert all(file.stat().st_size < 110_000 for file in files)
    assert same(pristine / "hf", tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(pristine / "hf").state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_dtype(pristine, tmp_path):
    assert there(pristine / "hf", tmp_path / "half", "--dtype", "bfloat16") == 0
    assert back(tmp_path / "half", pristine / "hf", tmp_path / "auto") == 0
    assert back(pristine / "megatron", pristine / "hf", tmp_path / "bf16", "--dtype", "bfloat16") == 0
    assert back(tmp_path / "half", pristine / "hf", tmp_path / "fp32", "--dtype", "float32") == 0
    original = load_file(pristine / "hf" / "model.safetensors")
    for name, dtype in (("auto", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(tensors[key], tensor.bfloat16().to(dtype)) for key, tensor in original.items())
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == str(dtype).removeprefix(
            "torch."
        )


@pytest.mark.parametrize("multiple, rows", [(1, 261), (128, 384)])
def test_padding(pristine, tmp_path, multiple, rows):
    assert there(pristine / "hf", tmp_path / "megatron", "--make-vocab-size-divisible-by", multiple) == 0
    assert FileSystemReader(tmp_path / "megatron").read_metadata().state_dict_metadata[
        EMBEDDING
    ].size == torch.Size([rows, 64])
    assert back(tmp_path / "megatron", pristine / "hf", tmp_path / "out") == 0
    assert same(pristine / "hf", tmp_path / "out")


@pytest.mark.parametrize("tracker, name", [("release\n", "release"), ("25", "iter_0000025")])
def test_the_folder_that_megatron_lm_names(pristine, tmp_path, tracker, name):
    shutil.copytree(pristine / "megatron", tmp_path / "run" / name)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert back(tmp_path / "run", pristine / "hf", tmp_path / "out") == 0
    assert same(pristine / "hf", tmp_path / "out")


def test_a_converted_folder_is_its_own_reference(pristine, tmp_path):
    # The result holds nothing by which it would be taken for Megatron's.
    megatron, output = pristine / "megatron", tmp_path / "hf"
    assert (
        tool(
            "convert_megatron_to_hf", "--checkpoint", megatron, "--hf-reference", megatron, "--output", output
        )
        == 0
    )
    assert tool("verify_checkpoint", pristine / "hf", output) == 0


@pytest.mark.parametrize("written", ["²".encode(), b"\xff\xfe"])
def test_a_tracker_that_names_nothing(pristine, tmp_path, capsys, written):
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(written)
    command = ("--checkpoint", tmp_path, "--hf-reference", pristine / "hf", "--output", tmp_path / "out")
    assert tool("convert_megatron_to_hf", *command) == 2
    assert "expected an iteration or 'release'" in capsys.readouterr().err


def test_nan_is_reported_and_kept(hf, tmp_path, capsys):
    edit_tensors(hf, lambda tensors: tensors["model.norm.weight"][3:5].fill_(torch.nan))
    assert there(hf, tmp_path / "megatron") == 0
    assert "warning: model.norm.weight: 2 of 64 elements are NaN" in capsys.readouterr().err
    assert back(tmp_path / "megatron", hf, tmp_path / "out") == 0
    assert "warning: model.norm.weight: 2 of 64" in capsys.readouterr().err
    assert int(load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].isnan().sum()) == 2


# ---- bad input
# -------------------------------------------------------------------------------------------------------

K = "model.layers.2.self_attn.k_proj.weight"
HF_FAULTS = {
    "missing": (lambda t: t.pop(K), [K, "missing"]),
    "unexpected": (
        lambda t: t.update({"model.extra": torch.zeros(2)}),
        ["model.safetensors", "unexpected tensor model.extra"],
    ),
    "shape": (lambda t: t.update({K: torch.zeros(3, 64)}), ["model.safetensors", K, "[3, 64]", "[64, 64]"]),
    "dtype": (
        lambda t: t.update({K: torch.zeros(64, 64, dtype=torch.int8)}),
        ["model.safetensors", K, "I8", "BF16"],
    ),
    "mixed dtypes": (lambda t: t.update({K: t[K].bfloat16()}), [K, "bfloat16", "--dtype"]),
}


@pytest.mark.parametrize("fault", list(HF_FAULTS))
def test_bad_tensors_in_the_hf_folder(hf, tmp_path, capsys, fault):
    change, words = HF_FAULTS[fault]
    edit_tensors(hf, change)
    assert there(hf, tmp_path / "out") == 2
    message = error_line(capsys)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_truncated_hf_file(hf, tmp_path, capsys):
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert there(hf, tmp_path / "out") == 2
    assert str(file) in error_line(capsys)


def test_an_architecture_that_is_not_supported(hf, tmp_path, capsys):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert there(hf, tmp_path / "out") == 2
    message = error_line(capsys)
    assert "config.json" in message and "'mamba'" in message and "qwen3_moe" in message


def set_size(entries: dict, key: str, shape) -> None:
    """Set another size, with pieces that lie within it."""
    entries[key].size = torch.Size(shape)
    for piece in entries[key].chunks:
        piece.sizes = torch.Size(
            min(size, length - start)
            for size, length, start in zip(piece.sizes, shape, piece.offsets, strict=True)
        )


QKV = "decoder.layers.self_attention.linear_qkv.weight"
MEGATRON_FAULTS = {
    "missing": (lambda e: e.pop(QKV), [QKV, "missing"]),
    "shape": (lambda e: set_size(e, QKV, (4, 99, 64)), [QKV, "[4, 99, 64]", "[4, 256, 64]"]),
    "too few rows": (lambda e: set_size(e, EMBEDDING, (200, 64)), [EMBEDDING, "[200, 64]", "[261, 64]"]),
    "dtype": (lambda e: setattr(e[QKV].properties, "dtype", torch.int8), [QKV, "torch.int8"]),
}


@pytest.mark.parametrize("fault", list(MEGATRON_FAULTS))
def test_bad_tensors_in_the_checkpoint(pristine, megatron, tmp_path, capsys, fault):
    change, words = MEGATRON_FAULTS[fault]
    edit_metadata(megatron, change)
    assert back(megatron, pristine / "hf", tmp_path / "out") == 2
    message = error_line(capsys)
    assert all(word in message for word in [str(megatron), *words]), message
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_an_unexpected_tensor_in_the_checkpoint(tmp_path, capsys):
    # An untied model's output matrix, though the reference says tied.
    save_folder(tmp_path / "untied", make_model(tied=False))
    save_folder(tmp_path / "tied", make_model(tied=True))
    assert there(tmp_path / "untied", tmp_path / "megatron") == 0
    assert back(tmp_path / "megatron", tmp_path / "tied", tmp_path / "out") == 2
    assert "unexpected tensor output_layer.weight" in error_line(capsys)


def test_a_folder_that_is_no_checkpoint(pristine, tmp_path, capsys):
    assert back(pristine / "hf", pristine / "hf", tmp_path / "out") == 2
    assert "metadata.json" in error_line(capsys)


def test_a_teacher_where_there_is_none(pristine, tmp_path, capsys):
    arguments = (
        "--checkpoint",
        pristine / "megatron",
        "--hf-reference",
        pristine / "hf",
        "--output",
        tmp_path / "out",
    )
    assert tool("convert_megatron_to_hf", *arguments, "--weights", "teacher") == 2
    assert "is no training run's folder" in error_line(capsys)


def either_way(direction: str, pristine: Path, output: Path) -> int:
    return (
        there(pristine / "hf", output)
        if direction == "there"
        else back(pristine / "megatron", pristine / "hf", output)
    )


@pytest.mark.parametrize("direction", ["there", "back"])
def test_an_output_folder_that_is_not_empty(pristine, tmp_path, capsys, direction):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("mine")
    assert either_way(direction, pristine, output) == 2 and "not an empty folder" in error_line(capsys)
    assert [file.name for file in output.iterdir()] == ["precious"] and not (
        tmp_path / "out.partial"
    ).exists()


def test_what_a_killed_attempt_left_is_named(pristine, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    assert there(pristine / "hf", tmp_path / "out") == 2
    assert str(tmp_path / "out.partial") in error_line(capsys) and (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_full_disk(pristine, tmp_path, capsys, direction):
    # Simulated by a limit on the size of files: writing fails half-way, and nothing is left.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        status = either_way(direction, pristine, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = error_line(capsys)
    assert (
        status == 2
        and "cannot be written" in message
        and ("distcp" if direction == "there" else "model.safetensors") in message
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
