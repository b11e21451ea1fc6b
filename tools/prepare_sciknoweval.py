"""Convert SciKnowEval as published to the papers' training and test questions of each science.

    python tools/prepare_sciknoweval.py --raw DIR --output DIR

DIR/Chemistry/*.jsonl, DIR/Physics, DIR/Biology, DIR/Material (those that are there) become
OUTPUT/chemistry/train.jsonl and test.jsonl, and so on: `task.path: OUTPUT/chemistry`. Level L3, multiple
choice, 90/10 by the papers' seed. The split depends on the order of the rows: files by name, rows in
the file's order.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _prepare import print_report, write_questions

from megatron_srpo.config.base import ConfigError
from megatron_srpo.tasks.question_lines import read_objects

# Word for word the SDPO paper's, its blank first line included, for questions with two options too.
SYSTEM = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing \
else. Do not restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""
MULTIPLE_CHOICE = ("mcq-4-choices", "mcq-2-choices")
LETTERS = ("A", "B", "C", "D")

# folder as published: (name here, training and test questions in the papers)
DOMAINS = {
    "Chemistry": ("chemistry", 1890, 210),
    "Physics": ("physics", 720, 80),
    "Biology": ("biology", 450, 50),
    "Material": ("materials", 841, 94),
}


class Choice(NamedTuple):
    """One multiple-choice question of the published data."""

    id: str
    question: str
    options: tuple[str, ...]
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The papers' prompt: question, blank line, one option a line, the last sentence."""
        options = "\n".join(f"{letter}: {text}" for letter, text in zip(LETTERS, self.options, strict=False))
        user = f"{self.question}\n\n{options}\nPlease reason step by step."
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def read_domain(folder: Path) -> list[Choice]:
    """Read the L3 multiple-choice questions of a domain's published *.jsonl files, by file name and line.

    Ids count from 0 over all files, so they do not depend on the split. ConfigError names file, line, field.
    """
    choices: list[Choice] = []
    for file in sorted(folder.glob("*.jsonl")):
        for number, row in read_objects(file):
            where = f"task.path: {file}:{number}"
            details = row.get("details")
            if not isinstance(details, dict) or "level" not in details:
                raise ConfigError(f"{where}: details.level: is missing; expected SciKnowEval as published")
            if row.get("type") in MULTIPLE_CHOICE and details["level"] == "L3":
                choices.append(_choice(row, str(len(choices)), where))
    if not choices:
        raise ConfigError(f"task.path: {folder.resolve()}: no *.jsonl file with L3 multiple-choice questions")
    return choices


def _choice(row: dict[str, Any], identifier: str, where: str) -> Choice:
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answerKey")
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"{where}: question: expected a string")
    labels = choices.get("label") if isinstance(choices, dict) else None
    texts = choices.get("text") if isinstance(choices, dict) else None
    count = 4 if row["type"] == "mcq-4-choices" else 2
    letters = list(LETTERS[:count])
    known = ", ".join(letters)
    # One published row has a text too many.
    if labels != letters or not isinstance(texts, list) or len(texts) < count:
        raise ConfigError(f"{where}: choices: expected the labels {known} and a text for each, not {choices}")
    if answer not in letters:
        raise ConfigError(f"{where}: answerKey: is {answer!r}; expected one of {known}")
    return Choice(identifier, question, tuple(str(text) for text in texts[:count]), answer)


def split(
    choices: Sequence[Choice], test_share: float = 0.1, seed: int = 42
) -> tuple[list[Choice], list[Choice]]:
    """Return (train, test) exactly as Hugging Face's Dataset.train_test_split(test_size, seed) does."""
    order = np.random.default_rng(seed).permutation(len(choices))
    tests = math.ceil(test_share * len(choices))
    return [choices[place] for place in order[tests:]], [choices[place] for place in order[:tests]]


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
