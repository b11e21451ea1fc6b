"""The policy or the teacher of a run, tensor by tensor with Hugging Face names (see `weights/sources.py`)."""

from pathlib import Path
from typing import Literal

import torch
from typing_extensions import override

from megatron_srpo.checkpoint import folder as folders
from megatron_srpo.checkpoint.slices import PREFIXES
from megatron_srpo.distributed.files import FileError
from megatron_srpo.model.families import architecture_from_dict
from megatron_srpo.weights.sources import MegatronTensors
from megatron_srpo.weights.torch_dist import Folder


def is_of_a_run(path: Path) -> bool:
    """Return True if `path` is a run folder with checkpoints, or a checkpoint of a run."""
    return (path / "manifest.json").exists() or bool(folders.steps(path / "checkpoints"))


def checkpoint_of(path: Path) -> Path:
    """Return the checkpoint at `path`, or the newest one of the run at `path`."""
    if (path / "manifest.json").exists():
        return path
    checkpoints = path / "checkpoints"
    return folders.folder_of(checkpoints, folders.steps(checkpoints)[0])


class RunTensors(MegatronTensors):
    """The policy or the teacher of a run's checkpoint. They are stored in fp32; `dtype` is the run's dtype.

    Raises FileError if the checkpoint is damaged, or if the run has no teacher in addition to the policy.
    """

    def __init__(self, path: Path, kind: Literal["policy", "teacher"]):
        checkpoint = checkpoint_of(path)
        manifest = folders.read_manifest(checkpoint)
        folders.check_files(checkpoint, manifest)
        prefix = PREFIXES[kind]
        if not any(key.startswith(prefix) for key in Folder(checkpoint).chunks):
            problem = "this run has none in addition to the policy (grpo, or teacher.kind: live)"
            raise FileError(f"{checkpoint}: holds no {kind}: {problem}")
        super().__init__(checkpoint, architecture_from_dict(manifest.architecture), prefix)
        self._run_dtype: torch.dtype = getattr(torch, manifest.dtype)

    @override
    def dtype(self, name: str) -> torch.dtype:
        return self._run_dtype
