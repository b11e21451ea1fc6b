"""A task of the user's own: one class in one Python file, given as task.path."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from megatron_srpo.config.schema import ConfigError, TaskSource
from megatron_srpo.tasks.worker import load_attribute

if TYPE_CHECKING:
    from megatron_srpo.tasks import Task


def create_own_task(source: TaskSource, seed: int) -> Task:
    """Create `MyTask(name, seed, **options)`, the file's class with prompt and verify (examples/own_task).

    Its `verify(answer, text) -> Verdict` is a static method; it runs in worker processes, which import the
    file too.

    Raises:
        ConfigError: The file cannot be run or has no such class.
    """
    assert source.path is not None
    file = source.path.resolve()
    if not file.is_file():
        raise ConfigError(f"task.path: {file} does not exist")
    try:
        module = load_attribute(f"{file}:")
    except Exception as error:
        raise ConfigError(f"task.path: {file} cannot be run: {type(error).__name__}: {error}") from error
    classes = [
        found
        for _, found in inspect.getmembers(module, inspect.isclass)
        if found.__module__ == module.__name__ and hasattr(found, "prompt") and hasattr(found, "verify")
    ]
    if len(classes) != 1:
        raise ConfigError(
            f"task.path: {file}: expected one class with size, prompt and verify, found {len(classes)}"
        )
    own: Any = classes[0]
    if not isinstance(inspect.getattr_static(own, "verify"), staticmethod):
        raise ConfigError(
            f"task.path: {file}: {own.__name__}.verify must be a @staticmethod (answer, text) -> Verdict"
        )
    try:
        task = own(source.name, seed, **source.options)
    except Exception as error:
        raise ConfigError(
            f"task.path: {file}: {own.__name__} cannot be made with {source.options}: {error}"
        ) from error
    task.name, task.verifier = source.name, f"{file}:{own.__qualname__}.verify"
    return task
