"""Saving beside training: each rank's file is written by a thread, and the first rank's makes a checkpoint of
them.

Ranks say nothing to each other: each leaves a note beside its file, the first rank waits for all notes. The
folder must therefore be one that all ranks see.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.checkpoint.folder import Counters, Manifest, RunInfo, SavedFile
from megatron_srpo.checkpoint.state import scalars, snapshot
from megatron_srpo.config.schema import CheckpointSection, ConfigError
from megatron_srpo.distributed.files import write_text
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.training.trainer import Trainer
from megatron_srpo.weights.safetensors_file import Writer

_POLL_SECONDS = 0.05


class SaveFailed(RuntimeError):
    """The last checkpoint could not be written; the one before is still there."""


class Saver:
    """Writes checkpoints into `directory`, one at a time.

    on_commit(step): called on the first rank, in the writing thread, when the checkpoint of `step` is whole.
    """

    def __init__(
        self,
        directory: Path,
        settings: CheckpointSection,
        layout: Layout,
        info: RunInfo,
        on_commit: Callable[[int], None],
    ):
        self.directory = directory
        self.settings = settings
        self.layout = layout
        self.info = info
        self.on_commit = on_commit
        if layout.rank == 0:
            folders.tidy(directory)
        # A name that no other run's ranks use: what they leave behind is never taken for ours.
        self.session = layout.broadcast(f"{time.time_ns():x}")
        if not directory.parent.is_dir():
            raise ConfigError(
                f"logging.dir: {directory.parent} was made by the first rank, but rank {layout.rank} does not see it"
            )
        self._thread: threading.Thread | None = None
        self._problem: str | None = None  # of the last checkpoint
        self._untold: str | None = None

    def save(
        self, step: int, trainer: Trainer, counters: Counters, evaluation: dict[str, Any] | None
    ) -> None:
        """Begin a checkpoint of the state after `step`, when the previous one is written. All ranks together.

        It is written by a thread, or before this returns without `checkpoint.async_save`. `news` and `finish`
        report errors. evaluation: the row of metrics.jsonl, if `step` was evaluated.
        """
        manifest = Manifest(
            **self.info.model_dump(),
            format=folders.FORMAT,
            step=step,
            session=self.session,
            state=scalars(trainer) | counters._asdict(),
            evaluation=evaluation,
            files={},
        )
        self._join()
        self._start(snapshot(trainer), manifest)

    def _start(self, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        partial = self.directory / f".step_{manifest.step:06d}.{self.session}"
        self._thread = threading.Thread(
            target=self._write, args=(partial, tensors, manifest), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self.settings.async_save:
            self._join()

    def news(self) -> str | None:
        """What went wrong since the last call, if anything did."""
        untold, self._untold = self._untold, None
        return untold

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises SaveFailed when it could not be written."""
        self._join()
        if self._problem is not None:
            raise SaveFailed(self._problem)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, partial: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        name, self._problem = f"rank_{self.layout.rank:05d}.safetensors", None
        try:
            partial.mkdir(parents=True, exist_ok=True)
            try:
                note: dict[str, Any] = write_tensors(partial / name, tensors).model_dump()
            except Exception as error:  # a full disk, a quota: the first rank will say it
                (partial / name).unlink(
                    missing_ok=True
                )  # or there would be no room for the note that the first rank waits for
                note = {"error": f"rank {self.layout.rank}: {error}"}
            write_text(partial / f"{name}.note", json.dumps(note))
            if self.layout.rank == 0:
                self._finish(partial, manifest)
        except Exception as error:  # the first rank's own, or a rank that cannot even leave a note
            self._problem = self._untold = (
                f"the checkpoint of step {manifest.step} could not be written: {error}"
            )

    def _finish(self, partial: Path, manifest: Manifest) -> None:
        """On the first rank: wait for all ranks' notes, then give the checkpoint its name and remove old
        ones.
        """
        problems = []
        for rank in range(self.layout.world_size):
            name = f"rank_{rank:05d}.safetensors"
            note = partial / f"{name}.note"
            while not note.exists():
                time.sleep(_POLL_SECONDS)
            said = json.loads(note.read_text())
            if "error" in said:
                problems.append(said["error"])
            else:
                manifest.files[name] = SavedFile.model_validate(said)
            note.unlink()
        if problems:
            shutil.rmtree(partial)  # what was written takes room, and is of no use
            raise OSError("; ".join(problems))
        folders.commit(partial, manifest, self.directory)
        folders.retain(self.directory, self.settings.keep_last, self.settings.keep_best)
        self.on_commit(manifest.step)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> SavedFile:
    """One safetensors file, on the disk when this returns."""
    writer = Writer(file, {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()})
    for key, tensor in tensors.items():
        beat()
        writer.write(key, tensor)
    writer.close()
    return SavedFile(bytes=file.stat().st_size, crc32=folders.checksum(tensors.items()))
