"""A user-defined task: one class in one Python file, given as task.path."""

from __future__ import annotations

import inspect
import random
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.data.records import Prompt
from megatron_srpo.tasks.worker import load_attribute


def create_own_task(source: TaskSource, seed: int) -> OwnTask:
    """Create `MyTask(name, seed, **options)`, the file's class with prompt and verify (examples/own_task).

    Worker processes import the file, too, for its static method `verify(answer, text) -> Verdict`.

    Raises:
        ConfigError: The file cannot be run, or does not have exactly one such class.
    """
    assert source.path is not None
    file = source.path.resolve()
    if not file.is_file():
        raise ConfigError(f"task.path: {file} does not exist")
    where = f"task.path: {file}"
    try:
        module = load_attribute(f"{file}:")
    except Exception as error:
        problem = f"{_said(error)}; expected a Python file with one class"
        raise ConfigError(f"{_at(where, file, error)} cannot be run: {problem}") from error
    classes = [found for _, found in inspect.getmembers(module, inspect.isclass)]
    classes = [found for found in classes if found.__module__ == module.__name__]
    classes = [found for found in classes if hasattr(found, "prompt") and hasattr(found, "verify")]
    count = len(classes)
    if count != 1:
        raise ConfigError(f"{where}: expected one class with size, prompt and verify, found {count}")
    own: Any = classes[0]
    if not isinstance(inspect.getattr_static(own, "verify"), staticmethod):
        needed = "must be a @staticmethod (answer, text) -> Verdict"
        raise ConfigError(f"{where}: {own.__name__}.verify {needed}")
    try:
        task = own(source.name, seed, **source.options)
    except Exception as error:
        problem = f"{own.__name__} cannot be created with {source.options}: {_said(error)}"
        raise ConfigError(f"{_at(where, file, error)} {problem}") from error
    return OwnTask(task, source.name, seed, file, f"{file}:{own.__qualname__}.verify")


class OwnTask:
    """The user's object, with endless epochs: training uses each prompt once an epoch, in a new order."""

    def __init__(self, task: Any, name: str, seed: int, file: Path, verifier: str):
        """Read the sizes, and the prompts at both ends of every split. Raises ConfigError."""
        self.name, self.verifier = name, verifier
        self._task, self._seed, self._file = task, seed, file
        self._sizes = {split: self._size_of(split) for split in ("train", "validation", "test")}
        self._order = lru_cache(maxsize=2)(self._shuffled)
        for split, size in self._sizes.items():
            for index in {0, (size or 1) - 1} if size != 0 else ():
                self._own_prompt(split, index)

    def size(self, split: str) -> int | None:
        """Return the number of prompts in `split`; None: endless."""
        return self._sizes[split]

    def prompt(self, split: str, index: int) -> Prompt:
        """Return prompt `index`, of endless epochs in training. Raises ConfigError for the user's errors."""
        size = self._sizes[split]
        if split != "train" or size is None:
            return self._own_prompt(split, index)
        epoch, place = divmod(index, size)
        prompt = self._own_prompt(split, self._order(epoch)[place])
        return prompt.model_copy(update={"id": f"{prompt.id}/{epoch}"})

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the user's object."""
        return getattr(self._task, name)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(self._sizes["train"] or 0))
        random.Random(f"{self._seed}/{self.name}/{epoch}").shuffle(order)
        return order

    def _own_prompt(self, split: str, index: int) -> Prompt:
        found = self._call("prompt", split, index)
        if not isinstance(found, Prompt):
            call = f"prompt({split!r}, {index})"
            raise ConfigError(f"{self._where}: {call} returned {_short(found)}, expected a Prompt")
        return found.model_copy(update={"task": self.name})

    def _size_of(self, split: str) -> int | None:
        size = self._call("size", split)
        if size is None or isinstance(size, int) and not isinstance(size, bool) and size >= 0:
            return size
        expected = "expected the number of prompts, or None for endless ones"
        raise ConfigError(f"{self._where}: size({split!r}) returned {_short(size)}, {expected}")

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._task, method)(*arguments)
        except Exception as error:
            call = f"{method}({', '.join(map(repr, arguments))})"
            where = _at(self._where, self._file, error)
            raise ConfigError(f"{where} {call} raised {_said(error)}") from error

    @property
    def _where(self) -> str:
        return f"task {self.name}: {self._file}"


def _at(where: str, file: Path, error: Exception) -> str:
    """Add the line in the user's file where `error` was raised to `where`, which ends with the file."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    if isinstance(error, SyntaxError) and error.filename == str(file):
        lines = [error.lineno]
    return f"{where}:{lines[-1]}:" if lines else f"{where}:"


def _said(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
