"""Lines of a JSONL file of questions: one object a line, checked.

A line has `answer` and either `messages` (chat, one user message last), `question`, or the SDPO code's
`prompt` and `system`; optionally `id` (or `idx`; default: line number) and `feedback`. Others are ignored.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_srpo.config.base import ConfigError

LONGEST_LINE = 16 << 20  # bytes; a longer line is not a question


class Line(NamedTuple):
    """A line that is not blank: its number from 1, and its place in the file, in bytes."""

    number: int
    offset: int
    content: bytes


class Question(NamedTuple):
    """One line of a file. `messages` are chat messages; `answer` is what the verifier compares with."""

    id: str
    messages: tuple[dict[str, str], ...]
    answer: str
    feedback: str | None


class _Written(float):
    """A number as the file writes it: 0.00001 must not become 1e-05."""

    def __new__(cls, text: str) -> "_Written":
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise ValueError for a key that is given twice, of which json keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


_DECODER = json.JSONDecoder(parse_float=_Written, object_pairs_hook=_object)


def open_file(path: Path) -> BinaryIO:
    """Open a file of questions; raise ConfigError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"task.path: {path}: cannot be read: {error.strerror}") from None


def place(path: Path, number: int) -> str:
    """Return how messages name a line."""
    return f"task.path: {path}:{number}"


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, JSON object) of every line that is not blank; raise ConfigError."""
    with open_file(path) as file:
        for line in read_lines(file, path):
            try:
                yield line.number, parse_object(line.content)
            except ValueError as error:
                raise ConfigError(f"{place(path, line.number)}: {error}") from None


def read_lines(file: BinaryIO, path: Path) -> Iterator[Line]:
    """Yield the lines that are not blank; raise ConfigError for an empty file and a line without end."""
    offset, seen = 0, False
    for number, content in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
        if len(content) > LONGEST_LINE:
            size = f"{LONGEST_LINE >> 20} MiB"
            problem = f"is longer than {size}; expected one question a line (JSONL)"
            raise ConfigError(f"{place(path, number)}: {problem}")
        if not content.isspace():
            seen = True
            yield Line(number, offset, content)
        offset += len(content)
    if not seen:
        raise ConfigError(f"task.path: {path}: is empty; expected one question a line (JSONL)")


def parse_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; raise ValueError."""
    try:
        row = _DECODER.decode(content.decode("utf-8").rstrip())
        # Neither tokenizers nor the run's files accept half a surrogate pair.
        if rb"\u" in content and rb"\ud" in content.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a surrogate pair ({error.object[error.start]!r})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8; expected a UTF-8 file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}); expected one JSON object a line") from None
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise ValueError(f"is a JSON {kind}; expected an object with question and answer")
    return row


def parse_question(line: bytes, number: int, phrase: Callable[[str], str]) -> Question:
    """Return the question of a line; raise ValueError, which names the field.

    Args:
        line: The line.
        number: Its number, the question's id unless it has one.
        phrase: Turns a plain `question` into the user's message.
    """
    row = parse_object(line)
    answer = row.get("answer")
    answer = answer.strip() if isinstance(answer, str) else answer  # verifiers strip what is given
    if answer is None or answer == "":
        raise ValueError("answer: is missing; expected the right answer, a string or a number")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"answer: is {answer}; expected the right answer, a string or a number")
    if isinstance(answer, _Written):
        answer = answer.text
    if not isinstance(answer, str):  # numbers, and lists of tool calls
        answer = json.dumps(answer, ensure_ascii=False)
    identifier = row.get("id", row.get("idx", number))
    if not isinstance(identifier, str | int) or isinstance(identifier, bool) or identifier == "":
        raise ValueError(f"id: is {identifier!r}; expected a string or an integer")
    feedback = row.get("feedback")
    if feedback is not None and not isinstance(feedback, str):
        raise ValueError(f"feedback: is {feedback!r}; expected a string")
    return Question(str(identifier), _messages(row, phrase), answer, feedback or None)


def _messages(row: dict[str, Any], phrase: Callable[[str], str]) -> tuple[dict[str, str], ...]:
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise ValueError('messages: expected a list of {"role": …, "content": …}, both strings')
        if [message["role"] for message in messages] != ["system"] * (len(messages) - 1) + ["user"]:
            expected = "expected system messages, if any, and one user message at the end"
            raise ValueError(f"messages: {expected}")
        return tuple(messages)
    field = "question" if "question" in row else "prompt"
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        expected = "messages, or question (or prompt) as a string"
        raise ValueError(f"question: is missing or empty; expected {expected}")
    system = row.get("system") if field == "prompt" else None
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system: is {system!r}; expected a string or null")
    user = {"role": "user", "content": phrase(text) if field == "question" else text}
    return ({"role": "system", "content": system}, user) if system else (user,)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        return False
    return all(isinstance(text, str) for text in value.values())
