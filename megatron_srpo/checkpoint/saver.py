"""Save in the background: a thread of each rank writes its file, the first rank's completes the checkpoint.

Ranks do not communicate: each writes a note next to its file, and the first rank waits for all notes. So all
ranks must share the folder.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.checkpoint.folder import Counters, Manifest, RunInfo, SavedFile
from megatron_srpo.checkpoint.slices import TensorSlice
from megatron_srpo.checkpoint.state import scalars, snapshot
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import CheckpointSection
from megatron_srpo.distributed.files import write_text
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.families import architecture_from_dict
from megatron_srpo.training.trainer import Trainer
from megatron_srpo.weights import torch_dist
from megatron_srpo.weights.sources import empty_objects

_POLL_SECONDS = 0.05
_NOTE = "rank_{:05d}.note"


class SaveFailed(RuntimeError):
    """The last checkpoint could not be written; the previous one is intact."""


class Progress(NamedTuple):
    """State of a run in addition to its tensors; on other ranks than the first, only the counters count."""

    counters: Counters
    evaluation: dict[str, Any] | None  # the row of metrics.jsonl, if the step was evaluated
    carried: str  # JSON lines: the groups left over for the next step
    metrics: SavedFile | None  # metrics.jsonl as it is now


@dataclass(eq=False)
class Saver:
    """Writer of checkpoints to `directory`, one at a time."""

    directory: Path
    settings: CheckpointSection
    layout: Layout
    info: RunInfo
    on_commit: Callable[[int], None] = lambda step: None  # on the first rank, in the writing thread

    def __post_init__(self) -> None:
        if self.layout.rank == 0:
            folders.tidy(self.directory)
        # The name is unique, so that files of an earlier process are never taken for this one's.
        self.session = self.layout.broadcast(f"{time.time_ns():x}")
        folder = self.directory.parent
        if not folder.is_dir():
            problem = f"was created by the first rank, but rank {self.layout.rank} cannot see it"
            raise ConfigError(f"logging.dir: {folder} {problem}; all ranks need the same folder")
        self._thread: threading.Thread | None = None
        self._problem: str | None = None  # the last checkpoint's failure
        self._unreported: str | None = None

    def save(self, step: int, trainer: Trainer, progress: Progress) -> None:
        """Wait for the previous checkpoint, then start one of the state after `step`. All ranks together.

        `news` and `finish` report errors.
        """
        manifest = Manifest(
            **self.info.model_dump(),
            format=folders.FORMAT,
            step=step,
            session=self.session,
            state=scalars(trainer) | progress.counters._asdict(),
            evaluation=progress.evaluation,
            files={},
            metrics=progress.metrics,
        )
        self._join()
        self._start(snapshot(trainer), manifest, progress.carried)

    def _start(self, slices: Sequence[TensorSlice], manifest: Manifest, carried: str = "") -> None:
        arguments = self.directory / f".step_{manifest.step:06d}.{self.session}", slices, manifest, carried
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if not self.settings.async_save:
            self._join()

    def news(self) -> str | None:
        """Return the failure since the last call, or None."""
        problem, self._unreported = self._unreported, None
        return problem

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises SaveFailed if it could not be written."""
        self._join()
        if self._problem is not None:
            raise SaveFailed(self._problem)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, partial: Path, slices: Sequence[TensorSlice], manifest: Manifest, carried: str) -> None:
        """Write this rank's file and a note for the first rank, which then completes the checkpoint."""
        self._problem, rank = None, self.layout.rank
        try:
            partial.mkdir(parents=True, exist_ok=True)
            try:
                note = {"file": write_slices(partial, rank, slices).to_json()}
            except Exception as error:  # a full disk, a quota: the first rank reports it
                for file in partial.glob(f"__{rank}_0.distcp"):
                    file.unlink()  # frees space for the note
                note = {"error": f"rank {rank}: {error}"}
            write_text(partial / _NOTE.format(rank), json.dumps(note))
            if rank == 0:
                self._finish(partial, manifest, carried)
        except Exception as error:  # on the first rank, or on a rank that cannot even write a note
            self._problem = f"the checkpoint of step {manifest.step} could not be written: {error}"
            self._unreported = self._problem

    def _finish(self, partial: Path, manifest: Manifest, carried: str) -> None:
        """Wait for all ranks' notes, commit the checkpoint and discard old ones; only on the first rank."""
        notes = [_await_note(partial / _NOTE.format(rank)) for rank in range(self.layout.world_size)]
        if problems := [note["error"] for note in notes if "error" in note]:
            shutil.rmtree(partial)  # an incomplete checkpoint only takes space
            raise OSError("; ".join(problems))
        files = [torch_dist.RankFile.from_json(note["file"]) for note in notes]
        architecture = architecture_from_dict(manifest.architecture)
        torch_dist.write_metadata(partial, files, empty_objects(architecture))
        for file in files:
            manifest.files[file.name] = SavedFile(bytes=file.bytes, crc32=file.crc32)
        if carried:
            write_text(partial / folders.CARRIED, carried)
        for name in (*torch_dist.METADATA_FILES, *([folders.CARRIED] if carried else [])):
            manifest.files[name] = folders.describe(partial / name)
        folders.commit(partial, manifest, self.directory)
        folders.retain(self.directory, self.settings.keep_last, self.settings.keep_best)
        self.on_commit(manifest.step)


def write_slices(folder: Path, rank: int, slices: Iterable[TensorSlice]) -> torch_dist.RankFile:
    """Write a rank's file, and return its description once it is on disk."""
    writer = torch_dist.Writer(folder, rank)
    for part in slices:
        beat()
        writer.write(*part)
    return writer.close()


def _await_note(file: Path) -> dict[str, Any]:
    """Wait for a rank's note, read it and remove it."""
    while not file.exists():
        time.sleep(_POLL_SECONDS)
    note = json.loads(file.read_text())
    file.unlink()
    return note
