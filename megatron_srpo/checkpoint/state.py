"""Between the trainer's live state and a checkpoint: what is saved of it, and how it is put back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_srpo.checkpoint.pieces import GENERATOR, Piece, SavedTensors
from megatron_srpo.distributed.layout import random_states, restore_random_states
from megatron_srpo.model.mapping import TensorMapping
from megatron_srpo.training.optimizer import MOMENTS
from megatron_srpo.training.trainer import Trainer
from megatron_srpo.weights.transfer import ParameterShard, parameters_of


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's tensors by their names in its file: copies on the CPU, so that training can go on.

    Every element of every parameter is in exactly one rank's snapshot.
    """
    tensors: dict[str, Tensor] = {}
    teacher = trainer.teacher if trainer.teacher is not None and trainer.teacher.has_weights else None
    for position, (_, parameter, part) in enumerate(_parameters(trainer)):
        shard = trainer.optimizer.shard_of(parameter)
        if not part.is_primary or shard.start == shard.end:
            continue
        kinds = {"policy": shard.values, **shard.moments}
        if teacher is not None:
            kinds["teacher"] = teacher.share(position, shard)
        for kind, values in kinds.items():
            piece = Piece(kind, part.name, part.index, part.count, tuple(parameter.shape), shard.start)
            tensors[piece.key] = values.detach().to("cpu", copy=True).contiguous()
    return tensors | {f"{GENERATOR}{name}": state for name, state in random_states().items()}


def scalars(trainer: Trainer) -> dict[str, int]:
    """Return the trainer's counters, which are the same on every rank."""
    return {
        "schedule_steps": trainer.optimizer.schedule.num_steps,
        "optimizer_updates": trainer.optimizer.updates,
    }


@torch.no_grad()
def restore_trainer(trainer: Trainer, saved: SavedTensors, state: dict[str, int]) -> None:
    """Put policy, optimizer, schedule and teacher back, on whatever layout.

    Raises DamagedCheckpoint for what is missing.
    """
    trainer.fetch_state()
    optimizer, teacher = trainer.optimizer, trainer.teacher
    optimizer.schedule.num_steps, optimizer.updates = state["schedule_steps"], state["optimizer_updates"]

    def read(
        kind: str, start: int, end: int, mapping: TensorMapping, parameter: Parameter, part: ParameterShard
    ) -> Tensor:
        return saved.read(
            Piece(kind, part.name, part.index, part.count, tuple(parameter.shape), start), end, mapping
        )

    for where in _parameters(trainer):
        parameter = where[1]
        policy = read("policy", 0, parameter.numel(), *where)
        parameter.view(-1).copy_(policy)
        start, end = optimizer.held_range(parameter)
        optimizer.restore(
            parameter, policy[start:end], {name: read(name, start, end, *where) for name in MOMENTS}
        )
    if teacher is not None and teacher.has_weights:
        everything = (
            (read("teacher", 0, w[1].numel(), *w), optimizer.shard_of(w[1])) for w in _parameters(trainer)
        )
        teacher.restore(everything)


def restore_generators(saved: SavedTensors, rank: int) -> None:
    """The random generators of rank `rank` of as many ranks as saved them."""
    restore_random_states(saved.generators(rank))


def _parameters(trainer: Trainer) -> Iterator[tuple[TensorMapping, Parameter, ParameterShard]]:
    """(mapping, parameter, where its part belongs) of this rank's policy."""
    for location, parameter in parameters_of(trainer.chunks, trainer.folder.architecture):
        yield location.mapping, parameter, ParameterShard.of(location)
