"""Convert SciKnowEval as published to the papers' training and test questions of each science.

    python tools/prepare_sciknoweval.py --raw DIR --output DIR

DIR/Chemistry/*.jsonl, DIR/Physics, DIR/Biology, DIR/Material (those that are there) become
OUTPUT/chemistry/train.jsonl and test.jsonl, and so on: `task.path: OUTPUT/chemistry`. Level L3, multiple
choice, 90/10 by the papers' seed. The split depends on the order of the rows: files by name, rows in
the file's order.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from _prepare import print_report

from megatron_srpo.config.base import ConfigError
from megatron_srpo.tasks.questions import write_questions
from megatron_srpo.tasks.sciknoweval import Choice, read_domain, split

# folder as published: (name here, training and test questions in the papers)
DOMAINS = {
    "Chemistry": ("chemistry", 1890, 210),
    "Physics": ("physics", 720, 80),
    "Biology": ("biology", 450, 50),
    "Material": ("materials", 841, 94),
}


def prepare(raw: Path, output: Path) -> Iterator[str]:
    """Write every domain that `raw` holds; yield lines to print for each.

    Raises ConfigError for data that is not as published.
    """
    found = [domain for domain in DOMAINS if (raw / domain).is_dir()]
    if not found:
        raise ConfigError(f"--raw: {raw.resolve()} has none of the folders {', '.join(DOMAINS)}")
    for domain in found:
        name, *expected = DOMAINS[domain]
        train, test = split(read_domain(raw / domain))
        for part, choices in (("train", train), ("test", test)):
            rows = [
                {"id": choice.id, "messages": choice.messages, "answer": choice.answer} for choice in choices
            ]
            write_questions(rows, output / name / f"{part}.jsonl")
        line = f"{name}: {len(train)} training and {len(test)} test questions"
        if [len(train), len(test)] != expected:
            line += f" (the papers have {expected[0]} and {expected[1]}: this is another version of the data)"
        yield line
        if leaked := leaks(train, test):
            texts = len({choice.question for choice in leaked})
            ids = ", ".join(choice.id for choice in leaked)
            leak = f"{len(leaked)} test questions ({texts} different texts) are also in the training set"
            yield f"  {leak}: ids {ids}"


def leaks(train: Sequence[Choice], test: Sequence[Choice]) -> list[Choice]:
    """Return the test questions whose text, options aside, is a training question's."""
    seen = {choice.question for choice in train}
    return [choice for choice in test if choice.question in seen]


def main() -> int:
    """Prepare the folder named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description="SciKnowEval as published → training and test questions of each science."
    )
    parser.add_argument(
        "--raw", type=Path, required=True, help="folder with Chemistry/, Physics/, Biology/, Material/"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write chemistry/, physics/, … into"
    )
    options = parser.parse_args()
    return print_report(prepare(options.raw, options.output))


if __name__ == "__main__":
    sys.exit(main())
