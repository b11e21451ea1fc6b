"""Files and folders that survive a kill, a full disk or a power cut: write, sync, then rename."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from megatron_srpo.data.atomic import write_text as write_text
from megatron_srpo.data.visible import without_logins

if TYPE_CHECKING:  # imports torch, which most readers of files do not need
    from megatron_srpo.distributed.processes import Processes

_READ_BYTES = 16 * 2**20
_WRITE_BACK_BYTES = 32 * 2**20


class FileError(ValueError):
    """A file cannot be read or written; the message names it (and the tensor) and what to do."""

    def __init__(self, message: str):
        super().__init__(without_logins(message))


class DurableFile:
    """A new file for large writes, on disk when `close` returns; write-back starts early, not in `close`."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("xb", buffering=0)
        self._start = self._end = 0  # the range that is written but whose write-back has not started

    def write_at(self, data: memoryview | bytes, offset: int) -> None:
        """Write `data` at `offset` (bytes), without the GIL. Raises FileError, for example on a full disk."""
        data = memoryview(data)
        if offset != self._end:
            self._write_back(offset)
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data[:_WRITE_BACK_BYTES], self._end)
                data, self._end = data[written:], self._end + written
                if self._end - self._start >= _WRITE_BACK_BYTES:
                    self._write_back(self._end)
        except OSError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Wait until everything is on disk. Raises FileError."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from None
        finally:
            self._file.close()

    def _write_back(self, next_offset: int) -> None:
        """Start write-back without waiting, which POSIX_FADV_DONTNEED does on Linux."""
        if hasattr(os, "posix_fadvise") and self._end - self._start >= _WRITE_BACK_BYTES:
            size = self._end - self._start
            os.posix_fadvise(self._file.fileno(), self._start, size, os.POSIX_FADV_DONTNEED)
        self._start = self._end = next_offset

    def _failure(self, error: OSError) -> FileError:
        return FileError(f"{self.path}: cannot be written: {error.strerror}")


@contextmanager
def atomic_directory(output: Path, processes: Processes, replace: bool = False) -> Iterator[Path]:
    """Yield a folder to write to, and rename it to `output` at the end; remove it after an error.

    If `output` or the folder of an earlier attempt exists, `replace` removes it.

    Raises:
        FileError: If one of the two exists without `replace`, or the folder cannot be created.
    """
    partial, is_first = output.with_name(output.name + ".partial"), processes.rank == 0
    if is_first:
        if replace:
            shutil.rmtree(partial, ignore_errors=True)
        _make(partial, None if replace else output)
    processes.barrier()
    try:
        yield partial
    except BaseException:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    processes.barrier()
    if is_first:
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        if replace and output.exists():
            shutil.rmtree(output)
        partial.rename(output)
        sync(output.parent)
    processes.barrier()


def _make(partial: Path, output: Path | None) -> None:
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileError(f"{output}: exists and is not an empty folder; name another one or empty it")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        problem = "exists already, from an attempt that did not finish or is still running; delete it"
        raise FileError(f"{partial}: {problem}") from None
    except OSError as error:
        raise FileError(f"{partial}: cannot be created: {error.strerror}") from None


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SavedFile(BaseModel, extra="forbid"):
    """Size and checksum of a file, or of its beginning."""

    bytes: int
    crc32: int


def describe(file: Path, end: int | None = None) -> SavedFile:
    """Return the size and CRC-32 of the file, or of its first `end` bytes."""
    size, crc32 = 0, 0
    with file.open("rb") as content:
        while block := content.read(_READ_BYTES if end is None else min(_READ_BYTES, end - size)):
            size, crc32 = size + len(block), zlib.crc32(block, crc32)
    return SavedFile(bytes=size, crc32=crc32)


class JsonLines(NamedTuple):
    """The objects of a JSONL file, their line numbers (from 1), and the problems of the other lines."""

    rows: list[dict[str, Any]]
    numbers: list[int]
    problems: list[str]


def read_jsonl(file: Path) -> JsonLines:
    """Read the JSON objects of a JSONL file, NaN and Infinity as None; none if the file does not exist."""
    found = JsonLines([], [], [])
    for number, line in enumerate(file.read_bytes().split(b"\n") if file.is_file() else (), 1):
        try:
            if not line:
                continue
            row = json.loads(line, parse_constant=lambda name: None)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            found.problems.append(f"{file}:{number}: is damaged ({error})")
        else:
            found.rows.append(row)
            found.numbers.append(number)
    return found
