"""The built-in tasks and verifiers, found by importing the modules of this folder.

A module declares `TASK = BuiltinTask(…)`, `VERIFIER = Verifier(…)`, or both.
"""

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.tasks.worker import Verify

if TYPE_CHECKING:
    from megatron_srpo.tasks import Task


class BuiltinTask(NamedTuple):
    """A task that creates its own prompts, without task.path.

    Attributes:
        name: The value of task.name; "family/DATASET" stands for every name that begins with "family/".
        create: Creates the task from its source and the run's seed.
        reads_options: The task reads task.options.
    """

    name: str
    create: Callable[[TaskSource, int], "Task"]
    reads_options: bool = False

    def matches(self, name: str) -> bool:
        """Return True if a task of this name is created here."""
        family, slash, _ = self.name.partition("/")
        return name.startswith(family + slash) if slash else name == self.name


def accept_any(answer: str, question: str, verify: Verify) -> None:
    """Accept every gold answer."""


class Verifier(NamedTuple):
    """A way to judge answers to the questions of a file.

    Attributes:
        name: The value of task.verifier.
        rules: Functions by task.rule ("paper", "strict"); a worker imports them by module and name.
        tasks: Values of task.name that imply this verifier.
        phrase: Turns a plain question into the user's message.
        requires: A module that must be installed (extra `tasks`).
        check_gold: Raises ValueError("found; expected …") for an answer that no response can match, given
            (answer, question, function of the rule).
    """

    name: str
    rules: dict[str, Verify]
    tasks: tuple[str, ...] = ()
    phrase: Callable[[str], str] = str
    requires: str | None = None
    check_gold: Callable[[str, str, Verify], None] = accept_any

    def path(self, rule: str) -> str:
        """Return "module:function" of a rule."""
        function = self.rules[rule]
        return f"{function.__module__}:{function.__qualname__}"


@cache
def builtin_tasks() -> dict[str, BuiltinTask]:
    """Return the tasks that need no files, by name."""
    return {found.name: found for found in _declared("TASK")}


@cache
def verifiers() -> dict[str, Verifier]:
    """Return the verifiers by name."""
    return {found.name: found for found in _declared("VERIFIER")}


def _declared(attribute: str) -> list:
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names]
    return [getattr(module, attribute) for module in modules if hasattr(module, attribute)]
