"""Read a Hugging Face folder through transformers' own loading code, a layer at a time, and compute logits.

transformers decides which parameter a stored tensor belongs to, and what is merged, tied or ignored. Our
tables of names have no part in it, so a comparison cannot repeat their mistakes.
"""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_srpo.distributed.files import FileError
from megatron_srpo.model.folder_files import weight_files
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights.safetensors_file import DTYPES
from megatron_srpo.weights.sources import Tensors

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def layer_of(name: str) -> str | None:
    """Return the number of the layer that a tensor belongs to."""
    found = _LAYER.search(name)
    return found and found.group(1)


class Reference:
    """transformers' model, on the meta device except for the parameters in use."""

    def __init__(self, folder: Path):
        """Build the model that config.json in `folder` describes."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.utils.logging import disable_progress_bar

        _ = HFFolder(folder).architecture  # a supported one, of a possible size
        disable_progress_bar()
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
        with torch.device("meta"):
            self.model: Any = kind(self.config).eval()
        self._conversions: Any = get_model_conversion_mapping(self.model)
        self._empty = dict(self.model.named_parameters(remove_duplicate=False))
        self.missing: set[str] = set()  # parameters that the last `load` did not fill

    def load(self, stored: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """Load tensors given by their stored names; return them by the names that transformers stores.

        Raises:
            FileError: If transformers ignores a tensor, or expects another shape.
        """
        from transformers.core_model_loading import (
            convert_and_load_state_dict_in_model,
            revert_weight_conversion,
        )
        from transformers.modeling_utils import LoadStateDictConfig

        self.model.to(dtype)
        settings = LoadStateDictConfig(dtype=dtype, device_map={"": device}, weight_mapping=self._conversions)
        info, _ = convert_and_load_state_dict_in_model(self.model, stored, settings)
        if faults := [*info.unexpected_keys, *info.mismatched_keys, *info.conversion_errors]:
            raise FileError(f"transformers cannot load {faults[0]} ({len(faults)} in all)")
        filled = set(self._empty) - info.missing_keys
        tied = self.model.all_tied_weights_keys
        if set(stored) & {*tied, *tied.values()}:  # removes what is stored twice and differs
            self.model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
            tied = self.model.all_tied_weights_keys
        self.missing = set(self._empty) - filled - set(tied)
        parameters = self.model.named_parameters(remove_duplicate=False)
        own = {name: value.detach() for name, value in parameters if name in filled and name not in tied}
        return revert_weight_conversion(self.model, own)

    def unload(self) -> None:
        """Return all parameters to the meta device."""
        for name, parameter in self._empty.items():
            module, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(module), last, parameter)

    def compute_logits(self, source: Tensors, ids: Tensor) -> Tensor:
        """Return fp32 logits of token ids; each module's weights are in memory only while it computes."""
        names, tied = source.names(), self.model.all_tied_weights_keys
        for name, module in list(self.model.named_modules()):
            if any(True for _ in module.buffers(recurse=False)):  # rotary frequencies: computed, not stored
                self.model.set_submodule(name, type(module)(config=self.config))
            elif layer_of(name + ".") is not None:
                if name.endswith(f"layers.{layer_of(name + '.')}"):
                    own = [each for each in names if layer_of(each) == layer_of(name + ".")]
                    self._load_for(module, source, own)
            elif any(True for _ in module.parameters(recurse=False)):
                own = [f"{name}.{each}" for each, _ in module.named_parameters(recurse=False)]
                self._load_for(module, source, [each if each in names else tied[each] for each in own])
        with torch.no_grad():
            return self.model(ids).logits

    def _load_for(self, module: torch.nn.Module, source: Tensors, names: list[str]) -> None:
        def before(*_: Any) -> None:
            self.load({name: source.tensor(name) for name in names}, torch.float32)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(lambda *_: self.unload())


class _Stored:
    """A tensor that is read when transformers asks for its content."""

    def __init__(self, file: Path, name: str):
        self.file, self.name = file, name

    def __getitem__(self, place: Any) -> Tensor:
        try:
            with safe_open(self.file, framework="pt") as opened:
                return opened.get_tensor(self.name)[place]
        except (SafetensorError, OSError) as error:
            raise FileError(f"{self.file}: {self.name} cannot be read: {error}") from None


class TransformersTensors:
    """The tensors of a Hugging Face folder as transformers loads them, with one layer in memory at a time."""

    def __init__(self, path: Path):
        """Read the headers of the files. Raises FileError if transformers cannot load the folder."""
        self.path, self._reference = path, Reference(path)
        self._stored: dict[str, _Stored] = {}
        self._headers: dict[str, Tensor] = {}
        for file in weight_files(path):
            self._read_headers(file)
        self._shapes = self._load(self._headers, torch.float32, "meta")
        if missing := sorted(self._reference.missing):
            raise FileError(f"{path}: tensor {missing[0]} is missing ({len(missing)} in all)")
        self._last: tuple[str, dict[str, Tensor]] = "", {}
        if self._is_tied():  # by transformers only if the stored matrices are equal
            meta = {name: tensor.to("meta") for name, tensor in self._part("ends").items()}
            self._shapes = meta | {name: each for name, each in self._shapes.items() if layer_of(name)}

    def _read_headers(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    part = opened.get_slice(name)
                    dtype = DTYPES.get(part.get_dtype(), torch.int8)
                    if not dtype.is_floating_point:
                        wanted = "expected one of F32, BF16 and F16 (quantised models cannot be read)"
                        raise FileError(f"{file}: {name} has dtype {part.get_dtype()}; {wanted}")
                    self._headers[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
                    self._stored[name] = _Stored(file, name)
        except (SafetensorError, OSError) as error:
            raise FileError(f"{file} is damaged or not a safetensors file: {error}") from None

    def _is_tied(self) -> bool:
        return bool(self._reference.config.tie_word_embeddings)

    def _key(self, name: str) -> str:
        """Return the part that is loaded with this tensor: its layer, itself, or all that may be tied."""
        return layer_of(name) or ("ends" if self._is_tied() else name)

    def _load(self, stored: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        try:
            return self._reference.load(stored, dtype, device)
        except FileError as error:
            raise FileError(f"{self.path}: {error}") from None
        finally:
            self._reference.unload()

    def _part(self, key: str) -> dict[str, Tensor]:
        if self._last[0] != key:
            self._last = "", {}
            stored = {name: each for name, each in self._stored.items() if self._key(name) == key}
            dtype = reduce(torch.promote_types, (self._headers[name].dtype for name in stored))
            self._last = key, self._load(stored, dtype, "cpu")
        return self._last[1]

    def names(self) -> list[str]:
        """List the names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._shapes[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype."""
        return self._headers[name].dtype

    def tensor(self, name: str) -> Tensor:
        """Read the tensor's layer, and return the tensor."""
        return self._part(self._key(name))[name]
