"""Processes: backends, Megatron's process groups, seeds, and the few collectives that are not Megatron's."""

import datetime
import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_srpo.config.schema import ParallelSection
from megatron_srpo.distributed.group_sizes import data_parallel_size
from megatron_srpo.distributed.megatron import parallel_state, tensor_parallel
from megatron_srpo.distributed.messages import exchange_bytes, gather_bytes, gather_on_first
from megatron_srpo.distributed.processes import under_torchrun, world_size_from_environment


@dataclass(frozen=True)
class Layout:
    """This process's ranks in its groups, and the device of its tensors. The default is one process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    context_parallel_rank: int = 0
    context_parallel_size: int = 1
    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    is_first_stage: bool = True
    is_last_stage: bool = True
    owns_process_group: bool = False
    background_group: dist.ProcessGroup | None = None  # all ranks, gloo: may overlap collectives of training

    def data_rank_of(self, rank: int) -> int:
        """Return the data-parallel rank of `rank`, in Megatron's order: TP, CP, DP, PP from the innermost."""
        inner = self.tensor_parallel_size * self.context_parallel_size
        return rank // inner % self.data_parallel_size

    def replica_ranks(self, data_rank: int) -> list[int]:
        """Return the ranks that train the same samples: those with this data-parallel rank, ascending."""
        inner = self.tensor_parallel_size * self.context_parallel_size
        firsts = range(data_rank * inner, self.world_size, inner * self.data_parallel_size)
        return [first + place for first in firsts for place in range(inner)]

    @property
    def data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks with the same model shard and different tokens: data- and context-parallel ones."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def sum_over_data_parallel(self, values: torch.Tensor) -> torch.Tensor:
        """Sum in place over the data- and context-parallel ranks."""
        dist.all_reduce(values, group=self.data_parallel_group)
        return values

    def max_over_data_parallel(self, values: torch.Tensor) -> torch.Tensor:
        """Take the maximum in place over the data- and context-parallel ranks."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.data_parallel_group)
        return values

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Broadcast in place from the last pipeline stage to every stage."""
        if self.pipeline_parallel_size > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(values, last, group=parallel_state.get_pipeline_model_parallel_group())
        return values

    def gather_bytes(self, own: bytes, background: bool = False) -> list[bytes]:
        """Return every rank's bytes, in rank order, on every rank.

        With `background` it may be called from another thread while training runs collectives.
        """
        if self.world_size == 1:
            return [own]
        if background:
            return gather_bytes(own, torch.device("cpu"), self.background_group)
        return gather_bytes(own, self.device)

    def exchange_bytes(
        self, outgoing: Mapping[int, bytes], incoming: Mapping[int, int], background: bool = False
    ) -> dict[int, bytes]:
        """Send a message to each rank of `outgoing`; return those of the ranks in `incoming` (bytes each).

        `background` as in `gather_bytes`.
        """
        if self.world_size == 1:
            return {rank: message for rank, message in outgoing.items() if message}
        if background:
            return exchange_bytes(outgoing, incoming, torch.device("cpu"), self.background_group)
        return exchange_bytes(outgoing, incoming, self.device)

    def gather_on_first(self, own: Sequence[bytes]) -> list[list[bytes]]:
        """Return every rank's list of bytes, in rank order, on the first rank, and [] on the others."""
        return [list(own)] if self.world_size == 1 else gather_on_first(own, self.device)

    def gather_json(self, own: Any, background: bool = False) -> list[Any]:
        """Return every rank's JSON value, in rank order, on every rank; `background` as in `gather_bytes`."""
        return [json.loads(part) for part in self.gather_bytes(json.dumps(own).encode(), background)]

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's JSON value on every rank; other ranks' values are ignored. A collective."""
        return self.gather_json(value if self.rank == 0 else None)[0]


def replica_group(parameter: torch.nn.Parameter) -> dist.ProcessGroup:
    """Return the ranks that hold the same elements: data- and context-parallel ones, or fewer for experts."""
    if getattr(parameter, "allreduce", True):  # Megatron's mark
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def initialize(parallel: ParallelSection, seed: int) -> Layout:
    """Join the process group (NCCL with CUDA, else gloo), build Megatron's groups, seed every generator."""
    world_size = world_size_from_environment()
    data_parallel_size(parallel, world_size)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    owns_process_group = not dist.is_initialized()
    if owns_process_group:
        if under_torchrun():
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        distributed_timeout_minutes=max(1, round(parallel.distributed_timeout_minutes)),
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    background: Any = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
    layout = Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
        owns_process_group=owns_process_group,
        background_group=background,
    )
    assert layout.data_rank_of(layout.rank) == layout.data_parallel_rank
    return layout


def random_states() -> dict[str, torch.Tensor]:
    """Return the states of all generators by name: torch's on the CPU, CUDA's, and Megatron's named ones."""
    tracker: Any = tensor_parallel.random.get_cuda_rng_tracker()
    states = {f"megatron|{name}": state for name, state in tracker.get_states().items()}
    states["cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: state.cpu().clone() for name, state in states.items()}


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """Restore the states that `random_states` returned."""
    prefix = "megatron|"
    named = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    tracker: Any = tensor_parallel.random.get_cuda_rng_tracker()
    tracker.set_states(named)
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def process_group(
    parallel: ParallelSection, seed: int, collective_errors: tuple[type[BaseException], ...] = ()
) -> Iterator[Layout]:
    """Call `initialize`, and `shut_down` at the end or after a `collective_errors`, which all ranks raise.

    After any other error the groups are not destroyed: NCCL would wait for the other ranks, and the error
    would not be printed.
    """
    layout = initialize(parallel, seed)
    try:
        yield layout
    except BaseException as error:
        if layout.world_size == 1 or isinstance(error, collective_errors):
            shut_down(layout)
        raise
    shut_down(layout)


def shut_down(layout: Layout) -> None:
    """Destroy Megatron's groups, and the process group if `initialize` created it."""
    parallel_state.destroy_model_parallel()
    if layout.owns_process_group:
        dist.destroy_process_group()
    # A gloo group has three threads, which end with its last reference: often a cycle of the trainer's.
    gc.collect()
