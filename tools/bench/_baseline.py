"""Measure another commit in the same run, from a git worktree of it (`--baseline REF`).

with baseline_tree("551ecf2") as tree:
    row = run_json([sys.executable, __file__, "--json"], tree)
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _report import ROOT


@contextmanager
def baseline_tree(reference: str) -> Iterator[Path]:
    """Check out a commit in a temporary git worktree, and remove it when the block ends.

    Yields:
        The worktree's folder.
    """
    with tempfile.TemporaryDirectory(prefix="baseline-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", str(tree), reference)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def tree_environment(tree: Path, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment, in which Python imports the package of `tree`."""
    return {**os.environ, **(variables or {}), "PYTHONPATH": str(tree)}


def find_script(tree: Path, name: str) -> Path:
    """Return the path of a benchmark in `tree`; at 551ecf2 they were in tools/."""
    return next(path for path in (tree / "tools/bench" / name, tree / "tools" / name) if path.exists())


def run_json(command: list[str], tree: Path = ROOT, variables: Mapping[str, str] | None = None) -> Any:
    """Run a command with the package of `tree`, in that folder.

    Args:
        command: Prints a JSON value as its last line.
        tree: This checkout, or a `baseline_tree`.
        variables: Added to the environment.

    Returns:
        The parsed last line.

    Raises:
        SystemExit: The command failed; with the end of its errors.
    """
    environment = tree_environment(tree, variables)
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} in {tree}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _git(*arguments: str) -> None:
    """Run git in this checkout; exit with its message if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
