"""SciKnowEval L3 multiple choice (docs/method.md, 5): rows, the papers' split, prompts and verifier."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.records import Verdict
from megatron_srpo.tasks.catalog import Verifier
from megatron_srpo.tasks.extract import verdict_of
from megatron_srpo.tasks.questions import read_objects

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
_BLOCK = re.compile(r"<answer>\s*([A-D])\s*</answer>")


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
    import numpy as np  # not for the verifier's processes

    order = np.random.default_rng(seed).permutation(len(choices))
    tests = math.ceil(test_share * len(choices))
    return [choices[place] for place in order[tests:]], [choices[place] for place in order[:tests]]


def verify(answer: str, text: str) -> Verdict:
    """Apply the papers' rule: the text between the last `<answer>` and `</answer>`, stripped, is the letter.

    Without a tag it extends to the text's end: a bare "B" and an unclosed "<answer>B" are right; "B." and "b"
    are not. `format_ok`: the last `<answer>` block is complete and holds one letter.
    """
    given = text.rsplit("<answer>", 1)[-1].split("</answer>", 1)[0].strip()
    return _verdict(given == answer, _BLOCK.match(text, max(text.rfind("<answer>"), 0)) is not None)


def verify_strict(answer: str, text: str) -> Verdict:
    """Apply our rule: the response has one `<answer>` block, no other such tag, and ends with it."""
    blocks = _BLOCK.findall(text)
    once = text.count("<answer>") == text.count("</answer>") == 1 and text.rstrip().endswith("</answer>")
    return _verdict(once and blocks == [answer], once and len(blocks) == 1)


def _verdict(correct: bool, format_ok: bool) -> Verdict:
    malformed = "Your response has no <answer> block with one letter and nothing else."
    return verdict_of(correct, format_ok, "Your answer is wrong." if format_ok else malformed)


VERIFIER = Verifier(
    "multiple_choice",
    {"paper": verify, "strict": verify_strict},
    tasks=("sciknoweval", "chemistry", "physics", "biology", "materials"),
)
