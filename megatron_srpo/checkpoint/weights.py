"""The policy or the teacher of a run's checkpoint, seen tensor by tensor in Hugging Face names (see
`weights/sources.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.checkpoint.pieces import SavedTensors
from megatron_srpo.distributed.files import FileError
from megatron_srpo.model.families import architecture_from_dict
from megatron_srpo.weights.sources import CheckpointSlice, checkpoint_slices


def is_of_a_run(path: Path) -> bool:
    """Whether `path` is a run folder with checkpoints, or one of its checkpoints."""
    return (path / "manifest.json").exists() or bool(folders.steps(path / "checkpoints"))


def checkpoint_of(path: Path) -> Path:
    """The newest checkpoint of the run at `path`, or the checkpoint at `path` itself."""
    checkpoints = path / "checkpoints"
    return (
        path
        if (path / "manifest.json").exists()
        else folders.folder_of(checkpoints, folders.steps(checkpoints)[0])
    )


class RunTensors:
    """What a run holds, of `path`'s newest checkpoint or the checkpoint at `path`; in the dtype the run
    computed with.

    Raises FileError when the checkpoint is damaged, or the run's algorithm has no teacher of its own.
    """

    def __init__(self, path: Path, kind: Literal["policy", "teacher"]):
        self.folder = checkpoint_of(path)
        manifest = folders.read_manifest(self.folder)
        folders.check_files(self.folder, manifest)
        self.kind, self.architecture = kind, architecture_from_dict(manifest.architecture)
        self._dtype = getattr(torch, manifest.dtype)
        self._saved = SavedTensors([self.folder / name for name in sorted(manifest.files)])
        if kind not in self._saved.kinds():
            raise FileError(
                f"{self.folder}: holds no {kind}: this run has none besides the policy (grpo, or teacher.kind: live)"
            )
        self._shapes = self.architecture.tensor_shapes()
        self._places = {name: place for place in checkpoint_slices(self.architecture) for name in place.names}
        self._last: tuple[CheckpointSlice, dict[str, Tensor]] | None = None

    def names(self) -> list[str]:
        """All names."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """As HF folders hold it."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The run's; the checkpoint itself keeps fp32."""
        return self._dtype

    def tensor(self, name: str) -> Tensor:
        """Put together from the ranks' pieces; the tensors mapped with it are kept until others are asked
        for.
        """
        place = self._places[name]
        if self._last is None or self._last[0] != place:
            self._last = None  # free before reading
            whole = self._saved.whole(self.kind, place.names[0], place.mapping)
            self._last = place, dict(zip(place.names, whole, strict=True))
        return self._last[1][name]
