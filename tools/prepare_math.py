"""Convert a mathematics benchmark as published to questions with short answers.

Published files are JSONL: GSM8K, AIME, HMMT, Minerva, OlympiadBench, …

    python tools/prepare_math.py --raw aime24.jsonl --output aime24_prepared.jsonl

Then `task: {name: aime24, path: aime24_prepared.jsonl}`. Rows without one short answer (proofs, several
answers) are left out and counted. A file whose rows hold `question` and a short `answer` already needs no
preparation.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _prepare import print_report, write_questions

from megatron_srpo.config.base import ConfigError
from megatron_srpo.tasks.extract import last_boxed
from megatron_srpo.tasks.mathematics import check_gold, verify
from megatron_srpo.tasks.question_lines import read_objects

QUESTION_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("final_answer", "answer", "expected_answer", "solution")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")


def published_row(row: dict[str, Any]) -> tuple[str, str]:
    r"""Return (question, short answer) of a row as benchmarks publish it; ValueError names the field.

    GSM8K's answer follows "####", Minerva's is the last \boxed{} of its solution, OlympiadBench's a list.
    """
    texts = (row.get(field) for field in QUESTION_FIELDS)
    question = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    if question is None:
        raise ValueError(f"question: is missing; expected one of {', '.join(QUESTION_FIELDS)}")
    field = next((field for field in ANSWER_FIELDS if row.get(field) not in (None, "", [])), None)
    if field is None:
        raise ValueError(f"answer: is missing; expected one of {', '.join(ANSWER_FIELDS)}")
    answer = row[field]
    if isinstance(answer, list):
        if len(answer) != 1:
            raise ValueError(f"{field}: expected one answer, not {len(answer)}")
        answer = answer[0]
    text = answer if isinstance(answer, str) else json.dumps(answer)
    if "####" in text:
        text = _THOUSANDS.sub("", text.rsplit("####", 1)[1].strip())
    elif field == "solution" or "\\boxed" in text:
        text = last_boxed(text)
        if text is None:
            raise ValueError(f"{field}: holds no \\boxed{{…}} answer")
    text = text.strip()
    if not text:
        raise ValueError(f"{field}: is empty")
    if row.get("is_multiple_answer") is True and "," in text:  # OlympiadBench; in any order
        text = f"\\{{{text.strip('$')}\\}}"
    if row.get("error"):  # OlympiadBench's absolute tolerance
        text = json.dumps({"answer": text, "tolerance": str(row["error"])})
    return question, text


def prepare(raw: Path, output: Path) -> Iterator[str]:
    """Write the questions; yield lines to print.

    Raises ConfigError when the file cannot be read or no row can be used.
    """
    rows, left_out = [], []
    for number, row in read_objects(raw):
        try:
            question, answer = published_row(row)
            check_gold(answer, question, verify)
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
