"""Questions in JSONL files: one object a line, checked when read, served by number.

A line has `answer` and either `messages` (chat, one user message last), `question`, or the SDPO code's
`prompt` and `system`; optionally `id` (or `idx`; default: line number) and `feedback`. Others are ignored.
An answer that its verifier cannot match is refused.
"""

import json
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.data.records import Prompt
from megatron_srpo.tasks.catalog import Verifier

SPLITS = ("train", "validation", "test")
LONGEST_LINE = 16 << 20  # bytes; a longer line is not a question


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


def read_questions(
    path: Path, phrase: Callable[[str], str] = str, check_gold: Callable[[str, str], None] | None = None
) -> list[Question]:
    """Read the file's questions in order; `phrase` turns a plain `question` into the user's message.

    check_gold: raises ValueError for an (answer, question) that no response can match.

    Raises:
        ConfigError: An empty file, a bad line or field, or a repeated id; names file, line and field.
    """
    questions: list[Question] = []
    line_of: dict[str, int] = {}
    for number, row in read_objects(path):
        where = f"task.path: {path}:{number}"
        question = _question(row, number, where, phrase)
        if check_gold is not None:
            try:
                check_gold(question.answer, question.messages[-1]["content"])
            except ValueError as error:
                raise ConfigError(f"{where}: answer: {error}") from None
        if question.id in line_of:
            first = line_of[question.id]
            raise ConfigError(f"{where}: id: {question.id!r} is also in line {first}; ids must be unique")
        line_of[question.id] = number
        questions.append(question)
    return questions


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, JSON object) of every line that is not blank; raise ConfigError."""
    seen = False
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"task.path: {path}: cannot be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
            where = f"task.path: {path}:{number}"
            if len(line) > LONGEST_LINE:
                size = f"{LONGEST_LINE >> 20} MiB"
                raise ConfigError(f"{where}: is longer than {size}; expected one question a line (JSONL)")
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8").rstrip()
                row = json.loads(text, parse_float=_Written, object_pairs_hook=_object)
                # Neither tokenizers nor the run's files accept half a surrogate pair.
                if rb"\ud" in line.lower():
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                raise ConfigError(f"{where}: holds half a surrogate pair ({half!r})") from None
            except UnicodeDecodeError as error:
                byte = error.start + 1
                raise ConfigError(f"{where}: byte {byte} is not UTF-8; expected a UTF-8 file") from None
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{where}: is not JSON ({error}); expected one JSON object a line"
                ) from None
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise ConfigError(f"{where}: is a JSON {kind}; expected an object with question and answer")
            seen = True
            yield number, row
    if not seen:
        raise ConfigError(f"task.path: {path}: is empty; expected one question a line (JSONL)")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise ValueError for a key that is given twice, of which json keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def _question(row: dict[str, Any], number: int, where: str, phrase: Callable[[str], str]) -> Question:
    answer = row.get("answer")
    answer = answer.strip() if isinstance(answer, str) else answer  # verifiers strip what is given
    if answer is None or answer == "":
        raise ConfigError(f"{where}: answer: is missing; expected the right answer, a string or a number")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ConfigError(f"{where}: answer: is {answer}; expected the right answer, a string or a number")
    if isinstance(answer, _Written):
        answer = answer.text
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
        messages, where = row["messages"], f"{where}: messages"
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise ConfigError(f'{where}: expected a list of {{"role": …, "content": …}}, both strings')
        if [message["role"] for message in messages] != ["system"] * (len(messages) - 1) + ["user"]:
            raise ConfigError(f"{where}: expected system messages, if any, and one user message at the end")
        return tuple(messages)
    field = "question" if "question" in row else "prompt"
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        expected = "messages, or question (or prompt) as a string"
        raise ConfigError(f"{where}: question: is missing or empty; expected {expected}")
    system = row.get("system") if field == "prompt" else None
    if system is not None and not isinstance(system, str):
        raise ConfigError(f"{where}: system: is {system!r}; expected a string or null")
    user = {"role": "user", "content": phrase(text) if field == "question" else text}
    return ({"role": "system", "content": system}, user) if system else (user,)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        return False
    return all(isinstance(text, str) for text in value.values())


class QuestionFile:
    """A finite task. Training uses each question once an epoch, and every epoch has its own order."""

    def __init__(self, source: TaskSource, seed: int, verifier: Verifier):
        """Read and check all questions. Raises ConfigError."""
        self.name, self.seed, self.verifier = source.name, seed, verifier.path(source.rule)
        self.splits = read_splits(source, verifier)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def size(self, split: str) -> int:
        """Return the number of questions in `split`."""
        return len(self.splits[split])

    def prompt(self, split: str, index: int) -> Prompt:
        """Return question `index`, of endless epochs in training, else in file order. Raises IndexError."""
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


def read_splits(source: TaskSource, verifier: Verifier) -> dict[str, list[Question]]:
    """Read train, validation and test of a folder or of one file; raise ConfigError."""
    path, phrase = source.path, verifier.phrase
    assert path is not None
    check = partial(_check_gold, verifier, source.rule)
    if path.is_dir():
        files = {name: path / f"{name}.jsonl" for name in SPLITS}
        splits = {
            name: read_questions(file, phrase, check) if file.is_file() else []
            for name, file in files.items()
        }
        if not splits["train"] and not splits["test"]:
            raise ConfigError(
                f"task.path: {path.resolve()} has neither train.jsonl nor test.jsonl; expected them"
            )
    elif path.suffix == ".jsonl":
        questions = read_questions(path, phrase, check)
        test, train = hold_out(questions, 0.1 if source.test_share is None else source.test_share)
        splits = {"train": train, "validation": [], "test": test}
    else:
        expected = "expected one of them, or your .py file"
        raise ConfigError(f"task.path: {path.resolve()} is neither a folder nor a .jsonl file; {expected}")
    if source.validation_share and not splits["validation"]:
        splits["validation"], splits["train"] = hold_out(splits["train"], source.validation_share)
    return splits


def _check_gold(verifier: Verifier, rule: str, answer: str, question: str) -> None:
    verifier.check_gold(answer, question, verifier.rules[rule])


def hold_out(questions: Sequence[Question], share: float) -> tuple[list[Question], list[Question]]:
    """Return (a `share` of the questions, the others), in order, by a hash of the ids: no seed changes it."""
    ranked = sorted(questions, key=lambda question: (zlib.crc32(question.id.encode()), question.id))
    chosen = {question.id for question in ranked[: round(share * len(questions))]}
    return [q for q in questions if q.id in chosen], [q for q in questions if q.id not in chosen]
