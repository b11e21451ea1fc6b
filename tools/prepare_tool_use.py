"""Convert ToolAlpaca as published to questions with gold calls.

    python tools/prepare_tool_use.py --train train_data.json --test eval_simulated.json --output DIR

Either file alone will do. Then `task: {name: tool_use, path: DIR}`. From eval_simulated.json come the papers'
68 test questions; how the papers chose their 4046 training questions is not published: here every instance is
used whose calls are complete, are to the API's own tools, and did not fail. Arguments taken from an earlier
call's result are not marked in that file, so some of these questions cannot be answered.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from _prepare import print_report

from megatron_srpo.config.base import ConfigError
from megatron_srpo.tasks.questions import write_questions
from megatron_srpo.tasks.tool_use import read_toolalpaca


def prepare(file: Path, output: Path) -> str:
    """Write one file's questions; return the line to print.

    Raises ConfigError for data that is not as published.
    """
    rows, left_out = [], Counter()
    for question, reason in read_toolalpaca(file):
        if question is None:
            left_out[reason] += 1
        else:
            rows.append(
                {
                    "id": question.id,
                    "messages": [{"role": "user", "content": question.prompt}],
                    "answer": question.calls,
                }
            )
    if not rows:
        raise ConfigError(f"{file}: holds no usable question ({dict(left_out)})")
    write_questions(rows, output)
    reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.most_common())
    return f"{output}: {len(rows)} questions" + (f"; left out: {reasons}" if reasons else "")


def main() -> int:
    """Prepare the files named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="ToolAlpaca as published → training and test questions.")
    parser.add_argument("--train", type=Path, help="train_data.json")
    parser.add_argument("--test", type=Path, help="eval_simulated.json or eval_real.json")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write train.jsonl and test.jsonl into"
    )
    options = parser.parse_args()
    if options.train is None and options.test is None:
        parser.error("--train or --test: name at least one file")
    files = {"train": options.train, "test": options.test}
    return print_report(
        prepare(file, options.output / f"{name}.jsonl") for name, file in files.items() if file is not None
    )


if __name__ == "__main__":
    sys.exit(main())
