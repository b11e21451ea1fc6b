"""Weights into this rank's chunks from a Hugging Face folder, and out of all ranks as a stream of HF-named
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter

from megatron_srpo.distributed.files import aside
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.distributed.megatron import get_transformer_layer_offset, parallel_state
from megatron_srpo.distributed.processes import Processes
from megatron_srpo.model.hf_folder import Architecture, HFFolder
from megatron_srpo.model.mapping import TensorMapping, find_mapping
from megatron_srpo.weights.hf_output import SHARD_BYTES, plan_shards, write_companions
from megatron_srpo.weights.safetensors_file import Writer


def parameters_of(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[TensorMapping, str, Parameter]]:
    """(mapping, prefix of HF names, parameter) of everything in this rank's chunks (wrapped or not)."""
    for chunk in chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        config = chunk.config
        layer_offset = get_transformer_layer_offset(config, chunk.vp_stage)
        experts = (
            config.num_moe_experts or 0
        ) // config.expert_model_parallel_size  # of each layer, on this rank
        expert_offset = experts * parallel_state.get_expert_model_parallel_rank()
        for name, parameter in chunk.named_parameters():
            mapping, prefix = find_mapping(name, layer_offset, expert_offset)
            yield mapping, prefix, parameter


class ParameterShard(NamedTuple):
    """A rank's part of a parameter among the parts of its tensor-parallel ranks, and the stored tensor it is
    a part of.

    is_primary: false where a rank with a lower number holds the same, and for the last stage's copy of a
    tied matrix.
    """

    name: str
    number: int
    parts: int
    is_primary: bool

    @classmethod
    def of(cls, mapping: TensorMapping, prefix: str, architecture: Architecture) -> ParameterShard:
        """This rank's, of the parameter that `mapping` and `prefix` stand for; `name` is its first HF tensor's."""
        group = _tensor_group(mapping)
        name = stored_name(prefix + mapping.hf[0], architecture)
        is_tied_copy = name != prefix + mapping.hf[0]
        if mapping.dim is None:
            return cls(name, 0, 1, group.rank() == 0)
        return cls(name, group.rank(), group.size(), not is_tied_copy)


def stored_name(key: str, architecture: Architecture) -> str:
    """The HF tensor that holds `key`: a tied matrix is stored once."""
    return (
        "model.embed_tokens.weight" if key == "lm_head.weight" and architecture.tie_word_embeddings else key
    )


def load(chunks: Sequence[torch.nn.Module], folder: HFFolder) -> None:
    """Fill the chunks from `folder`; only this rank's slices of the files are read."""
    architecture = folder.architecture
    with ExitStack() as stack, torch.no_grad():
        opened = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in set(folder.file_of.values())
        }
        for mapping, prefix, parameter in parameters_of(chunks):
            beat()
            part = ParameterShard.of(mapping, prefix, architecture)
            keys = [stored_name(prefix + name, architecture) for name in mapping.hf]
            slices = [opened[folder.file_of[key]].get_slice(key) for key in keys]
            parameter.copy_(mapping.cut(slices, part.number, part.parts, parameter.shape, architecture))


@dataclass(frozen=True)
class Repeatable:
    """A stream of tensors that can be iterated again: each time it is made anew, by all ranks together."""

    make: Callable[[], Iterator[tuple[str, Tensor]]]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.make()


def export(chunks: Sequence[torch.nn.Module], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The whole model as (HF name, full tensor), the same stream on every rank, one tensor at a time.

    Every rank must consume it to the end: each tensor is an all-gather over tensor-parallel ranks and
    broadcasts from the expert-parallel rank and the pipeline stage that own it. Names come in a fixed order
    that does not depend on the layout.
    """
    expert_group = parallel_state.get_expert_model_parallel_group()
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    own = {
        prefix + mapping.hf[0]: (mapping, parameter) for mapping, prefix, parameter in parameters_of(chunks)
    }
    if architecture.tie_word_embeddings:
        own.pop("lm_head.weight", None)
    # Of each mapping: a rank of this stage that holds it, or -1; and the rank of the stage that does, among those
    # this one talks to.
    me, firsts = dist.get_rank(), [first for first, _ in _tensors_by_mapping(architecture)]
    expert_owner = _highest({first: me if first in own else -1 for first in firsts}, expert_group)
    stage_owner = _highest(
        {first: me if expert_owner[first] >= 0 else -1 for first in firsts}, pipeline_group
    )
    shapes = architecture.tensor_shapes()
    device, dtype = next(chunks[0].parameters()).device, next(chunks[0].parameters()).dtype
    for first, names in _tensors_by_mapping(architecture):
        if first in own:
            mapping, parameter = own[first]
            full = _full_tensors(mapping, parameter.detach(), architecture)
        else:
            full = [torch.empty(shapes[name], dtype=dtype, device=device) for name in names]
        for name, tensor in zip(names, full, strict=True):
            beat()
            tensor = tensor.contiguous()
            if ".experts." in first and expert_group.size() > 1 and expert_owner[first] >= 0:
                dist.broadcast(tensor, expert_owner[first], group=expert_group)
            if pipeline_group.size() > 1:
                dist.broadcast(tensor, stage_owner[first], group=pipeline_group)
            yield name, tensor


def _tensors_by_mapping(architecture: Architecture) -> Iterator[tuple[str, list[str]]]:
    """(first HF name, all HF names) of each table mapping, in the order of `tensor_shapes`, q with k and v, gate
    with up.
    """
    names = list(architecture.tensor_shapes())
    together = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
    for name in names:
        part = name.split(".")[-2]
        if part in ("k_proj", "v_proj", "up_proj"):
            continue
        yield name, [name.replace(part, other) for other in together.get(part, (part,))]


def _highest(numbers: dict[str, int], group) -> dict[str, int]:
    """The largest of the group's numbers under each key; one small all-reduce."""
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    values = torch.tensor(list(numbers.values()), device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return dict(zip(numbers, values.tolist(), strict=True))


def _tensor_group(mapping: TensorMapping):
    """The ranks that share the mapping's parameters."""
    if mapping.expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _full_tensors(mapping: TensorMapping, local: Tensor, architecture: Architecture) -> list[Tensor]:
    parts, group = [local], _tensor_group(mapping)
    if mapping.dim is not None and group.size() > 1:
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
    return mapping.join(parts, architecture)


def save_hf(stream: Iterable[tuple[str, Tensor]], folder: HFFolder, output: Path, write: bool) -> None:
    """Write the stream as an HF folder that `AutoModelForCausalLM` loads: shards, index, config and
    tokenizer.

    Every rank consumes the stream, the one with `write` writes, each tensor as it comes. Config and tokenizer
    are the start model's; all tensors have the first one's dtype. The folder appears under its name when it
    is whole, in place of one that has that name already.

    Raises FileError when the disk is full.
    """
    if not write:
        for _ in stream:
            pass
        return
    stream = iter(stream)
    first = next(stream)
    tensors = {name: (first[1].dtype, shape) for name, shape in folder.architecture.tensor_shapes().items()}
    shards = plan_shards(tensors, SHARD_BYTES)
    with aside(output, Processes(rank=0, world_size=1), replace=True) as partial:
        writers = {
            file: Writer(partial / file, {name: tensors[name] for name in names})
            for file, names in shards.items()
        }
        writer_of = {name: writers[file] for file, names in shards.items() for name in names}
        for name, tensor in chain([first], stream):
            writer_of[name].write(name, tensor)
        for writer in writers.values():
            writer.close()
        write_companions(partial, folder, tensors, shards)
