"""Test what only a GPU shows of offloading: freed memory, a pinned copy, waiting for work in flight."""

from __future__ import annotations

import pytest
import torch

from megatron_srpo.training.offload import HostMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
SIZE = 2**26  # fp32 numbers: 256 MiB


def test_offloaded_memory_is_free_and_comes_back_bit_for_bit():
    tensor, host = torch.randn(SIZE, device="cuda"), HostMemory()
    view, expected, before = tensor[5:25], tensor.cpu(), torch.cuda.memory_allocated()
    for _ in range(2):
        host.offload([tensor])
        assert torch.cuda.memory_allocated() <= before - 4 * SIZE
        assert host.values(view).is_pinned() and torch.equal(host.values(view), expected[5:25])
        host.onload([tensor])
        assert torch.cuda.memory_allocated() == before and torch.equal(tensor.cpu(), expected)


def test_memory_in_use_by_running_kernels_is_offloaded_completely():
    # Kernels run asynchronously; the copy and the freeing must come after them.
    host, tensor = HostMemory(), torch.ones(4096, 4096, device="cuda")
    for _ in range(50):
        tensor.mul_(1.01)
    expected = torch.ones(()).cuda()
    for _ in range(50):
        expected.mul_(1.01)
    host.offload([tensor])
    assert torch.equal(host.values(tensor), expected.cpu().expand_as(tensor))
