"""Arguments and errors shared by the commands that take a configuration file."""

import argparse
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

from megatron_srpo.config.explain import keys_named
from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import Config
from megatron_srpo.data.visible import visible, without_logins


def is_first_rank() -> bool:
    """Return True on rank 0 of torchrun, and without torchrun."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdecimal() or int(rank) == 0  # every rank reports a RANK that is no number


class Parser(argparse.ArgumentParser):
    """A parser that also takes overrides behind options, and reports an error in one line."""

    @override
    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        # argparse reads all values of a positional argument at once: those behind an option are left over.
        arguments, left = self.parse_known_args(args, namespace)
        overrides = getattr(arguments, "overrides", None)
        if overrides is not None:
            arguments.overrides = [*overrides, *(text for text in left if not text.startswith("-"))]
            left = [text for text in left if text.startswith("-")]
        if left:
            self._refuse(left[0], arguments)
        return arguments

    @override
    def error(self, message: str) -> NoReturn:
        if match := re.match(r"argument command: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            known = re.findall(r"[\w-]+", match[2])
            near = difflib.get_close_matches(match[1], known, n=1, cutoff=0.7)
            message = f"unknown command {match[1]!r}; "
            message += f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        elif match := re.match(r"argument (\S+): invalid (\w+) value: (.*)", message):
            kind = {"int": "an integer", "float": "a number"}.get(match[2], match[2])
            message = f"{match[1]}: expected {kind}, not {match[3]}"
        elif match := re.match(r"the following arguments are required: (.*)", message):
            message = f"expected {match[1].replace(', ', ' and ')}, which is missing"
        sentence = f"{self.prog}: error: {message}; see {self.prog} --help"
        print(visible(without_logins(sentence)), file=sys.stderr)
        raise SystemExit(2)

    def _refuse(self, text: str, arguments: argparse.Namespace) -> None:
        """Report an argument that the chosen command does not have, with the nearest option or key."""
        name, _, value = text.partition("=")
        key = name.lstrip("-").replace("-", "_")
        commands = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        command: argparse.ArgumentParser = commands[0].choices[arguments.command] if commands else self
        options = [option for action in command._actions for option in action.option_strings]
        message = f"unknown argument {text!r}"
        if near := difflib.get_close_matches(name, options, n=1, cutoff=0.7):
            message += f"; did you mean {near[0]}?"
        elif hasattr(arguments, "overrides") and name.startswith("-"):
            meant = [f"{dotted}={value or '…'}" for dotted in keys_named(key)] or ["section.key=value"]
            message += f"; expected a key of the configuration as {' or '.join(meant)}"
        command.error(message)


def add_config_arguments(
    parser: argparse.ArgumentParser, help_text: str = "YAML file, see examples/"
) -> None:
    """Add CONFIG.yaml and its overrides."""
    parser.add_argument("config", type=Path, help=help_text)
    add_overrides(parser, "settings that replace the file's")


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
