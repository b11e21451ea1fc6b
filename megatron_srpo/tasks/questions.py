"""Questions in JSONL files: one object a line, checked as it is read, served by number.

A line holds `answer` and either `messages` (chat messages, one user message last), `question`, or the SDPO
code's `prompt` and `system`; optionally `id` (also `idx`; default: the line's number) and `feedback`. Other
fields are left alone.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from megatron_srpo.config.schema import ConfigError, TaskSource
from megatron_srpo.data.records import Prompt
from megatron_srpo.distributed.files import write_text

SPLITS = ("train", "validation", "test")
LONGEST_LINE = 16 << 20  # bytes; a longer line is no question


class Question(NamedTuple):
    """One line of a file. `messages` are chat messages; `answer` is what the verifier compares with."""

    id: str
    messages: tuple[dict[str, str], ...]
    answer: str
    feedback: str | None


def read_questions(path: Path, phrase: Callable[[str], str] = str) -> list[Question]:
    """The file's questions in order; `phrase` makes the user's message of a plain `question`.

    Raises ConfigError naming file, line, field and what was expected: an empty file, a line that is too long,
    not UTF-8 or no JSON object, a field that is missing or of another type, an id that was used before.
    """
    questions: list[Question] = []
    line_of: dict[str, int] = {}
    for number, row in read_objects(path):
        where = f"task.path: {path}:{number}"
        question = _question(row, number, where, phrase)
        if question.id in line_of:
            raise ConfigError(
                f"{where}: id: {question.id!r} stands in line {line_of[question.id]} already; ids must be"
                f" unique"
            )
        line_of[question.id] = number
        questions.append(question)
    return questions


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, JSON object) of every line that is not blank.

    Raises ConfigError as `read_questions` does.
    """
    seen = False
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"task.path: {path}: cannot be read: {error.strerror}") from None
    with file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"task.path: {path}:{number}"
            if len(line) > LONGEST_LINE:
                raise ConfigError(
                    f"{where}: is longer than {LONGEST_LINE >> 20} MiB; expected one question a line (JSONL)"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8").rstrip())
                if (
                    rb"\ud" in line.lower()
                ):  # half a surrogate pair no tokenizer takes, nor do the run's files
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"{where}: holds half a surrogate pair ({error.object[error.start]!r})"
                ) from None
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{where}: byte {error.start + 1} is not UTF-8; expected a UTF-8 file"
                ) from None
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{where}: is not JSON ({error}); expected one JSON object a line"
                ) from None
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{where}: is a JSON {type(row).__name__}; expected an object with question and answer"
                )
            seen = True
            yield number, row
    if not seen:
        raise ConfigError(f"task.path: {path}: is empty; expected one question a line (JSONL)")


def write_questions(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write rows that `read_questions` reads; the file appears whole or not at all.

    Raises ConfigError when it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _question(row: dict[str, Any], number: int, where: str, phrase: Callable[[str], str]) -> Question:
    answer = row.get("answer")
    if answer is None or answer == "":
        raise ConfigError(f"{where}: answer: is missing; expected the right answer, a string or a number")
    if not isinstance(answer, str):  # numbers, and lists of tool calls
        answer = json.dumps(answer, ensure_ascii=False)
    identifier = row.get("id", row.get("idx", number))
    if not isinstance(identifier, str | int) or isinstance(identifier, bool) or identifier == "":
        raise ConfigError(f"{where}: id: is {identifier!r}; expected a string or an integer")
    feedback = row.get("feedback")
    if feedback is not None and not isinstance(feedback, str):
        raise ConfigError(f"{where}: feedback: is {feedback!r}; expected a string")
    return Question(str(identifier), _messages(row, where, phrase), answer, feedback or None)


def _messages(row: dict[str, Any], where: str, phrase: Callable[[str], str]) -> tuple[dict[str, str], ...]:
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(value, str) for value in message.values())
            for message in messages
        ):
            raise ConfigError(
                f'{where}: messages: expected a list of {{"role": …, "content": …}}, both strings'
            )
        if [message["role"] for message in messages] != ["system"] * (len(messages) - 1) + ["user"]:
            raise ConfigError(
                f"{where}: messages: expected system messages, if any, and one user message at the end"
            )
        return tuple(messages)
    field = "question" if "question" in row else "prompt"
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(
            f"{where}: question: is missing or empty; expected messages, or question (or prompt) as a string"
        )
    system = row.get("system") if field == "prompt" else None
    if system is not None and not isinstance(system, str):
        raise ConfigError(f"{where}: system: is {system!r}; expected a string or null")
    user = {"role": "user", "content": phrase(text) if field == "question" else text}
    return ({"role": "system", "content": system}, user) if system else (user,)


class QuestionFile:
    """A finite task. Training goes through its questions once an epoch, each epoch in an order of its own."""

    def __init__(self, source: TaskSource, seed: int, verifier: str, phrase: Callable[[str], str] = str):
        """Reads and checks everything. `verifier`: see `Task`. Raises ConfigError."""
        self.name, self.seed, self.verifier = source.name, seed, verifier
        self.splits = read_splits(source, phrase)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def size(self, split: str) -> int:
        """How many questions `split` has; 0 when there is no such split."""
        return len(self.splits[split])

    def prompt(self, split: str, index: int) -> Prompt:
        """The question at place `index`: of endless epochs in training, in the file's order elsewhere
        (IndexError past the end).
        """
        questions = self.splits[split]
        if split == "train":
            epoch, place = divmod(index, len(questions))
            question, where = questions[self._order(epoch)[place]], f"train/{epoch}"
        else:
            question, where = questions[index], split
        return Prompt(
            id=f"{self.name}/{where}/{question.id}",
            task=self.name,
            messages=question.messages,
            answer=question.answer,
            feedback=question.feedback,
        )

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.splits["train"])))
        random.Random(f"{self.seed}/{self.name}/{epoch}").shuffle(order)
        return order


def read_splits(source: TaskSource, phrase: Callable[[str], str]) -> dict[str, list[Question]]:
    """train, validation and test of a folder or of one file. Raises ConfigError."""
    path = source.path
    assert path is not None
    if path.is_dir():
        splits = {
            name: read_questions(file, phrase) if (file := path / f"{name}.jsonl").is_file() else []
            for name in SPLITS
        }
        if not splits["train"] and not splits["test"]:
            raise ConfigError(f"task.path: {path.resolve()} has neither train.jsonl nor test.jsonl")
    elif path.suffix == ".jsonl":
        questions = read_questions(path, phrase)
        test, train = set_aside(questions, 0.1 if source.test_share is None else source.test_share)
        splits = {"train": train, "validation": [], "test": test}
    else:
        raise ConfigError(f"task.path: {path.resolve()} is neither a folder nor a .jsonl file")
    if source.validation_share and not splits["validation"]:
        splits["validation"], splits["train"] = set_aside(splits["train"], source.validation_share)
    return splits


def set_aside(questions: Sequence[Question], share: float) -> tuple[list[Question], list[Question]]:
    """(a `share` of the questions, the others), both in order: by a hash of the ids, so whatever the seed
    and the order.
    """
    ranked = sorted(questions, key=lambda question: (zlib.crc32(question.id.encode()), question.id))
    chosen = {question.id for question in ranked[: round(share * len(questions))]}
    return [q for q in questions if q.id in chosen], [q for q in questions if q.id not in chosen]
