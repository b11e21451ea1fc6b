"""Files and folders that a kill, a full disk or a power cut leaves whole: written aside, synced, renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # torch, which most readers of files do not need
    from megatron_srpo.distributed.processes import Processes

_WRITE_BACK_BYTES = 32 * 2**20


class FileError(ValueError):
    """A file cannot be read or written; the message names it (and the tensor), and what to do."""


class DurableFile:
    """A new file for large writes, on disk when `close` returns.

    What has been written starts on its way to disk while the next piece is being made: the system's own
    write-back begins late, and closing would wait for most of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("xb", buffering=0)
        self._start = self._end = 0  # written one after the other, not yet on its way

    def write_at(self, data: memoryview | bytes, offset: int) -> None:
        """Put `data` at `offset` (bytes).

        Releases the GIL. Raises FileError when it cannot, such as for a full disk.
        """
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
        """Wait until everything is on disk. Raises FileError when that fails."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from None
        finally:
            self._file.close()

    def _write_back(self, next_offset: int) -> None:
        """Start it, without waiting: on Linux, advice that pages will not be read again does that."""
        if hasattr(os, "posix_fadvise") and self._end - self._start >= _WRITE_BACK_BYTES:
            os.posix_fadvise(
                self._file.fileno(), self._start, self._end - self._start, os.POSIX_FADV_DONTNEED
            )
        self._start = self._end = next_offset

    def _failure(self, error: OSError) -> FileError:
        return FileError(f"{self.path}: cannot be written: {error.strerror}")


@contextmanager
def aside(output: Path, processes: Processes, replace: bool = False) -> Iterator[Path]:
    """The folder in which the processes write before it is renamed to `output`, all together; after an error
    it is gone.

    With `replace`, an `output` that holds something and a former attempt's folder make way. Without, they
    raise FileError.
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
        raise FileError(
            f"{partial}: is there already, left by an attempt that did not finish or still runs; delete it"
        ) from None
    except OSError as error:
        raise FileError(f"{partial}: cannot be made: {error.strerror}") from None


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a small file so that it appears whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


class JsonLines(NamedTuple):
    """The objects of a JSONL file, their line numbers (from 1), and what is wrong with the other lines."""

    rows: list[dict[str, Any]]
    numbers: list[int]
    problems: list[str]


def read_jsonl(file: Path) -> JsonLines:
    """Read the JSON objects of a JSONL file, NaN and Infinity as None; none if the file does not exist.

    Lines that are no objects, such as one that a kill has torn, are named in `problems` by file and line.
    """
    found = JsonLines([], [], [])
    for number, line in enumerate(file.read_bytes().split(b"\n") if file.is_file() else (), 1):
        try:
            if not line:
                continue
            row = json.loads(line, parse_constant=lambda name: None)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            found.problems.append(f"{file}:{number}: is damaged ({error})")
        else:
            found.rows.append(row)
            found.numbers.append(number)
    return found


def append_line(file: Path, line: str) -> None:
    """Add a line to a file, on the disk when this returns; a torn line that a kill left is ended first."""
    with file.open("ab+") as out:
        if out.tell() and (out.seek(-1, os.SEEK_END), out.read(1))[1] != b"\n":
            out.write(b"\n")
        out.write(line.encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())
