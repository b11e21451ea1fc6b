#!/usr/bin/env python3
"""Convert a Hugging Face folder to a megatron-core checkpoint (torch_dist) for any TP, PP and VPP.

python tools/convert_hf_to_megatron.py --hf-path DIR --output DIR
torchrun --nproc-per-node N tools/convert_hf_to_megatron.py …          each process writes its share
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _cli import DTYPES, add_dtype, run_tool

from megatron_srpo.config.schema import ModelSection
from megatron_srpo.distributed.processes import Processes
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights.convert import to_megatron
from megatron_srpo.weights.sources import HFTensors


def main() -> int:
    """Convert; return the exit status, 2 for an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hf-path", type=Path, required=True, metavar="DIR", help="config.json and safetensors"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add_dtype(parser)
    field = ModelSection.model_fields["make_vocab_size_divisible_by"]
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=field.default,
        metavar="N",
        help="pad the vocabulary to a multiple of N (default %(default)s); megatron-core loads any padding",
    )
    options = parser.parse_args()
    if options.make_vocab_size_divisible_by < 1:
        parser.error("--make-vocab-size-divisible-by: expected a positive number")

    def work(processes: Processes) -> int:
        folder = HFFolder(options.hf_path)
        if processes.rank == 0:
            folder.check_weights()
        to_megatron(
            HFTensors(folder),
            folder,
            options.output,
            processes,
            DTYPES[options.dtype],
            options.make_vocab_size_divisible_by,
        )
        return 0

    return run_tool(work)


if __name__ == "__main__":
    sys.exit(main())
