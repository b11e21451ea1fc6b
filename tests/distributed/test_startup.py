"""Modules imported without torch's compiler leave it usable; collection is as before after the start."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from megatron_srpo.distributed.startup import deferred_collection, resume_collection, without_packages

WITHOUT_COMPILER = """
import sys
import torch
from megatron_srpo.distributed.startup import without_compiler
with without_compiler():
    import torch._dynamo

    @torch._dynamo.disable
    def double(x):
        return 2 * x

    @torch._dynamo.disable(recursive=False)
    def half(x):
        return x / 2

    assert double(half(3)) == 3
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
with without_compiler():
    import torch._dynamo

    assert torch._dynamo.config.cache_size_limit > 0  # not a decorator: imports it
assert sys.modules["torch._dynamo"].__file__.endswith("__init__.py")
x = torch.ones(3)
assert torch.equal(torch.compile(lambda y: double(y) + 1, backend="eager")(x), torch.full((3,), 3.0))
"""


def test_compiler_can_be_imported_later():
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_packages_are_hidden_in_the_block_only():
    import colorsys

    with without_packages("colorsys", "tabnanny"):
        import colorsys as again

        assert again is colorsys  # imported before: it stays
        with pytest.raises(ModuleNotFoundError):
            import tabnanny  # noqa: F401
    import tabnanny  # noqa: F401


def test_collection_resumes():
    before = gc.get_threshold()
    with deferred_collection():
        assert gc.get_threshold()[0] > 10 * before[0]
        resume_collection()
        assert gc.get_threshold() == before and gc.get_freeze_count() > 0
    assert gc.get_threshold() == before
    gc.unfreeze()
