"""srpo report: one HTML page about one or more runs."""

import argparse
from pathlib import Path

from megatron_srpo.distributed.files import FileError

HELP = "write one HTML page with the curves and samples of one or more runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folders and the output file."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    output_help = "default: report.html in the first run's folder"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output_help)


def run(arguments: argparse.Namespace) -> int:
    """Write the page; raise FileError if it cannot be written."""
    from megatron_srpo.observe.report import write_report

    output = arguments.output or arguments.runs[0] / "report.html"
    try:
        write_report(arguments.runs, output)
    except OSError as error:
        raise FileError(f"{output}: cannot be written: {error.strerror}") from None
    print(f"report: {output}  ({output.stat().st_size / 1e6:.1f} MB)")
    return 0
