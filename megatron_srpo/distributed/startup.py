"""Shorten the start of a process: imports without garbage collection, and without torch's compiler."""

import atexit
import gc
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_COMPILER = "torch._dynamo"
_default_thresholds = gc.get_threshold()


@contextmanager
def deferred_collection() -> Iterator[None]:
    """Collect garbage rarely in the block or until `resume_collection`: 10^6 objects of modules are none."""
    before = gc.get_threshold()
    gc.set_threshold(1_000_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def resume_collection() -> None:
    """Collect garbage as Python does by default, but until the exit not what exists so far."""
    gc.freeze()
    atexit.register(gc.unfreeze)
    gc.set_threshold(*_default_thresholds)


@contextmanager
def without_packages(*names: str) -> Iterator[None]:
    """Let `import` in the block fail for optional packages and modules that are not imported already."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import modules in the block without torch._dynamo, which takes a second, unless it is imported already.

    transformers imports it only for decorators that exclude functions from compilation.
    """
    if _COMPILER in sys.modules:
        yield
        return
    stand_in = sys.modules[_COMPILER] = _NoCompiler()
    try:
        yield
    finally:
        if sys.modules[_COMPILER] is stand_in:
            del sys.modules[_COMPILER]


class _NoCompiler(types.ModuleType):
    """Replace torch._dynamo while other modules are imported; anything but decorators imports it."""

    def __init__(self):
        super().__init__(_COMPILER)
        torch_spec = importlib.util.find_spec("torch")
        assert torch_spec is not None and torch_spec.origin is not None
        self.__path__ = [str(Path(torch_spec.origin).parent / "_dynamo")]  # its submodules can be imported

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
        return getattr(importlib.import_module(_COMPILER), name)

    @staticmethod
    def disable(fn=None, *_, **__):
        """Decorate a function, or return the decorator, without any effect."""
        return fn if fn is not None else lambda function: function

    allow_in_graph = assume_constant_result = disable
