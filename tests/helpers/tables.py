"""Judge a table of rows in one test case that names every failing row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def each_row(names: str, rows: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call the decorated test with every row, as `pytest.mark.parametrize` would, in a single case.

    Args:
        names: The test's arguments, separated by commas; its other arguments are fixtures.
        rows: A tuple per row, or a value if there is only one name.
    """
    columns = [name.strip() for name in names.split(",")]
    table = [row if len(columns) > 1 else (row,) for row in rows]
    assert table, "an empty table tests nothing"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def judge_all(**fixtures: Any) -> None:
            failures = []
            for row in table:
                try:
                    test(**dict(zip(columns, row, strict=True)), **fixtures)
                except (Exception, pytest.fail.Exception) as error:
                    failures.append(f"{row!r:.300}: {type(error).__name__}: {error}")
            assert not failures, f"{len(failures)} of {len(table)} rows fail:\n" + "\n".join(failures)

        parameters = inspect.signature(test).parameters
        fixtures = [parameter for name, parameter in parameters.items() if name not in columns]
        judge_all.__name__, judge_all.__doc__ = test.__name__, test.__doc__
        judge_all.__module__ = test.__module__
        judge_all.__signature__ = inspect.Signature(fixtures)  # pyright: ignore[reportFunctionMemberAccess]
        return judge_all

    return decorate
