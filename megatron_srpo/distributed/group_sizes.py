"""Sizes of groups of processes, from the configuration alone."""

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import ParallelSection


def data_parallel_size(
    parallel: ParallelSection,
    world_size: int,
    given_by: str = "torchrun --nproc-per-node × --nnodes",
) -> int:
    """Return how many groups of ranks train different samples.

    Args:
        parallel: The layout.
        world_size: The number of processes.
        given_by: What sets it, for the message.

    Raises:
        ConfigError: If the layout does not divide `world_size`.
    """
    replica, stages = parallel.replica_size, parallel.pipeline_model_parallel_size
    problem = f"does not divide the {world_size} processes ({given_by})"
    if world_size % replica:
        context = " × context_parallel_size" if parallel.context_parallel_size > 1 else ""
        product = f"tensor_model_parallel_size × pipeline_model_parallel_size{context} = {replica}"
        raise ConfigError(f"parallel: {product} {problem}; expected a multiple of it")
    experts = parallel.expert_tensor_size * parallel.expert_model_parallel_size * stages
    if world_size % experts:
        names = "expert_tensor_parallel_size × expert_model_parallel_size × pipeline_model_parallel_size"
        shared = "experts are distributed over data- and context-parallel ranks"
        raise ConfigError(f"parallel: {names} = {experts} {problem}; {shared}")
    return world_size // replica
