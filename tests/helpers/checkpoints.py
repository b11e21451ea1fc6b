"""Write checkpoint folders without a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_srpo.checkpoint.saver import write_slices
from megatron_srpo.checkpoint.slices import TensorSlice
from megatron_srpo.checkpoint.state import snapshot
from megatron_srpo.training.trainer import Trainer
from megatron_srpo.weights import torch_dist


def write(folder: Path, *ranks: Sequence[TensorSlice]) -> list[torch_dist.RankFile]:
    """Write the files and the metadata of a checkpoint with these ranks' slices; no manifest."""
    files = [write_slices(folder, rank, slices) for rank, slices in enumerate(ranks)]
    torch_dist.write_metadata(folder, files)
    return files


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a trainer, random states aside."""
    slices = (part for part in snapshot(trainer) if not part.key.startswith("generators."))
    return {f"{part.key} {part.start}": part.tensor for part in slices}


def save(folder: Path, trainer: Trainer) -> None:
    """Write what a trainer of one rank holds, without a manifest."""
    write(folder, snapshot(trainer))
