"""Choose the kernel for a device, dtype and divergence."""

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.kernels.cpu_ops import CpuTileOps
from megatron_srpo.vocab_parallel.kernels.exact import ExactKernel
from megatron_srpo.vocab_parallel.kernels.reference import ReferenceKernel
from megatron_srpo.vocab_parallel.kernels.topk import TopKKernel
from megatron_srpo.vocab_parallel.shard import VocabShard, accumulation_dtype

KernelName = Literal["cpu", "triton", "reference"]
_DESCRIPTIONS = {"cpu": "CPU, blocks in cache", "triton": "Triton", "reference": "plain torch"}

# Divergences implemented in triton_ops.py, which cannot be imported without Triton.
_IN_TRITON = ("jsd", "reverse", "forward")


def describe_kernel(device: torch.device, dtype: torch.dtype, divergence: Divergence) -> str:
    """Describe, for the log, the kernel chosen for such inputs."""
    return _DESCRIPTIONS[_fastest(device, dtype, divergence)]


def _fastest(device: torch.device, dtype: torch.dtype, divergence: Divergence) -> KernelName:
    is_full = divergence.support == "full"  # the other supports use only `Formula.terms`
    if device.type == "cpu":
        return "cpu" if divergence.formula.has_cpu_form or not is_full else "reference"
    has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    has_triton = has_triton and (divergence.name in _IN_TRITON or not is_full)
    return "triton" if has_triton and dtype != torch.float64 else "reference"


def create_kernel(
    name: KernelName | None, tile_tokens: int, shard: VocabShard, divergence: Divergence, like: Tensor
) -> ReferenceKernel | ExactKernel:
    """Create the kernel of this name, or the fastest one for inputs of `like`'s dtype and device."""
    name = name or _fastest(like.device, like.dtype, divergence)
    if name == "reference":
        return ReferenceKernel(shard, divergence)
    if name == "cpu":
        ops = CpuTileOps(shard.width, accumulation_dtype(like.dtype), divergence)
    else:
        from megatron_srpo.vocab_parallel.kernels.triton_ops import TritonTileOps

        ops = TritonTileOps(tile_tokens, shard.width, divergence, like)
    kernel = TopKKernel if divergence.has_tail(shard.vocab_size) else ExactKernel
    return kernel(ops, shard, divergence)
