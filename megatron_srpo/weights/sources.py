"""Folders of weights, seen tensor by tensor in Hugging Face names.

Megatron's side has the names and global shapes of `GPTModel.sharded_state_dict()` as megatron-core's defaults
make them, which are Transformer Engine's: layers stacked (`decoder.layers.mlp.linear_fc2.weight` is [layers,
H, ffn]), experts stacked inside them (`decoder.layers.mlp.experts.experts.linear_fc2.weight` is [layers,
experts, H, ffn]), the norms that Transformer Engine fuses under the matrix after them, the vocabulary padded.
megatron-core's local layers ask for the same names, by their `sharded_state_dict_keys_map`, so either kind of
layers loads one checkpoint, and so do Megatron-LM's models, which are these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_srpo.distributed.files import FileError
from megatron_srpo.model.hf_folder import Architecture, HFFolder
from megatron_srpo.model.mapping import (
    EXPERT_MAPPINGS,
    LAYER_MAPPINGS,
    MODEL_MAPPINGS,
    VOCABULARY_TENSORS,
    TensorMapping,
    fused_name,
)
from megatron_srpo.weights.safetensors_file import DTYPES
from megatron_srpo.weights.torch_dist import Folder

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Tensors(Protocol):
    """A model's tensors in HF names.

    Reading one may raise FileError or ConfigError, which name file and tensor.
    """

    def names(self) -> list[str]:
        """All names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """As HF folders hold it."""

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""

    def tensor(self, name: str) -> Tensor:
        """A CPU tensor."""


class HFTensors:
    """The tensors of a Hugging Face folder.

    Raises ConfigError or FileError when one is missing, unexpected, or not of its shape.
    """

    def __init__(self, folder: HFFolder):
        self.folder, self._shapes = folder, folder.architecture.tensor_shapes()
        self._opened: tuple[Path, Any] | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        for name, file in sorted(folder.file_of.items(), key=lambda item: item[1]):
            kind = self._open(file).get_slice(name).get_dtype()
            if DTYPES.get(kind) not in _FLOATS:
                raise FileError(
                    f"{file}: {name} has dtype {kind}; expected one of F32, BF16 and F16 (quantised models cannot be read)"
                )
            self._dtypes[name] = DTYPES[kind]

    def _open(self, file: Path) -> Any:
        """The file, and no other: what is mapped and was read counts as this process's memory."""
        if self._opened is None or self._opened[0] != file:
            self._opened = file, safe_open(file, framework="pt")
        return self._opened[1]

    def names(self) -> list[str]:
        """All names."""
        return list(self.folder.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """As in the file."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """As in the file."""
        return self._dtypes[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped from the file."""
        file = self.folder.file_of[name]
        try:
            return self._open(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FileError(f"{file}: {name} cannot be read: {error}") from None


@dataclass(frozen=True)
class CheckpointSlice:
    """One table mapping in one layer (and expert): part `index` of the tensor `key` of a Megatron checkpoint, HF
    tensors `names`.

    stacks: the sizes of the leading dimensions that `index` counts in: (), (layers,) or (layers, experts).
    """

    mapping: TensorMapping
    key: str
    index: tuple[int, ...]
    stacks: tuple[int, ...]
    names: tuple[str, ...]


def checkpoint_slices(architecture: Architecture) -> Iterator[CheckpointSlice]:
    """Where each tensor of the architecture lies in a Megatron checkpoint, from the model's first layer to
    its last.
    """
    held, layers, experts = (
        architecture.tensor_shapes(),
        architecture.num_hidden_layers,
        architecture.num_experts,
    )

    def in_model(
        mappings: tuple[TensorMapping, ...],
        stem: str,
        prefix: str,
        index: tuple[int, ...],
        stacks: tuple[int, ...],
    ) -> Iterator[CheckpointSlice]:
        for mapping in mappings:
            names = tuple(prefix + name for name in mapping.hf)
            if names[0] in held:
                yield CheckpointSlice(
                    mapping, stem + fused_name(mapping, dense=not experts), index, stacks, names
                )

    yield from in_model(MODEL_MAPPINGS[:1], "", "", (), ())
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield from in_model(LAYER_MAPPINGS, "decoder.layers.", prefix, (layer,), (layers,))
        for expert in range(experts):
            stem, inner = "decoder.layers.mlp.experts.experts.", f"{prefix}mlp.experts.{expert}."
            yield from in_model(EXPERT_MAPPINGS, stem, inner, (layer, expert), (layers, experts))
    yield from in_model(MODEL_MAPPINGS[1:], "", "", (), ())


def slice_shape(place: CheckpointSlice, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the part, its vocabulary not padded: every merge lines its pieces, of HF `shapes`, up
    along their first dimension.
    """
    pieces = [shapes[name] for name in place.names]
    return sum(shape[0] for shape in pieces), *pieces[0][1:]


def empty_objects(architecture: Architecture) -> list[str]:
    """Keys of the `_extra_state` objects that megatron-core's layers ask for, local and Transformer
    Engine's; bf16 models store none.
    """
    layers, experts = architecture.num_hidden_layers, architecture.num_experts
    modules = [
        f"self_attention.{name}"
        for name in ("core_attention", "linear_qkv", "linear_proj", "q_layernorm", "k_layernorm")
    ]
    modules += ["pre_mlp_layernorm"] if experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    keys = [
        f"decoder.layers.{module}._extra_state/shard_{n}_{layers}"
        for module in modules
        for n in range(layers)
    ]
    for name in ("linear_fc1", "linear_fc2"):
        stem = f"decoder.layers.mlp.experts.experts.{name}._extra_state"
        keys += [f"{stem}/shard_{n}.{e}_{layers}.{experts}" for n in range(layers) for e in range(experts)]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]


class MegatronTensors:
    """The tensors of a torch_dist checkpoint of `architecture`, trained or converted. Optimizer states and
    the like are ignored.

    Raises FileError when one is missing, unexpected, or not of the shape that the architecture implies.
    """

    def __init__(self, path: Path, architecture: Architecture):
        self.folder, self.architecture = Folder(path), architecture
        self._shapes = architecture.tensor_shapes()
        stored = map(self._as_stored, checkpoint_slices(architecture))
        self._places = {name: place for place in stored for name in place.names}
        self._last: tuple[CheckpointSlice, dict[str, Tensor]] | None = None
        self._check()

    def _as_stored(self, place: CheckpointSlice) -> CheckpointSlice:
        """Megatron can keep each layer under keys of its own (`non_homogeneous_layers`), as where experts
        are not in all of them.
        """
        single = (
            place.key.replace("decoder.layers.", f"decoder.layers.{place.index[0]}.", 1)
            if place.index
            else place.key
        )
        if place.key in self.folder.chunks or single not in self.folder.chunks:
            return place
        return replace(place, key=single, index=place.index[1:], stacks=place.stacks[1:])

    def _check(self) -> None:
        held, expected = self.folder.chunks, dict.fromkeys(place.key for place in self._places.values())
        for place in self._places.values():
            if place.key not in held:
                raise FileError(f"{self.folder.path}: tensor {place.key} is missing")
            wanted, given = (*place.stacks, *slice_shape(place, self._shapes)), self.folder.shape(place.key)
            padded = (
                place.names[0] in VOCABULARY_TENSORS and given[1:] == wanted[1:] and given[0] >= wanted[0]
            )
            if given != wanted and not padded:
                raise FileError(
                    f"{self.folder.path}: {place.key} has shape {list(given)}, config.json implies {list(wanted)}"
                )
            if self.folder.dtype(place.key) not in _FLOATS:
                raise FileError(
                    f"{self.folder.path}: {place.key} has dtype {self.folder.dtype(place.key)}; expected a floating-point one"
                )
        parts = ("embedding.", "decoder.", "output_layer.")
        if unexpected := sorted(key for key in held if key.startswith(parts) and key not in expected):
            raise FileError(
                f"{self.folder.path}: unexpected tensor {unexpected[0]} ({len(unexpected)} in all): config.json has no place for it"
            )

    def names(self) -> list[str]:
        """All names."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without the vocabulary's padding."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self.folder.dtype(self._places[name].key)

    def tensor(self, name: str) -> Tensor:
        """Cut from its mapping; the mapping's other tensors are kept until another mapping is asked for."""
        place = self._places[name]
        if self._last is None or self._last[0] != place:
            self._last = None  # free before reading
            pieces = place.mapping.split(self.folder.read(place.key, place.index), self.architecture)
            self._last = place, dict(zip(place.names, pieces, strict=True))
        tensor = self._last[1][name]
        return tensor[: self.architecture.vocab_size] if name in VOCABULARY_TENSORS else tensor


def checkpoint_folder(path: Path) -> Path:
    """The folder that holds the checkpoint: `path`, or what Megatron-LM's latest_checkpointed_iteration.txt
    in it names.
    """
    tracker = path / "latest_checkpointed_iteration.txt"
    if (path / "metadata.json").exists() or not tracker.exists():
        return path
    name = tracker.read_text(errors="replace").strip()
    if name == "release":
        return path / name
    if not (name.isascii() and name.isdigit()):
        raise FileError(f"{tracker}: expected an iteration or 'release', found {name[:40]!r}")
    return path / f"iter_{int(name):07d}"


def open_tensors(path: Path, reference: HFFolder | None = None) -> Tensors:
    """The tensors of the HF or Megatron folder at `path`.

    reference: says the architecture of a Megatron folder that has no config.json of its own (converted ones
    have). Raises FileError or ConfigError for a folder that is neither.
    """
    folder = checkpoint_folder(path)
    if not (folder / "metadata.json").exists():
        return HFTensors(HFFolder(path))
    if reference is None:
        reference = architecture_folder(path)
    if reference is None:
        raise FileError(
            f"{folder}: has no config.json to tell its architecture; name a Hugging Face folder with --hf-reference"
        )
    return MegatronTensors(folder, reference.architecture)


def architecture_folder(path: Path) -> HFFolder | None:
    """The folder at `path`, HF or converted, as one with a config.json; None if it has none."""
    folder = checkpoint_folder(path)
    return HFFolder(folder) if (folder / "config.json").exists() else None
