#!/usr/bin/env python3
"""Convert a megatron-core checkpoint (torch_dist), or a training run's, to a Hugging Face folder.

transformers and SGLang load the result.

    python tools/convert_megatron_to_hf.py --checkpoint DIR --hf-reference DIR --output DIR
    python tools/convert_megatron_to_hf.py --checkpoint RUN --weights policy|teacher --hf-reference DIR
    --output DIR
    torchrun --nproc-per-node N tools/convert_megatron_to_hf.py …          each process writes its share

--checkpoint is the folder with .metadata and metadata.json, or one whose latest_checkpointed_iteration.txt
names it; or a run folder (its newest checkpoint), or RUN/checkpoints/step_NNNNNN. In fp32 with --dtype
float32, as a run's checkpoint keeps it. --hf-reference gives config.json, generation_config.json and the
tokenizer; its weights are not read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _cli import DTYPES, add_dtype, run_tool
from _folders import checkpoint_folder

from megatron_srpo.checkpoint.weights import RunTensors, is_of_a_run
from megatron_srpo.distributed.files import FileError
from megatron_srpo.distributed.processes import Processes
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.weights.convert import to_hf
from megatron_srpo.weights.sources import MegatronTensors


def main() -> int:
    """Convert; return the exit status, 2 for an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--hf-reference", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--weights",
        choices=["policy", "teacher"],
        default="policy",
        help="which weights of a training run (default: policy)",
    )
    add_dtype(parser)
    options = parser.parse_args()

    def work(processes: Processes) -> int:
        reference = HFFolder(options.hf_reference)
        if is_of_a_run(options.checkpoint):
            source = RunTensors(options.checkpoint, options.weights)
            if source.architecture != reference.architecture:
                raise FileError(
                    f"{options.hf_reference}: its config.json differs from the model in {source.folder.path}"
                )
        elif options.weights == "teacher":
            raise FileError(
                f"--weights teacher: {options.checkpoint} is no training run's folder: it has no teacher"
            )
        else:
            source = MegatronTensors(checkpoint_folder(options.checkpoint), reference.architecture)
        to_hf(source, reference, options.output, processes, DTYPES[options.dtype])
        return 0

    return run_tool(work)


if __name__ == "__main__":
    sys.exit(main())
