"""Open what a user names on the command line: a Hugging Face folder or a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path

from _transformers import TransformersTensors

from megatron_srpo.distributed.files import FileError
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights.sources import MegatronTensors, Tensors


def checkpoint_folder(path: Path) -> Path:
    """Return `path`, or the folder in it that Megatron-LM's latest_checkpointed_iteration.txt names."""
    tracker = path / "latest_checkpointed_iteration.txt"
    if (path / "metadata.json").exists() or not tracker.exists():
        return path
    name = tracker.read_text(errors="replace").strip()
    if name == "release":
        return path / name
    if not (name.isascii() and name.isdigit()):
        raise FileError(f"{tracker}: expected an iteration or 'release', found {name[:40]!r}")
    return path / f"iter_{int(name):07d}"


def open_tensors(path: Path, reference: HFFolder | None = None) -> Tensors:
    """Open the HF folder, through transformers, or the Megatron folder at `path`.

    A Megatron folder without config.json needs `reference`.
    """
    folder = checkpoint_folder(path)
    if not (folder / "metadata.json").exists():
        return TransformersTensors(path)
    if reference is None:
        reference = architecture_folder(path)
    if reference is None:
        hint = "name a Hugging Face folder with --hf-reference"
        raise FileError(f"{folder}: has no config.json to tell its architecture; {hint}")
    return MegatronTensors(folder, reference.architecture)


def architecture_folder(path: Path) -> HFFolder | None:
    """Return the HF or converted folder at `path` if it has a config.json."""
    folder = checkpoint_folder(path)
    return HFFolder(folder) if (folder / "config.json").exists() else None
