"""How far the teacher is from the policy, from the shards in which every element of the weights is held
once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.model.architecture import Architecture
from megatron_srpo.training.optimizer import Optimizer
from megatron_srpo.training.teacher import Teacher
from megatron_srpo.weights.transfer import ParameterShard, parameters_of


@torch.no_grad()
def teacher_distance(
    chunks: Sequence[torch.nn.Module], teacher: Teacher, optimizer: Optimizer, architecture: Architecture
) -> float:
    """‖θ - θ'‖ / ‖θ‖ over all weights, the same on every rank.

    One all-reduce of two numbers; all ranks together.
    """
    found: list[Tensor] = []
    for position, (location, parameter) in enumerate(parameters_of(chunks, architecture)):
        shard = optimizer.shard_of(parameter)
        if ParameterShard.of(location).is_primary and shard.end > shard.start:
            gap = shard.values - teacher.share(position, shard)
            found.append(
                torch.stack(
                    [torch.linalg.vector_norm(values, dtype=torch.float64) for values in (gap, shard.values)]
                )
            )
    device = next(chunks[0].parameters()).device
    sums = torch.stack(found).square().sum(0) if found else torch.zeros(2, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    gap, norm = sums.tolist()
    return math.sqrt(gap / norm) if norm else 0.0
