"""Load a Hugging Face folder into this rank's chunks, and export them as a stream of HF tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter

from megatron_srpo.distributed.files import atomic_directory
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.distributed.megatron import get_transformer_layer_offset, parallel_state
from megatron_srpo.distributed.processes import Processes
from megatron_srpo.model.architecture import Architecture
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.model.mapping import ParamLocation, TensorMapping
from megatron_srpo.weights.hf_output import SHARD_BYTES, plan_shards, write_companions
from megatron_srpo.weights.safetensors_file import Writer


def parameters_of(
    chunks: Sequence[torch.nn.Module], architecture: Architecture
) -> Iterator[tuple[ParamLocation, Parameter]]:
    """Yield every parameter of this rank's chunks (wrapped or not), with its location in the model."""
    for wrapped in chunks:
        chunk: Any = wrapped
        while hasattr(chunk, "module"):
            chunk = chunk.module
        config = chunk.config
        layer_offset = get_transformer_layer_offset(config, chunk.vp_stage)
        experts_per_rank = (config.num_moe_experts or 0) // config.expert_model_parallel_size
        expert_offset = experts_per_rank * parallel_state.get_expert_model_parallel_rank()
        for name, parameter in chunk.named_parameters():
            yield architecture.locate(name, layer_offset, expert_offset), parameter


class ParameterShard(NamedTuple):
    """A rank's shard, `index` of `count`, of the parameter whose first HF tensor is `name`.

    is_primary is False if a lower rank holds the same shard, and for the last stage's copy of a tied matrix.
    """

    name: str
    index: int
    count: int
    is_primary: bool

    @classmethod
    def of(cls, location: ParamLocation) -> ParameterShard:
        """Find this rank's shard of the parameter at `location`."""
        group, name = _tensor_group(location.mapping), location.names[0]
        if location.mapping.dim is None:
            return cls(name, 0, 1, group.rank() == 0)
        return cls(name, group.rank(), group.size(), location.mapping.tied_to is None)


def load(chunks: Sequence[torch.nn.Module], folder: HFFolder) -> None:
    """Load the chunks' weights from `folder`; reads only this rank's slices of the files."""
    with ExitStack() as stack, torch.no_grad():
        files = set(folder.file_of.values())
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        for location, parameter in parameters_of(chunks, folder.architecture):
            beat()
            slices = [opened[folder.file_of[name]].get_slice(name) for name in location.names]
            shard = ParameterShard.of(location)
            parameter.copy_(location.mapping.cut(slices, shard.index, shard.count, parameter.shape))


@dataclass(frozen=True)
class Repeatable:
    """A stream of tensors that can be iterated again; all ranks do so together."""

    make: Callable[[], Iterator[tuple[str, Tensor]]]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.make()


def export(chunks: Sequence[torch.nn.Module], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield the complete model as (HF name, full tensor), one at a time, in the same order on every rank.

    Every rank must consume the stream to its end: each tensor takes an all-gather over tensor-parallel ranks,
    and broadcasts from the expert-parallel rank and the pipeline stage that own it.
    """
    expert_group = parallel_state.get_expert_model_parallel_group()
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    own = {
        location.names[0]: parameter
        for location, parameter in parameters_of(chunks, architecture)
        if location.mapping.tied_to is None
    }
    # For each parameter: a rank of this stage that holds it, or -1; and this rank's peer in the owning stage.
    me, locations = dist.get_rank(), list(architecture.locations())
    expert_owners = _maximum([me if each.names[0] in own else -1 for each in locations], expert_group)
    stage_owners = _maximum([me if owner >= 0 else -1 for owner in expert_owners], pipeline_group)
    dtype, device = next((p.dtype, p.device) for chunk in chunks for p in chunk.parameters())
    for location, expert_owner, stage_owner in zip(locations, expert_owners, stage_owners, strict=True):
        mapping, names = location.mapping, location.names
        if names[0] in own:
            full = _full_tensors(mapping, own[names[0]].detach())
        else:
            full = [torch.empty(shape, dtype=dtype, device=device) for shape in mapping.tensors.values()]
        for name, tensor in zip(names, full, strict=True):
            beat()
            tensor = tensor.contiguous()
            if mapping.is_expert and expert_group.size() > 1 and expert_owner >= 0:
                dist.broadcast(tensor, expert_owner, group=expert_group)
            if pipeline_group.size() > 1:
                dist.broadcast(tensor, stage_owner, group=pipeline_group)
            yield name, tensor


def _maximum(numbers: list[int], group: dist.ProcessGroup) -> list[int]:
    """Return the maximum of each number over the group; one small all-reduce."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    values = torch.tensor(numbers, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values.tolist()


def _tensor_group(mapping: TensorMapping) -> dist.ProcessGroup:
    if mapping.is_expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _full_tensors(mapping: TensorMapping, local: Tensor) -> list[Tensor]:
    shards, group = [local], _tensor_group(mapping)
    if mapping.dim is not None and group.size() > 1:
        shards = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(shards, local.contiguous(), group=group)
    return mapping.join(shards)


def save_hf(stream: Iterable[tuple[str, Tensor]], folder: HFFolder, output: Path, write: bool) -> None:
    """Write the stream as an HF folder, tensor by tensor, with config and tokenizer of `folder`.

    Every rank consumes the stream; the rank with `write` writes it. All tensors must have the same dtype. The
    folder replaces an older one when it is complete. Raises FileError if it cannot be written.
    """
    if not write:
        for _ in stream:
            pass
        return
    stream = iter(stream)
    first = next(stream)
    tensors = {name: (first[1].dtype, shape) for name, shape in folder.architecture.tensor_shapes().items()}
    shards = plan_shards(tensors, SHARD_BYTES)
    with atomic_directory(output, Processes(rank=0, world_size=1), replace=True) as partial:
        writer_of: dict[str, Writer] = {}
        for file, names in shards.items():
            writer = Writer(partial / file, {name: tensors[name] for name in names})
            writer_of |= dict.fromkeys(names, writer)
        for name, tensor in chain([first], stream):
            writer_of[name].write(name, tensor)
        for writer in set(writer_of.values()):
            writer.close()
        write_companions(partial, folder, tensors, shards)
