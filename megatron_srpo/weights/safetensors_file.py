"""Write a safetensors file tensor by tensor, header first, so that only one tensor is in memory."""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_srpo.distributed.files import DurableFile

# safetensors' names
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Writer:
    """Writer of the file `path`, which must not exist; raises ValueError for a dtype unknown to safetensors.

    tensors: {name: (dtype, shape)} of all tensors to come. They are laid out by decreasing element size, so
    that each is aligned, then in this order.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.path = path
        self._written: set[str] = set()
        self._tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # required by transformers
        end = 0
        for name, (dtype, shape) in sorted(self._tensors.items(), key=lambda item: -item[1][0].itemsize):
            if dtype not in _NAMES:
                raise ValueError(f"{path}: {name}: safetensors files cannot hold {dtype}")
            start, end = end, end + prod(shape) * dtype.itemsize
            self._offsets[name] = start
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._file = DurableFile(path)
        self._file.write_at(struct.pack("<Q", len(text)) + text, 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, in any order of names; a contiguous CPU tensor is not copied.

        Raises:
            ValueError: If the name, dtype or shape was not announced.
            FileError: If the file cannot be written, for example because the disk is full.
        """
        if name not in self._tensors:
            raise ValueError(f"{self.path}: {name}: was not announced")
        if name in self._written:
            raise ValueError(f"{self.path}: {name}: written twice")
        if (announced := self._tensors[name]) != (given := (tensor.dtype, tuple(tensor.shape))):
            raise ValueError(f"{self.path}: {name}: is {given}, announced as {announced}")
        self._file.write_at(bytes_of(tensor.cpu().contiguous()), self._data_start + self._offsets[name])
        self._written.add(name)

    def close(self) -> None:
        """Wait until the file is on disk. Raises ValueError if some tensors were not written."""
        self._file.close()
        if missing := [name for name in self._tensors if name not in self._written]:
            raise ValueError(f"{self.path}: {missing[0]} was not written ({len(missing)} in all)")


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    if not tensor.numel():
        return memoryview(b"")
    elements: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(elements)
