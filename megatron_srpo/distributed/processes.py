"""Processes without Megatron: torchrun's rank and world size, and a command-line tool's processes."""

from __future__ import annotations

import datetime
import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_srpo.config.base import ConfigError
from megatron_srpo.distributed.messages import gather_bytes


def world_size_from_environment() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun. Raises ConfigError."""
    return _number("WORLD_SIZE", 1)


def rank_from_environment() -> int:
    """Return this process's rank; 0 without torchrun. Raises ConfigError."""
    return _number("RANK", 0)


def under_torchrun() -> bool:
    """Return True if the environment names all that processes need to meet.

    A scheduler's script may set some of it for other programs; a single process ignores that.

    Raises:
        ConfigError: There are several processes, and something is missing.
    """
    missing = [
        name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    world_size = world_size_from_environment()
    if missing and (world_size > 1 or rank_from_environment() > 0):
        needed = f"but {' and '.join(missing)} is not set; start the processes with torchrun"
        raise ConfigError(f"WORLD_SIZE: {world_size} processes, {needed}")
    return not missing


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"{name}: the environment variable is {text!r}; expected torchrun's number, or unset"
        )
    return int(text)


def wait_for_first_rank(rank: int) -> None:
    """Wait on all other ranks until rank 0 has printed a common error: torchrun kills all when one exits."""
    if rank > 0:
        time.sleep(5)


@dataclass(frozen=True)
class Processes:
    """The processes of a command-line tool, on CPUs: a single one, or torchrun's with gloo."""

    rank: int
    world_size: int

    @classmethod
    def join(cls, timeout: datetime.timedelta = datetime.timedelta(hours=1)) -> Processes:
        """Join the other processes, if there are any; wait at most `timeout` for the slowest."""
        rank, world_size = rank_from_environment(), world_size_from_environment()
        if world_size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timeout)
        return cls(rank, world_size)

    def gather(self, mine: bytes) -> list[bytes]:
        """Return every rank's bytes, in rank order, on every rank."""
        return [mine] if self.world_size == 1 else gather_bytes(mine, torch.device("cpu"))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Destroy the process group, if there is one."""
        if self.world_size > 1:
            dist.destroy_process_group()
