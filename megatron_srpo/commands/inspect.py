"""srpo inspect: the samples of one step in the terminal."""

import argparse
from pathlib import Path

HELP = "show a step's samples, or one of them token by token, in the terminal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folder, the step and the sample."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--sample", type=int, help="number in the step, from 0; default: list them")


def run(arguments: argparse.Namespace) -> int:
    """Show the sample, or list the step's samples."""
    from rich.console import Console

    from megatron_srpo.observe.inspect import inspect

    inspect(arguments.run_folder, arguments.step, arguments.sample, Console(highlight=False))
    return 0
