# PYTHON_ARGCOMPLETE_OK
"""The command line: `srpo` or `python -m megatron_srpo`, under torchrun for more than one process.

Nothing here imports torch before a command that needs it runs, so that `--help` and `config` are quick.
"""

import argparse
import importlib
import io
import logging
import os
import sys
import warnings

from megatron_srpo.commands.common import Parser, is_first_rank
from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.visible import visible
from megatron_srpo.distributed.files import FileError
from megatron_srpo.distributed.startup import deferred_collection

COMMANDS = ("train", "sample", "eval", "plan", "compare", "report", "inspect", "config")


def main() -> int:
    """Run the command of the command line and return the exit status.

    0; 1: stopped; 2: wrong configuration or file; 75: exited on request, can be resumed; 130: Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe's encoding may be ASCII: · becomes ?
            stream.reconfigure(errors="replace")
    with deferred_collection():
        return _run()


def _run() -> int:
    parser = command_line()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell function that argcomplete registers
        importlib.import_module("argcomplete").autocomplete(parser)
    arguments = parser.parse_args()
    quieten_libraries()
    try:
        status = arguments.run(arguments)
    except KeyboardInterrupt:
        if is_first_rank():
            print("interrupted", file=sys.stderr)
        status = 130
    except (ConfigError, FileError) as error:
        if is_first_rank():
            kind = "configuration error" if isinstance(error, ConfigError) else "error"
            print(visible(f"{kind}: {error}"), file=sys.stderr, flush=True)
        else:
            from megatron_srpo.distributed.processes import rank_from_environment, wait_for_first_rank

            wait_for_first_rank(rank_from_environment())
        status = 2
    except Exception as error:
        if not _has_peers():
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    if _has_peers():  # a rank that failed alone: Python's own exit would wait, in NCCL, for the other ranks
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def command_line() -> argparse.ArgumentParser:
    """Build the parser of all commands; the chosen one's function is in `arguments.run`."""
    parser = Parser("srpo", description="Sample-Routed Policy Optimization on megatron-core")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"megatron_srpo.commands.{name}")
        subparser = subparsers.add_parser(name, help=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def quieten_libraries() -> None:
    """Let torch and Megatron log errors only, and set what they read from the environment at import."""
    # Megatron needs it for tensor parallelism on Hopper and older.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # As SGLang's servers set it: NCCL hangs or fails where two sides of a group differ.
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    # OpenMP's threads sleep after 50 µs without work. The default, some 10 ms of spinning, takes the cores
    # from other processes, and from their own when there are more threads than free cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    warnings.filterwarnings("ignore", module="megatron|torch|transformers")


def _has_peers() -> bool:
    """Return True while this process is in a group with other ranks."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized() and dist.get_world_size() > 1


if __name__ == "__main__":
    sys.exit(main())
