"""Share the report of the programs that prepare published data."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from megatron_srpo.config.base import ConfigError


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
