"""Limit the size of files and functions; ruff limits the lines."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES = 500, 60


def sources():
    for folder in ("megatron_srpo", "tools", "tests", "examples"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_files_and_functions_are_short():
    found = []
    for file in sources():
        text = file.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > FILE_LINES:
            found.append(f"{file.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES:
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines")
    assert not found, "\n".join(found)


def test_sources_are_found():
    # Without sources the test above could not fail.
    assert len(list(sources())) > 150
