"""Test offloaded and onloaded memory: values, views, and memory whose values are not kept."""

from __future__ import annotations

import pytest
import torch

from megatron_srpo.training.offload import HostMemory


@pytest.fixture
def tensors():
    """Return a buffer, two views of it, and a tensor of another dtype."""
    buffer = torch.arange(24.0)
    return buffer, buffer[4:10], buffer.view(4, 6).t(), torch.arange(7).bfloat16()


def test_views_are_restored_and_values_are_readable_meanwhile(tensors):
    host, expected = HostMemory(), [tensor.clone() for tensor in tensors]
    host.offload(tensors[1:])  # the buffer goes with its views
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0] * 4
    assert all(torch.equal(host.values(tensor), copy) for tensor, copy in zip(tensors, expected, strict=True))
    host.offload(tensors)  # offloaded already: nothing is lost
    host.onload(tensors)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, expected, strict=True))
    assert all(host.values(tensor) is tensor for tensor in tensors)


def test_the_next_stay_has_the_next_values(tensors):
    host = HostMemory()
    for number in range(3):
        tensors[0].fill_(number)
        host.offload(tensors)
        host.onload(tensors)
        host.onload(tensors)
        assert torch.equal(tensors[0], torch.full((24,), float(number)))


def test_what_is_not_kept_comes_back_as_zeros(tensors):
    host = HostMemory()
    host.offload(tensors[:1], keep=False)
    host.onload(tensors)
    assert not tensors[2].any() and tensors[3].any()
