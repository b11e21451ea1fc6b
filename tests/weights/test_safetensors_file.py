"""Test the streaming safetensors writer by reading its files with safetensors itself."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_srpo.weights.safetensors_file import Writer

TENSORS = {
    "odd": torch.arange(5, dtype=torch.int8),
    "half": torch.randn(3, 7).bfloat16(),
    "wide": torch.randn(2, 3, 4, dtype=torch.float64),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "strided": torch.randn(6, 4).t(),
}
ANNOUNCED = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_safetensors_reads_what_was_written_in_any_order(tmp_path):
    writer = Writer(tmp_path / "x.safetensors", ANNOUNCED)
    for name in sorted(TENSORS, reverse=True):
        writer.write(name, TENSORS[name])
    writer.close()
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("other", torch.zeros(5), "announced"),
        ("odd", torch.zeros(5), "int8"),
        ("odd", torch.zeros(6, dtype=torch.int8), "(6,)"),
    ],
)
def test_what_was_not_announced_is_refused(tmp_path, name, tensor, message):
    writer = Writer(tmp_path / "x.safetensors", ANNOUNCED)
    with pytest.raises(ValueError, match="x.safetensors") as caught:
        writer.write(name, tensor)
    assert name in str(caught.value) and message in str(caught.value)


def test_a_tensor_twice_or_never(tmp_path):
    writer = Writer(tmp_path / "x.safetensors", ANNOUNCED)
    writer.write("odd", TENSORS["odd"])
    with pytest.raises(ValueError, match="odd: written twice"):
        writer.write("odd", TENSORS["odd"])
    with pytest.raises(ValueError, match=r"half was not written \(6 in all\)"):
        writer.close()


def test_a_dtype_that_the_format_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="z: safetensors files cannot hold torch.complex64"):
        Writer(tmp_path / "x.safetensors", {"z": (torch.complex64, (2,))})
