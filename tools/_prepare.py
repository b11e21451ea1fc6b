"""Share the report of the programs that prepare published data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_srpo.config.base import ConfigError
from megatron_srpo.distributed.files import write_text


def print_report(lines: Iterable[str]) -> int:
    """Print lines as they come; return the exit status.

    It is 2 after a one-line error for unusable data.
    """
    try:
        for line in lines:
            print(line)
    except ConfigError as error:
        print(f"error: {str(error).removeprefix('task.path: ')}", file=sys.stderr)
        return 2
    return 0


def write_questions(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write rows for `read_questions`, whole or not at all; raise ConfigError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
