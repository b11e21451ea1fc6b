#!/usr/bin/env python3
"""Compare two models: every tensor, and logits on random ids.

Each is a Hugging Face folder, a megatron-core checkpoint or a training run. Hugging Face folders are read by
transformers, a layer at a time.

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


def differences(first: Tensors, second: Tensors) -> list[Difference | str]:
    """Return how the tensors differ, with lines for names and shapes."""
    total = sum(prod(first.shape(name)) * first.dtype(name).itemsize for name in first.names())
    with ByteProgress("comparing", total) as progress:
        return list(compare_tensors(first, second, progress))


def summary(found: list[Difference | str], count: int, tolerance: float) -> str:
    """Return one line about all tensors."""
    values = [each for each in found if isinstance(each, Difference)]
    beyond = [each for each in values if each.largest > tolerance]
    if len(found) == len(values) and not beyond:
        exact = f" within {tolerance}; {len(values)} not exactly" if values else ""
        return f"{count} tensors are equal{exact}"
    parts = []
    if beyond:
        worst = max(beyond, key=lambda each: each.largest)
        most = f"by at most {worst.largest:.3g} ({worst.name})"
        parts.append(f"{len(beyond)} of {count} tensors differ, {most}")
    if others := len(found) - len(values):
        parts.append(f"{others} tensors are missing from one of the two, or have another shape")
    return "different: " + "; ".join(parts)


def compare(first: Tensors, second: Tensors, folder: Path | None, tolerance: float) -> bool:
    """Print a summary, then every difference larger than `tolerance`; return whether there is none.

    Logits are computed with config.json of `folder`, if it is not None.
    """
    found = differences(first, second)
    print(summary(found, len(first.names()), tolerance), flush=True)
    beyond = [each for each in found if not isinstance(each, Difference) or each.largest > tolerance]
    equal = not beyond
    if folder is not None and set(first.names()) == set(second.names()):
        other = difference("logits", logits(first, folder), logits(second, folder))
        print(other or "logits are equal", flush=True)
        equal = equal and (other is None or other.largest <= tolerance)
    for each in beyond:
        print(each)
    return equal


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
        "--no-logits", action="store_true", help="compare tensors only, which takes less time"
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
        folder = None if options.no_logits else reference.path
        return 0 if compare(first, second, folder, options.tolerance) else 1

    return run_tool(work)


if __name__ == "__main__":
    sys.exit(main())
