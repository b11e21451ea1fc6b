"""Arguments and errors shared by the commands that take a configuration file."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import Config
from megatron_srpo.data.visible import visible


def is_first_rank() -> bool:
    """Return True on rank 0 of torchrun, and without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG.yaml and its overrides."""
    parser.add_argument("config", type=Path, help="YAML file, see examples/")
    add_overrides(parser, "settings that replace the file's; before the options")


def add_overrides(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add any number of positional section.key=value."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=help_text)


def configured(command: Callable[[Config], int]) -> Callable[[argparse.Namespace], int]:
    """Decorate a command to load its configuration, and to return 1 after a failed engine or a full disk."""

    def run(arguments: argparse.Namespace) -> int:
        from megatron_srpo.model.hf_folder import naming_key
        from megatron_srpo.rollout.engine import EngineFailed

        config = load_config(arguments.config, arguments.overrides)
        try:
            with naming_key("model.hf_path"):
                return command(config)
        except EngineFailed as error:  # on any rank alone
            print(visible(f"stopped: {error}"), file=sys.stderr)
            return 1
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            where = f"logging.dir: {config.logging.dir}: {error.strerror}"
            print(f"stopped: {where}; free some space and run the same command again", file=sys.stderr)
            return 1

    return run
