"""metrics.jsonl: one JSON object per line, the source of every curve."""

import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_srpo.distributed.files import JsonLines, SavedFile, describe, read_jsonl, write_text

# A training step's row has all of these, as numbers; the alarms and the terminal read them.
_REQUIRED = ("pass_rate", "zero_advantage_share", "sdpo_token_share", "updates", "updates_skipped")


def read_rows(file: Path) -> JsonLines:
    """Read the rows of a metrics.jsonl; lines that are not such rows, by their types, are problems."""
    found = read_jsonl(file)
    rows = JsonLines([], [], list(found.problems))
    for row, number in zip(found.rows, found.numbers, strict=True):
        if problem := _row_problem(row):
            rows.problems.append(f"{file}:{number}: is damaged ({problem})")
        else:
            rows.rows.append(row)
            rows.numbers.append(number)
    return rows


def _row_problem(row: dict[str, Any]) -> str | None:
    """Return why this is no row of metrics.jsonl, or None."""
    if type(row.get("step")) is not int or row["step"] < 0:
        return f"step: found {row.get('step')!r}, expected a whole number"
    required = _REQUIRED if "loss" in row else ("pass_rate",) if "pass_rate" in row else ()
    for key in (*required, *row):
        value = row.get(key)
        if key == "alarms":
            fits = isinstance(value, list) and all(isinstance(name, str) for name in value)
        elif key == "weight_version":
            fits = isinstance(value, str)
        else:  # null: a number that was not finite
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
            fits = is_number or (value is None and key not in required)
        if not fits:
            return f"{key}: found {str(value)[:40]!r}, expected {_EXPECTED.get(key, 'a number')}"
    return None


_EXPECTED = {"alarms": "a list of names", "weight_version": "a string"}


class MetricsFile:
    """The file metrics.jsonl, on disk after every line. Non-finite numbers become null."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        broken = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        self._file.write(json.dumps(row | dict.fromkeys(broken)) + "\n")
        self._file.flush()
        if self.path.is_file():  # not the null device of other ranks
            os.fsync(self._file.fileno())

    def rewind(
        self, step: int, with_evaluation: bool, saved: SavedFile | None = None
    ) -> tuple[list[dict[str, Any]], str]:
        """Drop rows after `step`, its evaluation unless with_evaluation, a partial line, damaged lines.

        Returns:
            The other rows, and what is damaged, or "": the file then stays as metrics.damaged.jsonl. `saved`
            describes the file after `step`, if it is known.
        """
        if not self.path.is_file():
            return [], ""
        content, found = self.path.read_bytes(), read_rows(self.path)
        problems = list(found.problems)
        if content and not content.endswith(b"\n"):  # the line that was being written
            last = content.count(b"\n") + 1
            problems = [one for one in problems if not one.startswith(f"{self.path}:{last}: ")]
        problems += [
            f"{self.path}:{number}: is damaged (it has no loss)"
            for row, number in zip(found.rows, found.numbers, strict=True)
            if "pass_rate" in row and "loss" not in row
        ]
        if not problems and saved is not None and describe(self.path, saved.bytes) != saved:
            problems = [f"{self.path}: has changed since step {step} was saved (CRC-32)"]
        rows = [row for row in found.rows if row["step"] <= step and ("pass_rate" in row) == ("loss" in row)]
        if not with_evaluation:
            rows = [row for row in rows if row["step"] < step or "loss" in row]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if problems or content != text.encode():
            self._file.close()
            if problems:
                self.path.replace(self.path.with_suffix(".damaged.jsonl"))
            write_text(self.path, text)
            self._file = self.path.open("a", encoding="utf-8")
        kept = f"its {len(rows)} valid rows are used, and the file is kept as metrics.damaged.jsonl"
        return rows, f"{problems[0]}: {kept}" if problems else ""

    def evaluations(self) -> list[dict[str, Any]]:
        """Read the rows of evaluations."""
        return [row for row in read_rows(self.path).rows if any("/avg@" in key for key in row)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
