"""What the programs in tools/ share: processes that meet, errors that are one line, the choice of a dtype."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

from megatron_srpo.config.schema import ConfigError
from megatron_srpo.distributed.files import FileError
from megatron_srpo.distributed.processes import Processes

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype, whose value is a key of DTYPES."""
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="auto",
        help="of the weights written; auto: each tensor's own",
    )


def run_tool(work: Callable[[Processes], int]) -> int:
    """Call `work` on this process's share; returns its exit status, or 2 after an error that was told in one
    line.
    """
    processes = Processes.join()
    try:
        status = work(processes)
    except (ConfigError, FileError) as error:
        if (
            processes.rank > 0
        ):  # torchrun ends all ranks when one leaves: where all find the same, let the first speak alone
            time.sleep(5)
        print(f"error: {str(error).removeprefix('model.hf_path: ')}", file=sys.stderr, flush=True)
        return 2
    processes.leave()
    return status
