"""Run tests/helpers/multinode.py briefly, where this machine permits two simulated hosts."""

from __future__ import annotations

import multinode
import pytest


def test_a_cut_cable_ends_the_run_and_the_same_command_resumes(tmp_path, monkeypatch):
    # Four steps on two hosts, cut off after the second.
    if reason := multinode.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(multinode, "TIMEOUT", 8)
    found = multinode.run(tmp_path, steps=4, overrides=["evaluation.every=0"])
    assert [row["step"] for row in found] == [1, 2, 3, 4]
