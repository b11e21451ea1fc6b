"""Read folders of weights tensor by tensor, with Hugging Face names.

Megatron checkpoints have the names and global shapes of `GPTModel.sharded_state_dict()` with Transformer
Engine: layers stacked (`decoder.layers.mlp.linear_fc2.weight` is [layers, H, ffn]), experts inside them
(`decoder.layers.mlp.experts.experts.linear_fc2.weight` is [layers, experts, H, ffn]), fused norms named after
the following matrix, the vocabulary padded. Local layers use the same names (`sharded_state_dict_keys_map`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_srpo.distributed.files import FileError
from megatron_srpo.model.architecture import FUSED_NORMS, Architecture
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.model.mapping import ParamLocation, TensorMapping
from megatron_srpo.weights.safetensors_file import DTYPES
from megatron_srpo.weights.torch_dist import Folder

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Tensors(Protocol):
    """A model's tensors by HF name, on the CPU, in their stored dtype; reading may raise FileError."""

    def names(self) -> list[str]:
        """List the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Read a tensor."""
        ...


class HFTensors:
    """The tensors of a Hugging Face folder; raises FileError for unexpected names, shapes or dtypes."""

    def __init__(self, folder: HFFolder):
        self.folder = folder
        self._shapes = folder.architecture.tensor_shapes()
        self._opened: tuple[Path, Any] | None = None
        _ = folder.file_of

    def _open(self, file: Path) -> Any:
        """Open a file, and keep only this one open: a mapped file's pages count as this process's memory."""
        if self._opened is None or self._opened[0] != file:
            self._opened = file, safe_open(file, framework="pt")
        return self._opened[1]

    def names(self) -> list[str]:
        """List the names of all tensors."""
        return list(self.folder.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that config.json implies."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype."""
        return DTYPES[self.folder.dtype_of(name)]

    def tensor(self, name: str) -> Tensor:
        """Read a tensor from its file."""
        file = self.folder.file_of[name]
        try:
            return self._open(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FileError(f"{file}: {name} cannot be read: {error}") from None


@dataclass(frozen=True)
class CheckpointSlice:
    """The location of a parameter in a Megatron checkpoint.

    Attributes:
        mapping: The parameter's mapping.
        names: The HF tensors that the parameter consists of.
        key: Name of the checkpoint's tensor.
        index: Leading indices into that tensor: (), (layer,) or (layer, expert).
        stacks: Sizes of these leading dimensions.
    """

    mapping: TensorMapping
    names: tuple[str, ...]
    key: str
    index: tuple[int, ...]
    stacks: tuple[int, ...]


def checkpoint_slices(architecture: Architecture) -> Iterator[CheckpointSlice]:
    """Yield the location in a Megatron checkpoint of each parameter of the architecture."""
    for location in architecture.locations():
        yield checkpoint_slice(location, architecture)


def checkpoint_slice(location: ParamLocation, architecture: Architecture) -> CheckpointSlice:
    """Return a parameter's location in a Megatron checkpoint; a tied matrix is stored as the embedding."""
    layers, experts = architecture.num_hidden_layers, architecture.num_experts
    mapping, names = location.mapping, location.names
    if not mapping.in_layer:
        key = mapping.megatron if mapping.tied_to is None else "embedding.word_embeddings.weight"
        return CheckpointSlice(mapping, names, key, (), ())
    if mapping.is_expert:
        key = "decoder.layers." + mapping.megatron.replace("mlp.experts.", "mlp.experts.experts.")
        return CheckpointSlice(mapping, names, key, (location.layer, location.expert), (layers, experts))
    key = "decoder.layers." + _fused_name(mapping.megatron, dense=not experts)
    return CheckpointSlice(mapping, names, key, (location.layer,), (layers,))


def _fused_name(name: str, dense: bool) -> str:
    """Return Transformer Engine's name; it fuses the norm before the MLP only in dense layers."""
    for fused, norm in FUSED_NORMS.items():
        if norm == name and (dense or not fused.startswith("mlp.")):
            return fused
    return name


def empty_objects(architecture: Architecture) -> list[str]:
    """Return the keys of the `_extra_state` objects that layers load; they are empty in bf16 models."""
    layers, experts = architecture.num_hidden_layers, architecture.num_experts
    attention = ("core_attention", "linear_qkv", "linear_proj", "q_layernorm", "k_layernorm")
    modules = [f"self_attention.{name}" for name in attention]
    modules += ["pre_mlp_layernorm"] if experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    keys = [f"decoder.layers.{m}._extra_state/shard_{n}_{layers}" for m in modules for n in range(layers)]
    for name in ("linear_fc1", "linear_fc2"):
        stem = f"decoder.layers.mlp.experts.experts.{name}._extra_state"
        keys += [f"{stem}/shard_{n}.{e}_{layers}.{experts}" for n in range(layers) for e in range(experts)]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]


class MegatronTensors:
    """The model's tensors in a torch_dist checkpoint; raises FileError for unexpected names or shapes."""

    def __init__(self, path: Path, architecture: Architecture, prefix: str = ""):
        """Check the checkpoint at `path`; `prefix` precedes Megatron's names in its keys."""
        self.folder, self.architecture, self.prefix = Folder(path), architecture, prefix
        self._shapes = architecture.tensor_shapes()
        prefixed = (replace(each, key=prefix + each.key) for each in checkpoint_slices(architecture))
        stored = map(self._as_stored, prefixed)
        self._slices = {name: each for each in stored for name in each.names}
        self._last: tuple[CheckpointSlice, dict[str, Tensor]] | None = None
        self._check()

    def _as_stored(self, each: CheckpointSlice) -> CheckpointSlice:
        """Adapt the slice to checkpoints with separate keys for each layer (`non_homogeneous_layers`)."""
        if not each.index or each.key in self.folder.chunks:
            return each
        key = each.key.replace("decoder.layers.", f"decoder.layers.{each.index[0]}.", 1)
        if key not in self.folder.chunks:
            return each
        return replace(each, key=key, index=each.index[1:], stacks=each.stacks[1:])

    def _check(self) -> None:
        path, held = self.folder.path, self.folder.chunks
        expected = {each.key: each for each in self._slices.values()}
        for key, each in expected.items():
            if key not in held:
                raise FileError(f"{path}: tensor {key} is missing")
            wanted, given = (*each.stacks, *each.mapping.shape), self.folder.shape(key)
            is_padded = each.mapping.padded and given[1:] == wanted[1:] and given[0] >= wanted[0]
            if given != wanted and not is_padded:
                raise FileError(f"{path}: {key} has shape {list(given)}, config.json implies {list(wanted)}")
            if (dtype := self.folder.dtype(key)) not in _FLOATS:
                raise FileError(f"{path}: {key} has dtype {dtype}; expected a floating-point dtype")
        parts = tuple(self.prefix + part for part in ("embedding.", "decoder.", "output_layer."))
        if unexpected := sorted(key for key in held if key.startswith(parts) and key not in expected):
            count = f"({len(unexpected)} in all): not in the model that config.json describes"
            raise FileError(f"{path}: unexpected tensor {unexpected[0]} {count}")

    def names(self) -> list[str]:
        """List the HF names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that config.json implies."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype."""
        return self.folder.dtype(self._slices[name].key)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor; the tensors of the same parameter are cached until another one is read."""
        each = self._slices[name]
        if self._last is None or self._last[0] is not each:
            self._last = None  # free before reading
            tensors = each.mapping.join([self.folder.read(each.key, each.index)])
            self._last = each, dict(zip(each.names, tensors, strict=True))
        return self._last[1][name]
