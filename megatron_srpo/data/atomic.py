"""Files that are replaced as one: written under another name, synced, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO


@contextmanager
def atomic_binary(file: Path) -> Iterator[BinaryIO]:
    """Yield a file to write to, and rename it to `file` at the end; remove it after an error.

    It is always a new file: a link or a file that somebody has put at its name is removed, never written to.
    """
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(descriptor, "wb") as out:
            yield out
            out.flush()
            os.fsync(descriptor)
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_file(file: Path) -> Iterator[TextIO]:
    """Yield a text file (UTF-8) to write to, as `atomic_binary`."""
    with atomic_binary(file) as out, open(out.fileno(), "w", encoding="utf-8", closefd=False) as text:
        yield text


def write_text(file: Path, text: str) -> None:
    """Write a small file atomically."""
    with atomic_file(file) as out:
        out.write(text)
