"""Let a stock SGLang wheel start without Triton and torchvision.

A .pth file imports this module at every start of Python.

SGLang imports both at module level and calls neither on its CPU path. Missing packages are replaced by hollow
modules: any attribute is there, any call does nothing. Without SGLANG_USE_CPU_ENGINE=1 nothing happens.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types

REPLACED = ("triton", "torchvision", "torchaudio")


class _HollowType(type):
    """Return class attributes (members of an enum, say) as their own names."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Hollow(metaclass=_HollowType):
    """Accept any arguments and do nothing; can be inherited from."""

    def __init__(self, *args, **kwargs):
        self.kwargs = kwargs  # triton.Config's are read back


class _HollowModule(types.ModuleType):
    """Return a class for a capitalised attribute and a module for any other one.

    Called, it is a decorator that changes nothing.
    """

    __version__ = "3.5.0"
    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = (
            _HollowType(name, (_Hollow,), {})
            if name[0].isupper()
            else _HollowModule(f"{self.__name__}.{name}")
        )
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs):
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function: function

    def __getitem__(self, key):
        return self

    def __iter__(self):
        return iter(())

    def __bool__(self):
        return False


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find and load hollow modules, except for callers that only check for the package."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package not in self.packages or (package != "triton" and _is_only_probed()):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = _HollowModule(spec.name)
        if spec.name == "triton":  # the two functions that the CPU path does call
            module.__dict__["cdiv"] = lambda a, b: -(-a // b)
            module.__dict__["next_power_of_2"] = lambda n: 1 << max(n - 1, 0).bit_length()
        return module

    def exec_module(self, module):
        pass


def _is_only_probed():
    """Return whether importlib.util.find_spec is the caller.

    transformers calls it before it uses an optional package.
    """
    frame = sys._getframe(2)
    for _ in range(5):
        if frame is None:
            return False
        if (
            frame.f_code.co_filename.endswith("importlib/util.py")
            or "importlib.util" in frame.f_code.co_filename
        ):
            return True
        frame = frame.f_back
    return False


if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    sys.meta_path.append(_Finder([name for name in REPLACED if importlib.util.find_spec(name) is None]))
