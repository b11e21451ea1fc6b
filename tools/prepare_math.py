"""Convert a mathematics benchmark as published to questions with short answers.

Published files are JSONL: GSM8K, AIME, HMMT, Minerva, OlympiadBench, …

    python tools/prepare_math.py --raw aime24.jsonl --output aime24_prepared.jsonl

Then `task: {name: aime24, path: aime24_prepared.jsonl}`. Rows without one short answer (proofs, several
answers) are left out and counted. A file whose rows hold `question` and a short `answer` already needs no
preparation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from _prepare import print_report

from megatron_srpo.config.base import ConfigError
from megatron_srpo.tasks.mathematics import published_row
from megatron_srpo.tasks.questions import read_objects, write_questions


def prepare(raw: Path, output: Path) -> Iterator[str]:
    """Write the questions; yield lines to print.

    Raises ConfigError when the file cannot be read or no row can be used.
    """
    rows, left_out = [], []
    for number, row in read_objects(raw):
        try:
            question, answer = published_row(row)
        except ValueError as error:
            left_out.append(f"{raw}:{number}: {error}")
            continue
        rows.append({"id": str(number), "question": question, "answer": answer})
    if not rows:
        raise ConfigError(f"{raw}: no row can be used; the first: {left_out[0]}")
    write_questions(rows, output)
    yield f"{output}: {len(rows)} questions; left out: {len(left_out)}"
    yield from left_out[:10]


def main() -> int:
    """Prepare the file named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description="A mathematics benchmark as published → questions with short answers."
    )
    parser.add_argument("--raw", type=Path, required=True, help="JSONL file")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    options = parser.parse_args()
    return print_report(prepare(options.raw, options.output))


if __name__ == "__main__":
    sys.exit(main())
