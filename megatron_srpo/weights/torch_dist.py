"""Write and read megatron-core's checkpoint format `torch_dist` tensor by tensor, without a model.

It is the file format of torch.distributed.checkpoint: `.metadata` (a pickle) holds every tensor's global
shape and the locations of its chunks, which are `torch.save` streams at offsets in `__R_K.distcp` files.
`metadata.json` and `common.pt` are megatron-core's, whose `dist_checkpointing.load` reads it on any layout.

No pickle is trusted: `.metadata` is read by an unpickler that accepts only the dataclasses of the format,
tensors by `torch.load(weights_only=True)`; `common.pt` is not read.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner
from typing_extensions import override

from megatron_srpo.distributed.files import DurableFile, FileError, sync

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
METADATA_FILES = (".metadata", "common.pt", "metadata.json")
_BUFFER_BYTES = 2**16
_ALIGNMENT = 64  # bytes, as in torch.save's own streams, so that elements can be mapped from the file
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


@dataclass(frozen=True)
class Chunk:
    """The location of a chunk of a tensor: start and shape in it; offset and length in a file, in bytes."""

    key: str
    dtype: str
    tensor_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class RankFile:
    """One rank's file: its size and CRC-32, its tensors' chunks, and an empty object in it."""

    name: str
    bytes: int
    crc32: int
    chunks: list[Chunk]
    empty: Chunk

    def to_json(self) -> str:
        """Return the description as JSON, to send to the first rank."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankFile:
        """Invert `to_json`."""
        values = json.loads(text)
        chunks = [_chunk_of(chunk) for chunk in values["chunks"]]
        return cls(**(values | {"chunks": chunks, "empty": _chunk_of(values["empty"])}))


def _chunk_of(values: dict[str, Any]) -> Chunk:
    for key in ("tensor_shape", "start", "shape"):
        values[key] = tuple(values[key])
    return Chunk(**values)


class _Stream(io.RawIOBase):
    """A stream that appends to a DurableFile, for `torch.save`; small writes are buffered."""

    def __init__(self, file: DurableFile):
        self.file, self.end, self.crc32 = file, 0, 0
        self._pending, self._drained = bytearray(), 0

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: Any) -> int:
        self.end += len(data)
        if len(data) >= _BUFFER_BYTES:
            self.drain()
            self._put(data)
        else:
            self._pending += data
            if len(self._pending) >= _BUFFER_BYTES:
                self.drain()
        return len(data)

    def drain(self) -> None:
        pending, self._pending = self._pending, bytearray()
        self._put(pending)

    def _put(self, data: Any) -> None:
        self.file.write_at(data, self._drained)
        self.crc32 = zlib.crc32(data, self.crc32)
        self._drained += len(data)


class Writer:
    """Writer of one rank's file in a folder; `write_metadata` turns all ranks' files into a checkpoint."""

    def __init__(self, folder: Path, rank: int):
        self.name = f"__{rank}_0.distcp"
        self._file = DurableFile(folder / self.name)
        self._stream = _Stream(self._file)
        self._chunks: list[Chunk] = []
        torch.save([None], self._stream)  # pyright: ignore[reportArgumentType]
        self._empty = Chunk("", "", (), (), (), self.name, 0, self._stream.end)

    def write(self, key: str, tensor: Tensor, tensor_shape: Sequence[int], start: Sequence[int]) -> None:
        """Append `tensor`, a CPU tensor, as the chunk of `key` at `start`, in elements.

        Leading dimensions that only the global `tensor_shape` has are stacks: layers, experts.
        """
        shape = (1,) * (len(tensor_shape) - tensor.dim()) + tuple(tensor.shape)
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # torch.save writes complete storages
            tensor = tensor.clone()
        self._stream.write(bytes(-self._stream.end % _ALIGNMENT))
        offset = self._stream.end
        try:
            torch.save(tensor.view(shape), self._stream)  # pyright: ignore[reportArgumentType]
        except RuntimeError as error:
            if isinstance(error.__context__, FileError):  # the cause; torch then failed to end its zip file
                raise error.__context__ from None
            raise
        length = self._stream.end - offset
        place = self.name, offset, length
        self._chunks.append(Chunk(key, str(tensor.dtype), tuple(tensor_shape), tuple(start), shape, *place))

    def close(self) -> RankFile:
        """Wait until the file is on disk, and return its description."""
        self._stream.drain()
        self._file.close()
        return RankFile(self.name, self._stream.end, self._stream.crc32, self._chunks, self._empty)


def write_metadata(folder: Path, files: Sequence[RankFile], empty_keys: Sequence[str] = ()) -> None:
    """Write `.metadata`, `common.pt` and `metadata.json` for all ranks' files.

    `common.pt` is empty, so `dist_checkpointing.load` returns exactly the tensors requested. `empty_keys` are
    the keys of megatron-core's `_extra_state` objects, which are empty here.
    """
    tensors: dict[str, metadata.TensorStorageMetadata | metadata.BytesStorageMetadata] = {}
    places: dict[metadata.MetadataIndex, filesystem._StorageInfo] = {}
    pieces: dict[str, list[metadata.ChunkStorageMetadata]] = {}
    empty = files[0].empty
    for chunk in (chunk for file in files for chunk in file.chunks):
        if chunk.key not in tensors:
            properties = metadata.TensorProperties(dtype=_DTYPES[chunk.dtype])
            size, pieces[chunk.key] = torch.Size(chunk.tensor_shape), []
            tensors[chunk.key] = metadata.TensorStorageMetadata(properties, size, pieces[chunk.key])
        piece = metadata.ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.shape))
        index = metadata.MetadataIndex(chunk.key, chunk.start, len(pieces[chunk.key]))
        pieces[chunk.key].append(piece)
        places[index] = filesystem._StorageInfo(chunk.file, chunk.offset, chunk.length)
    for key in empty_keys:
        tensors[key] = metadata.BytesStorageMetadata()
        places[metadata.MetadataIndex(key)] = filesystem._StorageInfo(empty.file, empty.offset, empty.length)
    storage = metadata.StorageMeta()
    whole = metadata.Metadata(tensors, storage_data=places, storage_meta=storage, version="1.0.0")
    try:
        (folder / ".metadata").write_bytes(pickle.dumps(whole))
        torch.save({}, folder / "common.pt")
        (folder / "metadata.json").write_text(json.dumps(_FORMAT))
        for name in METADATA_FILES:
            sync(folder / name)
    except (OSError, RuntimeError) as error:
        raise FileError(f"{folder}: cannot be written: {error}") from None


class _Ignored:
    """A replacement for objects in `.metadata` that do not concern tensors."""

    def __init__(self, *_, **__):
        pass


_TYPES = (
    metadata.Metadata,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    planner.WriteItemType,
    torch.Size,
)
# Megatron stores its ranks' plans there; torch pickles the folder's path, and the tensors' layout by name.
_IGNORED = {
    planner.__name__: ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "pathlib": ("PosixPath", "PurePosixPath", "Path"),
    "pathlib._local": ("PosixPath", "PurePosixPath", "Path"),  # Python 3.13
    "torch.serialization": ("_get_layout",),
}
_ALLOWED: dict[tuple[str, str], Any] = {(kind.__module__, kind.__name__): kind for kind in _TYPES}
_ALLOWED |= {(module, name): _Ignored for module, names in _IGNORED.items() for name in names}


class _Unpickler(pickle.Unpickler):
    """An unpickler of the format's dataclasses and torch's dtypes; rejects other classes before import."""

    @override
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in _ALLOWED:
            return _ALLOWED[module_name, global_name]
        if module_name == "torch" and f"torch.{global_name}" in _DTYPES:
            return _DTYPES[f"torch.{global_name}"]
        name = f"{module_name}.{global_name}"
        raise pickle.UnpicklingError(f"it refers to {name}, which is not allowed in a checkpoint's metadata")


class _Slice(io.RawIOBase):
    """A byte range of a file, as a file."""

    def __init__(self, file: io.FileIO, offset: int, length: int):
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self.position

    @override
    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = base + offset
        return self.position

    @override
    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.position)]
        read = os.preadv(self.file.fileno(), [view], self.offset + self.position)
        self.position += read
        return read


class Folder:
    """The torch_dist checkpoint at `path`. Raises FileError, with file and key, if it is damaged."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._files: dict[str, tuple[io.FileIO, Tensor]] = {}

    @cached_property
    def chunks(self) -> dict[str, list[Chunk]]:
        """The chunks of every tensor. Checks that their files exist and are long enough."""
        whole = self._read_metadata()
        found: dict[str, list[Chunk]] = {}
        try:
            for key, tensor in whole.state_dict_metadata.items():
                if isinstance(tensor, metadata.TensorStorageMetadata):
                    if not tensor.chunks:
                        raise ValueError(f"{key} has no chunks")
                    places = whole.storage_data
                    found[key] = [_chunk(places, key, tensor, piece) for piece in tensor.chunks]
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            file = self.path / ".metadata"
            raise FileError(f"{file}: is not the metadata of a checkpoint: {error!r}") from None
        self._check_files(found)
        return found

    def _check_files(self, chunks_by_key: dict[str, list[Chunk]]) -> None:
        ends: dict[str, tuple[int, str]] = {}
        for chunks in chunks_by_key.values():
            for chunk in chunks:
                end = chunk.offset + chunk.length, chunk.key
                ends[chunk.file] = max(ends.get(chunk.file, (0, "")), end)
        for name, (end, key) in ends.items():
            file = self.path / name
            if Path(name).name != name or not file.is_file():
                raise FileError(f"{file}: is missing; it should hold {key}")
            if (size := file.stat().st_size) < end:
                raise FileError(f"{file}: is truncated: it has {size} bytes, but {key} ends at {end}")

    def _read_metadata(self) -> metadata.Metadata:
        file = self.path / "metadata.json"
        try:
            backend = json.loads(file.read_text()).get("sharded_backend")
        except (OSError, ValueError, AttributeError) as error:
            problem = f"cannot be read ({error}); is {self.path} a megatron-core checkpoint?"
            raise FileError(f"{file}: {problem}") from None
        if backend != "torch_dist":
            raise FileError(f"{file}: sharded_backend is {backend!r}; only 'torch_dist' can be read")
        file = self.path / ".metadata"
        try:
            with file.open("rb") as stream:
                whole = _Unpickler(stream).load()
        except OSError as error:
            raise FileError(f"{file}: cannot be read: {error.strerror}") from None
        except Exception as error:  # a damaged pickle may raise any error
            raise FileError(f"{file}: is damaged or not a checkpoint's metadata: {error}") from None
        if not isinstance(whole, metadata.Metadata):
            raise FileError(f"{file}: is not the metadata of a checkpoint but a {type(whole).__name__}")
        return whole

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of tensor `key`."""
        return _DTYPES[self.chunks[key][0].dtype]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the global shape of tensor `key`."""
        return self.chunks[key][0].tensor_shape

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Read tensor `key`, or its part at `index` of the leading dimensions."""
        shape = self.shape(key)[len(index) :]
        start, ones = (*index, *(0 for _ in shape)), (1,) * len(index)
        return self.read_region(key, start, (*ones, *shape)).view(shape)

    def read_region(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Read the region of `shape` at `start` in tensor `key`; the result may be mapped from the file."""
        whole, filled = None, 0
        for chunk in self._chunks_near(key, start, shape):
            spans = list(zip(start, shape, chunk.start, chunk.shape, strict=True))
            bounds = [(max(s, c), min(s + n, c + m)) for s, n, c, m in spans]
            if any(low >= high for low, high in bounds):
                continue
            inside = tuple(slice(lo - c, hi - c) for (lo, hi), c in zip(bounds, chunk.start, strict=True))
            piece = self._load(chunk)[inside]
            if piece.shape == shape:
                return piece
            if whole is None:
                whole = torch.empty(shape, dtype=piece.dtype)
            whole[tuple(slice(lo - s, hi - s) for (lo, hi), s in zip(bounds, start, strict=True))] = piece
            filled += piece.numel()
        if whole is None or filled != whole.numel():
            region = f" of the part at {list(start)}" if any(start) or shape != self.shape(key) else ""
            raise FileError(f"{self.path}: {key}: its chunks hold {filled} of {prod(shape)} elements{region}")
        return whole

    def _chunks_near(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> list[Chunk]:
        """Return the chunks that may overlap a region; in a stack of layers, those of the region's layer."""
        if len(shape) < 3 or shape[0] != 1:
            return self.chunks[key]
        return self._chunks_by_layer[key].get(start[0], [])

    @cached_property
    def _chunks_by_layer(self) -> dict[str, dict[int, list[Chunk]]]:
        found: dict[str, dict[int, list[Chunk]]] = {}
        for key, chunks in self.chunks.items():
            layers = found.setdefault(key, {})
            for chunk in chunks if len(chunks[0].shape) >= 3 else ():
                for layer in range(chunk.start[0], chunk.start[0] + chunk.shape[0]):
                    layers.setdefault(layer, []).append(chunk)
        return found

    def _load(self, chunk: Chunk) -> Tensor:
        """Map the chunk from the file if it is stored contiguously, as Megatron's chunks and ours are."""
        file = self.path / chunk.file
        if chunk.file not in self._files:
            content = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
            self._files[chunk.file] = file.open("rb", buffering=0), content
        opened, content = self._files[chunk.file]
        stream: Any = _Slice(opened, chunk.offset, chunk.length)
        try:
            tensor = torch.load(stream, map_location="meta", weights_only=True)
            start = chunk.offset + _start_of_data(stream)
        except Exception as error:  # zip and pickle readers may raise any error for damaged bytes
            raise FileError(f"{file}: {chunk.key} at byte {chunk.offset} is damaged: {error}") from None
        given = type(tensor).__name__
        if isinstance(tensor, Tensor):
            given = f"{tensor.dtype} {list(tensor.shape)}"
            if str(tensor.dtype) == chunk.dtype and tensor.numel() == prod(chunk.shape):
                return self._map(chunk, stream, content, tensor, start)
        expected = f"{chunk.dtype} {list(chunk.shape)}"
        raise FileError(f"{file}: {chunk.key} at byte {chunk.offset} is {given}, .metadata says {expected}")

    @staticmethod
    def _map(chunk: Chunk, stream: Any, content: Tensor, like: Tensor, start: int) -> Tensor:
        if not like.is_contiguous() or like.storage_offset():
            stream.seek(0)
            return torch.load(stream, weights_only=True).reshape(chunk.shape)
        data = content[start : start + like.nbytes]
        if start % like.itemsize:
            data = data.clone()
        return data.view(like.dtype).view(chunk.shape)


def _chunk(
    places: Any, key: str, tensor: metadata.TensorStorageMetadata, piece: metadata.ChunkStorageMetadata
) -> Chunk:
    """Combine the two entries of a chunk in `.metadata`. Raises ValueError, KeyError or TypeError."""
    place = places[metadata.MetadataIndex(key, piece.offsets)]
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"{key} is stored with {place.transform_descriptors}, which cannot be read")
    chunk = Chunk(
        key=key,
        dtype=str(tensor.properties.dtype),
        tensor_shape=tuple(tensor.size),
        start=tuple(piece.offsets),
        shape=tuple(piece.sizes),
        file=place.relative_path,
        offset=place.offset,
        length=place.length,
    )
    bounds = zip(chunk.start, chunk.shape, chunk.tensor_shape, strict=True)
    is_inside = all(0 <= start <= start + size <= whole for start, size, whole in bounds)
    is_known = chunk.dtype in _DTYPES and isinstance(chunk.file, str)
    if not is_inside or not is_known or min(chunk.offset, chunk.length) < 0:
        raise ValueError(f"{key} has an invalid chunk, {chunk}")
    return chunk


def _start_of_data(stream: _Slice) -> int:
    """Return the offset of the only tensor in a `torch.save` stream. Raises ValueError or BadZipFile."""
    stream.seek(0)
    records = zipfile.ZipFile(stream).infolist()
    [record] = [record for record in records if record.filename.endswith("/data/0")]
    stream.seek(record.header_offset)
    header = stream.read(30)
    if record.compress_type != zipfile.ZIP_STORED or header is None or len(header) < 30:
        raise ValueError("its elements are compressed")
    stream.seek(0)
    name_length, extra_length = struct.unpack("<HH", header[26:])
    return record.header_offset + 30 + name_length + extra_length
