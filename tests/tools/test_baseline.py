"""A benchmark's `--baseline` runs another commit's package and leaves no worktree behind."""

from __future__ import annotations

import subprocess
import sys

import _baseline
import pytest


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Return a repository with two commits of a package, which says `old` and `new`."""
    monkeypatch.setattr(_baseline, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    for name in ("old", "new"):
        (tmp_path / "megatron_srpo.py").write_text(f"NAME = {name!r}\n")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", name], check=True)
        subprocess.run([*git, "tag", name], check=True)
    return tmp_path


def worktrees(checkout) -> int:
    found = subprocess.run(["git", "-C", checkout, "worktree", "list"], capture_output=True, text=True)
    return len(found.stdout.splitlines())


def test_package_of_the_commit(checkout):
    program = "import json, megatron_srpo; print('log'); print(json.dumps([megatron_srpo.NAME]))"
    command = [sys.executable, "-c", program]
    with _baseline.baseline_tree("old") as tree:
        assert _baseline.run_json(command, tree) == ["old"]
        assert _baseline.run_json(command, checkout) == ["new"]
        assert worktrees(checkout) == 2
    assert worktrees(checkout) == 1 and not tree.exists()


def test_worktree_is_removed_after_a_failure(checkout):
    with pytest.raises(SystemExit, match="no such thing"), _baseline.baseline_tree("old") as tree:
        _baseline.run_json([sys.executable, "-c", "raise ValueError('no such thing')"], tree)
    assert worktrees(checkout) == 1


def test_unknown_commit(checkout):
    with pytest.raises(SystemExit, match="nowhere"), _baseline.baseline_tree("nowhere"):
        pass


def test_scripts_of_both_layouts(tmp_path):
    (tmp_path / "tools").mkdir()
    old = tmp_path / "tools" / "bench_step.py"
    old.write_text("")
    assert _baseline.find_script(tmp_path, "bench_step.py") == old
    new = tmp_path / "tools" / "bench" / "bench_step.py"
    new.parent.mkdir()
    new.write_text("")
    assert _baseline.find_script(tmp_path, "bench_step.py") == new
