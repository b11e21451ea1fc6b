"""Training methods, one module each: a subclass of `Algorithm` that registers itself under its `name`."""

import importlib
import pkgutil

from megatron_srpo.algorithm.settings import Algorithm

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

METHODS = Algorithm.registered
