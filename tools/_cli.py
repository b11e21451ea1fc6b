"""Share command-line parts between the programs in tools/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from megatron_srpo.config.base import ConfigError
from megatron_srpo.distributed.files import FileError
from megatron_srpo.distributed.processes import Processes, wait_for_first_rank

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add --dtype, whose value is a key of DTYPES."""
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="auto",
        help="dtype of the written weights; auto: each tensor's own",
    )


def run_tool(work: Callable[[Processes], int]) -> int:
    """Run `work` on this process's share; return its exit status, or 2 after a one-line error."""
    processes = Processes.join()
    try:
        status = work(processes)
    except (ConfigError, FileError) as error:
        wait_for_first_rank(processes.rank)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    processes.leave()
    return status
