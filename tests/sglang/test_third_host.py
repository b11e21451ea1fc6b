"""Run tests/helpers/multinode.py with a server on its own host.

The hosts share a network and the model's files.
"""

from __future__ import annotations

import os
from pathlib import Path

import multinode
import pytest

pytestmark = pytest.mark.needs_sglang


def test_a_host_that_samples_outlives_those_that_train(tmp_path, monkeypatch):
    # Four steps; the server gets every version by broadcast, also after the trainers were cut off and
    # restarted.
    if reason := multinode.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(multinode, "TIMEOUT", 8)
    found = multinode.run(
        tmp_path, steps=4, overrides=["evaluation.every=0"], sglang=Path(os.environ["SGLANG_PYTHON"])
    )
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(row["engine_logprob_gap"] < 1e-4 for row in found)
