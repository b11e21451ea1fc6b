"""Retention of dumped rollouts: when RUN/rollouts exceeds its limit, the files of some steps are removed.

Step 1, the newest 10 steps and every 2nd step are kept; if that is not enough, every 4th, 8th, and so on.
Only files of dumped steps are removed: no checkpoint, ledger or resumed run reads them.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path

NEWEST = 10  # steps that are always kept
_AFTER = 0.75  # of the limit: what is left after thinning, so that it is rare
_SUFFIXES = (".jsonl", ".tokens.jsonl", ".bin")  # removed in this order: without the first, a step is no dump
_NAME = re.compile(r"step_(\d{6,})(\.jsonl|\.tokens\.jsonl|\.bin)")


class Retention:
    """Keep a folder of rollouts below `limit` bytes (None: no limit). One process uses it."""

    def __init__(self, folder: Path, limit: float | None):
        self.folder, self.limit = folder, limit
        self._size: int | None = None  # of all files, by the last listing and what has been added since

    def describe(self) -> str:
        """Return a line for the start of a run."""
        if self.limit is None:
            return "rollouts/ keeps every step (logging.rollouts_limit_gib: null)"
        kept = f"then step 1, the newest {NEWEST} and every 2nd step are kept, or every 4th, 8th, …"
        limit = f"{self.limit / 2**30:g} GiB (logging.rollouts_limit_gib)"
        return f"rollouts/ keeps every step up to {limit}; {kept}"

    def added(self, step: int) -> list[int]:
        """Count the files of a step that has just been written, and return the steps removed since."""
        if self.limit is None:
            return []
        if self._size is not None:
            files = (self._file(step, suffix) for suffix in _SUFFIXES)
            self._size += sum(file.stat().st_size for file in files if file.is_file())
        if self._size is None or self._size > self.limit:
            return self._thin()
        return []

    def _thin(self) -> list[int]:
        """List the folder, and remove steps if it exceeds the limit."""
        assert self.limit is not None
        sizes: dict[int, int] = {}
        has_samples: set[int] = set()
        for file in os.scandir(self.folder):
            if (match := _NAME.fullmatch(file.name)) and file.is_file(follow_symlinks=False):
                step = int(match[1])
                sizes[step] = sizes.get(step, 0) + file.stat().st_size
                has_samples |= {step} if match[2] == _SUFFIXES[0] else set()
        self._size, removed, stride = sum(sizes.values()), [], 1
        if self._size <= self.limit:
            return []
        for step in sizes.keys() - has_samples:  # a kill has interrupted its removal
            self._remove(step)
            self._size -= sizes.pop(step)
        while self._size > _AFTER * self.limit and stride <= max(sizes):
            stride *= 2
            for step in sorted(sizes.keys() - kept_steps(sizes, stride)):
                if self._size <= _AFTER * self.limit:
                    break
                self._remove(step)
                self._size -= sizes.pop(step)
                removed.append(step)
        return sorted(removed)

    def _remove(self, step: int) -> None:
        for suffix in _SUFFIXES:
            self._file(step, suffix).unlink(missing_ok=True)

    def _file(self, step: int, suffix: str) -> Path:
        return self.folder / f"step_{step:06d}{suffix}"


def kept_steps(steps: Collection[int], stride: int) -> set[int]:
    """Return those of `steps` that are kept with this stride."""
    newest = sorted(steps)[-NEWEST:]
    return {step for step in steps if step == 1 or step % stride == 0} | set(newest)
