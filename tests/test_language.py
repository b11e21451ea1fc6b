"""Find docstrings that do not start with a sentence, and phrases for which the field has standard terms."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("megatron_srpo", "tools", "tests", "examples")
SUFFIXES = (".py", ".md", ".sh", ".sbatch", ".yaml", ".toml", ".html", ".js")
HEADLESS = re.compile(r"(What|Whether|Where|How|Of|As|Why|Which|Whoever)\b")
# Written with hyphens, so that this file does not contain the phrases; `ane[w]` for the same reason.
PHRASES = [
    "goes-on",
    "gone-on",
    "going-on",
    "given-up",
    "is-told",
    "are-told",
    "ane[w]",
    "broken-off",
    "passed-over",
    "carried-on",
]
# Also matches in identifiers, and across the lines of a comment.
SEPARATOR = r"(?:_|\s+(?:(?:#|//|\*)\s*)?)"
PATTERN = re.compile(
    "(?<![A-Za-z])(?:" + "|".join(PHRASES).replace("-", SEPARATOR) + ")(?![A-Za-z])", re.IGNORECASE
)
# (path, line's text without surrounding space) of proper uses
ALLOWED: set[tuple[str, str]] = set()


def tracked():
    """Return the paths of files in git, relative to the repository; skip the test without git."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    return [path for path in done.stdout.split("\0") if path.endswith(SUFFIXES) and (ROOT / path).exists()]


def headless_docstrings(text):
    """Yield (line, first line) of docstrings in Python source that start with a word of HEADLESS."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and HEADLESS.match(docstring):
                yield node.body[0].lineno, docstring.splitlines()[0]


def phrases(path, text):
    """Yield (line, its text) of every phrase that is not in ALLOWED."""
    lines = text.splitlines()
    for match in PATTERN.finditer(text):
        number = text.count("\n", 0, match.start())
        if (path, lines[number].strip()) not in ALLOWED:
            yield number + 1, lines[number].strip()


def test_docstrings_start_with_a_sentence():
    found = [
        f"{path}:{line}: {start}"
        for path in tracked()
        if path.endswith(".py") and path.startswith(FOLDERS)
        for line, start in headless_docstrings((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not found, "start the docstring with a verb:\n" + "\n".join(found)


def test_standard_terms():
    found = [
        f"{path}:{line}: {text}"
        for path in tracked()
        for line, text in phrases(path, (ROOT / path).read_text(encoding="utf-8"))
    ]
    advice = "write resume, continue, abort, discard, report, again, skip instead:\n"
    assert not found, advice + "\n".join(found)


def test_both_would_be_found():
    text = "\n".join(["first line", *(phrase.replace("-", " ").replace("[w]", "w") for phrase in PHRASES)])
    assert [line for line, _ in phrases("x.py", text)] == list(range(2, len(PHRASES) + 2))
    assert [line for line, _ in phrases("x.py", "# it goes\n# on\ndef test_it_goes_" + "on(): ...")] == [1, 3]
    assert list(phrases("x.py", "this told, cargoes on, gone one")) == []
    source = 'def one():\n    """What it is."""\n\ndef two():\n    """Return it; what else."""\n'
    assert list(headless_docstrings(source)) == [(2, "What it is.")]
