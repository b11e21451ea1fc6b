#!/usr/bin/env python3
"""Compare two models: every tensor, and logits on random ids.

Each is a Hugging Face folder, a megatron-core checkpoint or a training run.

    python tools/verify_checkpoint.py A B

Exit status: 0 the same, 1 different, 2 something cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from math import prod
from pathlib import Path

from _cli import run_tool
from _compare import Difference, compare_tensors, difference, logits
from _folders import architecture_folder, open_tensors

from megatron_srpo.__main__ import quieten_libraries
from megatron_srpo.checkpoint.weights import RunTensors, is_of_a_run
from megatron_srpo.distributed.byte_progress import ByteProgress
from megatron_srpo.distributed.files import FileError
from megatron_srpo.distributed.processes import Processes
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights.sources import Tensors


def tensors_are_equal(first: Tensors, second: Tensors, tolerance: float) -> bool:
    """Print every difference larger than `tolerance`; return whether there was none."""
    total = sum(prod(first.shape(name)) * first.dtype(name).itemsize for name in first.names())
    equal, tolerated = True, 0
    with ByteProgress("comparing", total) as progress:
        for found in compare_tensors(first, second, progress):
            if isinstance(found, Difference) and found.largest <= tolerance:
                tolerated += 1
                continue
            equal = False
            print(found, flush=True)
    if equal:
        print(
            f"{len(first.names())} tensors are "
            + (f"equal within {tolerance}; {tolerated} not exactly" if tolerated else "equal")
        )
    return equal


def logits_are_equal(first: Tensors, second: Tensors, folder: Path, tolerance: float) -> bool:
    """Print the difference of the logits; return whether it is within `tolerance`."""
    found = difference("logits", logits(first, folder), logits(second, folder))
    print(found or "logits are equal")
    return found is None or found.largest <= tolerance


def main() -> int:
    """Compare; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, metavar="A")
    parser.add_argument("second", type=Path, metavar="B")
    parser.add_argument(
        "--hf-reference",
        type=Path,
        metavar="DIR",
        help="folder whose config.json describes both, if neither has one",
    )
    parser.add_argument(
        "--weights",
        choices=["policy", "teacher"],
        default="policy",
        help="which weights of a training run (default: policy)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="largest absolute difference of weights and logits that counts as equal",
    )
    parser.add_argument(
        "--no-logits",
        action="store_true",
        help="skip the logits, for models that do not fit in memory in fp32",
    )
    options = parser.parse_args()
    quieten_libraries()

    def work(processes: Processes) -> int:
        given = options.hf_reference and HFFolder(options.hf_reference)
        reference = given or architecture_folder(options.first) or architecture_folder(options.second)
        if reference is None:
            folders = f"{options.first} and {options.second}"
            raise FileError(f"{folders} have no config.json; name a Hugging Face folder with --hf-reference")
        first, second = (
            RunTensors(path, options.weights) if is_of_a_run(path) else open_tensors(path, reference)
            for path in (options.first, options.second)
        )
        equal = tensors_are_equal(first, second, options.tolerance)
        if not options.no_logits and set(first.names()) == set(second.names()):
            equal = logits_are_equal(first, second, reference.path, options.tolerance) and equal
        return 0 if equal else 1

    return run_tool(work)


if __name__ == "__main__":
    sys.exit(main())
