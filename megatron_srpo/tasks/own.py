"""A user-defined task: one class in one Python file, given as task.path."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.tasks.worker import load_attribute

if TYPE_CHECKING:
    from megatron_srpo.tasks import Task


def create_own_task(source: TaskSource, seed: int) -> Task:
    """Create `MyTask(name, seed, **options)`, the file's class with prompt and verify (examples/own_task).

    Worker processes import the file, too, for its static method `verify(answer, text) -> Verdict`.

    Raises:
        ConfigError: The file cannot be run, or does not have exactly one such class.
    """
    assert source.path is not None
    file = source.path.resolve()
    if not file.is_file():
        raise ConfigError(f"task.path: {file} does not exist")
    try:
        module = load_attribute(f"{file}:")
    except Exception as error:
        problem = f"{type(error).__name__}: {error}; expected a Python file with one class"
        raise ConfigError(f"task.path: {file} cannot be run: {problem}") from error
    classes = [found for _, found in inspect.getmembers(module, inspect.isclass)]
    classes = [found for found in classes if found.__module__ == module.__name__]
    classes = [found for found in classes if hasattr(found, "prompt") and hasattr(found, "verify")]
    where, count = f"task.path: {file}", len(classes)
    if count != 1:
        raise ConfigError(f"{where}: expected one class with size, prompt and verify, found {count}")
    own: Any = classes[0]
    if not isinstance(inspect.getattr_static(own, "verify"), staticmethod):
        needed = "must be a @staticmethod (answer, text) -> Verdict"
        raise ConfigError(f"{where}: {own.__name__}.verify {needed}")
    try:
        task = own(source.name, seed, **source.options)
    except Exception as error:
        problem = f"cannot be created with {source.options}: {error}"
        raise ConfigError(f"{where}: {own.__name__} {problem}") from error
    task.name, task.verifier = source.name, f"{file}:{own.__qualname__}.verify"
    return task
