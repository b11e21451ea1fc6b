"""Find the published data for the tests that read it; it is never in the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def real_data(name: str) -> Path:
    """Return the published folder `name` (sciknoweval, toolalpaca); skip the test without it.

    It is in MEGATRON_SRPO_DATA, or in ../shared/data next to the checkout.
    """
    root = Path(os.environ.get("MEGATRON_SRPO_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (root / name).is_dir():
        pytest.skip(f"{name} is not there; set MEGATRON_SRPO_DATA to the folder that holds it")
    return root / name
