"""Copy the trainer's state to slices of a checkpoint, and restore it from a checkpoint's folder."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_srpo.checkpoint.slices import PREFIXES, ShardLocation, TensorSlice
from megatron_srpo.distributed.layout import random_states, restore_random_states
from megatron_srpo.training.optimizer import MOMENTS, Shard
from megatron_srpo.training.trainer import Trainer
from megatron_srpo.weights.sources import checkpoint_slice
from megatron_srpo.weights.torch_dist import Folder
from megatron_srpo.weights.transfer import ParameterShard, parameters_of


class _Parameter(NamedTuple):
    value: Parameter
    location: ShardLocation


def snapshot(trainer: Trainer) -> list[TensorSlice]:
    """Copy this rank's part of a checkpoint to the CPU; every element belongs to exactly one rank's part."""
    slices: list[TensorSlice] = []
    teacher = trainer.teacher if trainer.teacher is not None and trainer.teacher.has_weights else None
    for position, (parameter, location) in enumerate(_parameters(trainer)):
        shard = trainer.optimizer.shard_of(parameter)
        if not location.shard.is_primary or shard.start == shard.end:
            continue
        kinds = {"policy": shard.values, **shard.moments}
        if teacher is not None:
            kinds["teacher"] = teacher.share(position, shard)
        for kind, values in kinds.items():
            slices += location.cut(PREFIXES[kind], values, shard.start)
    for name, state in random_states().items():
        key, shape = _generator_key(trainer.layout.rank, name), tuple(state.shape)
        slices.append(TensorSlice(key, state, shape, (0,) * len(shape)))
    return slices


def scalars(trainer: Trainer) -> dict[str, int]:
    """Return the trainer's counters, the same on every rank."""
    optimizer = trainer.optimizer
    return {"schedule_steps": optimizer.schedule.num_steps, "optimizer_updates": optimizer.updates}


@torch.no_grad()
def restore_trainer(trainer: Trainer, saved: Folder, state: dict[str, int]) -> None:
    """Restore policy, optimizer, schedule and teacher on any layout. Raises FileError (DamagedCheckpoint)."""
    optimizer, teacher = trainer.optimizer, trainer.teacher
    optimizer.schedule.num_steps, optimizer.updates = state["schedule_steps"], state["optimizer_updates"]
    with trainer.onloaded(), trainer.update_state_onloaded():
        for parameter, location in _parameters(trainer):
            policy = location.read(saved, PREFIXES["policy"], 0, parameter.numel())
            parameter.view(-1).copy_(policy)
            start, end = optimizer.held_range(parameter)
            moments = {name: location.read(saved, PREFIXES[name], start, end) for name in MOMENTS}
            optimizer.restore(parameter, policy[start:end], moments)
        if teacher is not None and teacher.has_weights:
            teacher.restore(_teacher_weights(trainer, saved))


def _teacher_weights(trainer: Trainer, saved: Folder) -> Iterator[tuple[Tensor, Shard]]:
    for parameter, location in _parameters(trainer):
        weights = location.read(saved, PREFIXES["teacher"], 0, parameter.numel())
        yield weights, trainer.optimizer.shard_of(parameter)


def restore_generators(saved: Folder, rank: int) -> None:
    """Restore the random states that rank `rank` saved."""
    prefix = _generator_key(rank, "")
    keys = [key for key in saved.chunks if key.startswith(prefix)]
    restore_random_states({key.removeprefix(prefix): saved.read(key).clone() for key in keys})


def _generator_key(rank: int, name: str) -> str:
    return f"generators.rank_{rank:05d}.{name}"


def _parameters(trainer: Trainer) -> Iterator[_Parameter]:
    """Yield this rank's parameters of the policy, in a fixed order."""
    architecture = trainer.folder.architecture
    for location, parameter in parameters_of(trainer.chunks, architecture):
        place, shard = checkpoint_slice(location, architecture), ParameterShard.of(location)
        yield _Parameter(parameter, ShardLocation(place, shard, tuple(parameter.shape)))
