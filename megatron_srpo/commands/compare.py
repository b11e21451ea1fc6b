"""srpo compare: compare evaluations with the first of them."""

import argparse
from pathlib import Path

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.visible import visible

HELP = "compare evaluations with the first one, by a paired bootstrap over questions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folders to compare."""
    parser.add_argument("results", nargs="+", type=Path, metavar="DIR", help="folders that eval has written")


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison; raise ConfigError for fewer than two folders."""
    from megatron_srpo.evaluation.scoreboard import compare

    if len(arguments.results) < 2:
        raise ConfigError("compare: expected two folders or more")
    print(visible(compare(arguments.results)))
    return 0
