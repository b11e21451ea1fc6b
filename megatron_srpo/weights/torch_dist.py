"""megatron-core's checkpoint format `torch_dist`, written and read tensor by tensor, without building a
model.

It is the file format of torch.distributed.checkpoint: `.metadata` (a pickle) says of every tensor its global
shape and where each chunk of it lies, in `__R_K.distcp` files as `torch.save` streams at offsets;
`metadata.json` and `common.pt` are megatron-core's. `megatron.core.dist_checkpointing.load` takes what the
Writer wrote at any layout, since torch cuts the pieces a rank needs from the chunks there are.

No pickle that a file brings is trusted: `.metadata` is read by an unpickler that knows the dataclasses of the
format and nothing else, tensors by `torch.load(weights_only=True)`; `common.pt` is not read.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_srpo.distributed.files import DurableFile, FileError

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_ALIGNMENT = 64  # bytes, as torch.save aligns elements within its stream: they can be mapped from the file
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


@dataclass(frozen=True)
class Chunk:
    """Where a piece of a tensor lies: offset and shape in the tensor, and bytes in a file.

    `length` is in bytes, too.
    """

    key: str
    dtype: str
    tensor_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


# ---- writing
# ---------------------------------------------------------------------------------------------------------


class _Stream(io.RawIOBase):
    """The end of a DurableFile as `torch.save` wants it."""

    def __init__(self, file: DurableFile):
        self.file, self.end = file, 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.file.write_at(data, self.end)
        self.end += len(data)
        return len(data)


class Writer:
    """One rank's file of a folder; `write_metadata` joins all ranks' chunks to a checkpoint.

    writer = Writer(folder, rank)
    writer.write(key, tensor, tensor_shape, start)
    chunks = writer.close()
    """

    def __init__(self, folder: Path, rank: int):
        self._name = f"__{rank}_0.distcp"
        self._file = DurableFile(folder / self._name)
        self._stream = _Stream(self._file)
        self._chunks: list[Chunk] = []

    def write(self, key: str, tensor: Tensor, tensor_shape: Sequence[int], start: Sequence[int]) -> None:
        """Append `tensor`, a CPU tensor, as the chunk of `key` at `start`, in elements.

        tensor_shape: the global shape. With more dimensions than `tensor`, the leading ones are stacks of it:
        layers, experts.
        """
        shape = (1,) * (len(tensor_shape) - tensor.dim()) + tuple(tensor.shape)
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # torch.save writes whole storages
            tensor = tensor.clone()
        self._stream.end += -self._stream.end % _ALIGNMENT
        offset = self._stream.end
        try:
            torch.save(tensor.view(shape), self._stream)
        except RuntimeError as error:
            if isinstance(
                error.__context__, FileError
            ):  # torch ends its zip file all the same, and trips over the missing bytes
                raise error.__context__ from None
            raise
        length = self._stream.end - offset
        self._chunks.append(
            Chunk(
                key, str(tensor.dtype), tuple(tensor_shape), tuple(start), shape, self._name, offset, length
            )
        )

    def write_nothing(self) -> Chunk:
        """Append an empty object, megatron-core's `_extra_state` of layers that have none; many keys may
        stand for it.
        """
        offset = self._stream.end
        torch.save([None], self._stream)
        return Chunk("", "", (), (), (), self._name, offset, self._stream.end - offset)

    def close(self) -> list[Chunk]:
        """Wait until the file is on disk; returns its tensors' chunks."""
        self._file.close()
        return self._chunks


def write_metadata(folder: Path, chunks: Sequence[Chunk], empty: Chunk, empty_keys: Sequence[str]) -> None:
    """Write `.metadata`, `common.pt` and `metadata.json` for all ranks' chunks. `empty_keys`: objects that
    hold nothing, all at `empty`.

    `common.pt` is empty: what `dist_checkpointing.load` returns is then exactly what it was asked for.
    """
    tensors: dict[str, metadata.TensorStorageMetadata | metadata.BytesStorageMetadata] = {}
    places: dict[metadata.MetadataIndex, filesystem._StorageInfo] = {}
    for chunk in chunks:
        if chunk.key not in tensors:
            properties = metadata.TensorProperties(dtype=_DTYPES[chunk.dtype])
            tensors[chunk.key] = metadata.TensorStorageMetadata(
                properties, torch.Size(chunk.tensor_shape), []
            )
        pieces = tensors[chunk.key].chunks
        pieces.append(metadata.ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.shape)))
        index = metadata.MetadataIndex(chunk.key, chunk.start, len(pieces) - 1)
        places[index] = filesystem._StorageInfo(chunk.file, chunk.offset, chunk.length)
    for key in empty_keys:
        tensors[key] = metadata.BytesStorageMetadata()
        places[metadata.MetadataIndex(key)] = filesystem._StorageInfo(empty.file, empty.offset, empty.length)
    whole = metadata.Metadata(
        tensors, storage_data=places, storage_meta=metadata.StorageMeta(), version="1.0.0"
    )
    try:
        (folder / ".metadata").write_bytes(pickle.dumps(whole))
        torch.save({}, folder / "common.pt")
        (folder / "metadata.json").write_text(json.dumps(_FORMAT))
    except (OSError, RuntimeError) as error:
        raise FileError(f"{folder}: cannot be written: {error}") from None


def chunks_to_json(chunks: Sequence[Chunk]) -> bytes:
    """What one rank tells another."""
    return json.dumps([asdict(chunk) for chunk in chunks]).encode()


def chunks_from_json(text: bytes) -> list[Chunk]:
    """The inverse of `chunks_to_json`."""
    return [
        Chunk(**{key: tuple(v) if isinstance(v, list) else v for key, v in chunk.items()})
        for chunk in json.loads(text)
    ]


# ---- reading
# ---------------------------------------------------------------------------------------------------------


class _Ignored:
    """Stands for objects in `.metadata` that say nothing of tensors."""

    def __init__(self, *_, **__):
        pass


_PLAIN = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        *(
            metadata.Metadata,
            metadata.TensorStorageMetadata,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
        ),
        *(
            metadata.TensorProperties,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
        ),
        *(filesystem._StorageInfo, planner.WriteItemType, torch.Size),
    )
}
# Megatron keeps the plans of its ranks beside; torch pickles the folder's path as it was and the layout by
# name.
_PLAIN |= {
    (planner.__name__, name): _Ignored
    for name in ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData")
}
_PLAIN |= {
    ("megatron.core.dist_checkpointing.strategies.torch", name): _Ignored
    for name in ("MCoreMetadata", "MCoreSavePlan")
}
_PLAIN |= {("pathlib", name): _Ignored for name in ("PosixPath", "PurePosixPath", "Path")}
_PLAIN |= {
    ("pathlib._local", name): _Ignored for name in ("PosixPath", "PurePosixPath", "Path")
}  # Python 3.13
_PLAIN |= {("torch.serialization", "_get_layout"): _Ignored}


class _Unpickler(pickle.Unpickler):
    """Knows the format's dataclasses and torch's dtypes; refuses everything else before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and f"torch.{name}" in _DTYPES:
            return _DTYPES[f"torch.{name}"]
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which has no place in a checkpoint's metadata"
        )


class _Slice(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: io.FileIO, offset: int, length: int):
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        )
        return self.position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.position)]
        read = os.preadv(self.file.fileno(), [view], self.offset + self.position)
        self.position += read
        return read


class Folder:
    """A torch_dist checkpoint at `path`.

    Raises FileError, naming file and key, for whatever is wrong with it.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._files: dict[str, tuple[io.FileIO, Tensor]] = {}

    @cached_property
    def chunks(self) -> dict[str, list[Chunk]]:
        """The chunks of every tensor. Checks that the files are there and long enough."""
        whole = self._read_metadata()
        found: dict[str, list[Chunk]] = {}
        ends: dict[str, tuple[int, str]] = {}
        try:
            for key, tensor in whole.state_dict_metadata.items():
                if isinstance(tensor, metadata.TensorStorageMetadata):
                    if not tensor.chunks:
                        raise ValueError(f"{key} has no chunks")
                    found[key] = [
                        self._chunk(whole.storage_data, key, tensor, piece) for piece in tensor.chunks
                    ]
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise FileError(
                f"{self.path / '.metadata'}: is not the metadata of a checkpoint: {error!r}"
            ) from None
        for chunk in (chunk for chunks in found.values() for chunk in chunks):
            ends[chunk.file] = max(ends.get(chunk.file, (0, "")), (chunk.offset + chunk.length, chunk.key))
        for name, (end, key) in ends.items():
            file = self.path / name
            if Path(name).name != name or not file.is_file():
                raise FileError(f"{file}: is missing ({key} lies in it)")
            if (size := file.stat().st_size) < end:
                raise FileError(f"{file}: is truncated: it has {size} bytes, but {key} ends at {end}")
        return found

    def _read_metadata(self) -> metadata.Metadata:
        file = self.path / "metadata.json"
        try:
            backend = json.loads(file.read_text()).get("sharded_backend")
        except (OSError, ValueError, AttributeError) as error:
            raise FileError(
                f"{file}: cannot be read ({error}); is {self.path} a megatron-core checkpoint?"
            ) from None
        if backend != "torch_dist":
            raise FileError(f"{file}: sharded_backend is {backend!r}; only 'torch_dist' can be read")
        file = self.path / ".metadata"
        try:
            with file.open("rb") as stream:
                whole = _Unpickler(stream).load()
        except OSError as error:
            raise FileError(f"{file}: cannot be read: {error.strerror}") from None
        except Exception as error:  # a damaged pickle raises whatever its bytes make of it
            raise FileError(f"{file}: is damaged or no checkpoint's metadata: {error}") from None
        if not isinstance(whole, metadata.Metadata):
            raise FileError(f"{file}: is not the metadata of a checkpoint but a {type(whole).__name__}")
        return whole

    def _chunk(
        self,
        places: dict,
        key: str,
        tensor: metadata.TensorStorageMetadata,
        piece: metadata.ChunkStorageMetadata,
    ) -> Chunk:
        place = places[metadata.MetadataIndex(key, piece.offsets)]
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{key} is stored with {place.transform_descriptors}, which cannot be read")
        dtype = str(tensor.properties.dtype)
        chunk = Chunk(
            *(key, dtype, tuple(tensor.size), tuple(piece.offsets), tuple(piece.sizes)),
            *(place.relative_path, place.offset, place.length),
        )
        bounds = zip(chunk.start, chunk.shape, chunk.tensor_shape, strict=True)
        lies_inside = all(0 <= start <= start + size <= whole for start, size, whole in bounds)
        if (
            not lies_inside
            or dtype not in _DTYPES
            or not isinstance(chunk.file, str)
            or min(chunk.offset, chunk.length) < 0
        ):
            raise ValueError(f"{key} has an impossible chunk, {chunk}")
        return chunk

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of tensor `key`."""
        return _DTYPES[self.chunks[key][0].dtype]

    def shape(self, key: str) -> tuple[int, ...]:
        """The global shape of tensor `key`."""
        return self.chunks[key][0].tensor_shape

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Tensor `key`, or the part of it at `index` of its leading dimensions, put together from its
        chunks.
        """
        depth, shape = len(index), self.shape(key)[len(index) :]
        whole, filled = None, 0
        for chunk in self.chunks[key]:
            if any(
                not start <= i < start + n
                for i, start, n in zip(index, chunk.start, chunk.shape, strict=False)
            ):
                continue
            piece = self._load(chunk)[tuple(i - start for i, start in zip(index, chunk.start, strict=False))]
            if piece.shape == shape:
                return piece
            if whole is None:
                whole = torch.empty(shape, dtype=piece.dtype)
            whole[
                tuple(
                    slice(start, start + n) for start, n in zip(chunk.start[depth:], piece.shape, strict=True)
                )
            ] = piece
            filled += piece.numel()
        if filled != prod(shape):
            raise FileError(
                f"{self.path}: {key}: its chunks hold {filled} of {prod(shape)} elements"
                + (f" at {index}" if index else "")
            )
        return whole

    def _load(self, chunk: Chunk) -> Tensor:
        """The chunk, mapped from the file where it lies there plainly, as Megatron's and ours do."""
        file = self.path / chunk.file
        if chunk.file not in self._files:
            size = file.stat().st_size
            self._files[chunk.file] = (
                file.open("rb", buffering=0),
                torch.from_file(str(file), size=size, dtype=torch.uint8),
            )
        opened, content = self._files[chunk.file]
        stream = _Slice(opened, chunk.offset, chunk.length)
        try:
            tensor = torch.load(stream, map_location="meta", weights_only=True)
            start = chunk.offset + _start_of_data(stream)
        except Exception as error:  # zip and pickle readers raise whatever damaged bytes make of them
            raise FileError(f"{file}: {chunk.key} at byte {chunk.offset} is damaged: {error}") from None
        if (
            not isinstance(tensor, Tensor)
            or str(tensor.dtype) != chunk.dtype
            or tensor.numel() != prod(chunk.shape)
        ):
            given = (
                f"{tensor.dtype} {list(tensor.shape)}"
                if isinstance(tensor, Tensor)
                else type(tensor).__name__
            )
            said = f"{chunk.dtype} {list(chunk.shape)}"
            raise FileError(f"{file}: {chunk.key} at byte {chunk.offset} is {given}, .metadata says {said}")
        if not tensor.is_contiguous() or tensor.storage_offset():
            return torch.load(stream, weights_only=True).reshape(chunk.shape)
        data = content[start : start + tensor.nbytes]
        if start % tensor.itemsize:
            data = data.clone()
        return data.view(tensor.dtype).view(chunk.shape)


def _start_of_data(stream: _Slice) -> int:
    """Where in a `torch.save` stream the elements of its one tensor start.

    Raises ValueError or BadZipFile.
    """
    stream.seek(0)
    [record] = [
        record for record in zipfile.ZipFile(stream).infolist() if record.filename.endswith("/data/0")
    ]
    stream.seek(record.header_offset)
    header = stream.read(30)
    if record.compress_type != zipfile.ZIP_STORED or len(header) < 30:
        raise ValueError("its elements are compressed")
    stream.seek(0)
    return (
        record.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    )  # after the lengths: the name, the extra field
