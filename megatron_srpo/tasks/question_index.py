"""Index of a file of questions: each is checked once, takes 44 bytes, and is read when it is asked for.

Every line is compared with its checksum when it is read again. The file stays open: if another takes its name
during a run, the run has its own questions.
"""

import os
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload
from weakref import finalize

import numpy as np
from typing_extensions import override

from megatron_srpo.config.base import ConfigError
from megatron_srpo.tasks.question_lines import Line, Question, open_file, parse_question, place, read_lines

_LARGE = 32 << 20  # bytes; progress over more is shown
_SHOWN = 1 << 20  # bytes between two updates of it


class QuestionIndex:
    """The lines of a file, all checked."""

    def __init__(
        self,
        path: Path,
        phrase: Callable[[str], str] = str,
        check_gold: Callable[[str, str], None] | None = None,
    ):
        """Read and check the file.

        Args:
            path: A JSONL file.
            phrase: Turns a plain `question` into the user's message.
            check_gold: Raises ValueError for an (answer, question) that no response can match.

        Raises:
            ConfigError: An empty file, a bad line or field, or a repeated id; names file, line and field.
        """
        self.path, self._phrase = path, phrase
        self._offsets = array("Q")
        self._sizes = array("I")
        self._numbers = array("I")
        self._checksums = array("I")  # of the lines
        self.id_checksums = array("I")
        self.texts = array("q")  # hashes of the questions, by `text_hash`
        self.most_tokens = array("I")  # by `most_tokens`, of all messages
        self.message_counts = array("I")
        ids = array("q")
        file = open_file(path)
        self._descriptor = file.fileno()
        finalize(self, file.close)
        with progress_of(f"checking {path}", os.fstat(self._descriptor).st_size) as advance:
            for line in read_lines(file, path):
                try:
                    question = parse_question(line.content, line.number, phrase)
                    if check_gold is not None:
                        _check(check_gold, question)
                except ValueError as error:
                    raise ConfigError(f"{place(path, line.number)}: {error}") from None
                self._append(line, question)
                ids.append(hash(question.id))
                advance(len(line.content))
        self._refuse_repeated(np.asarray(ids))

    def __len__(self) -> int:
        return len(self._offsets)

    def question(self, number: int) -> Question:
        """Read question `number` (from 0). Raises ConfigError if the file has been written to."""
        where = place(self.path, self._numbers[number])
        try:
            line = os.pread(self._descriptor, self._sizes[number], self._offsets[number])
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
        if zlib.crc32(line) != self._checksums[number]:
            raise ConfigError(f"{where}: has changed since the file was checked; restore it")
        return parse_question(line, self._numbers[number], self._phrase)

    def _append(self, line: Line, question: Question) -> None:
        self._offsets.append(line.offset)
        self._sizes.append(len(line.content))
        self._numbers.append(line.number)
        self._checksums.append(zlib.crc32(line.content))
        self.id_checksums.append(zlib.crc32(question.id.encode()))
        self.texts.append(text_hash(question.messages))
        self.message_counts.append(len(question.messages))
        self.most_tokens.append(sum(most_tokens(message["content"]) for message in question.messages))

    def _refuse_repeated(self, ids: np.ndarray) -> None:
        """Raise ConfigError for the first line that has the id of an earlier one."""
        order = np.argsort(ids, kind="stable")
        is_repeated = ids[order[1:]] == ids[order[:-1]]
        pairs = np.stack([order[1:], order[:-1]])[:, is_repeated]
        for later, earlier in sorted(pairs.T.tolist()):
            identifier = self.question(later).id
            if self.question(earlier).id == identifier:  # and not only their hashes
                problem = f"{identifier!r} is also in line {self._numbers[earlier]}; ids must be unique"
                raise ConfigError(f"{place(self.path, self._numbers[later])}: id: {problem}")


def _check(check_gold: Callable[[str, str], None], question: Question) -> None:
    try:
        check_gold(question.answer, question.messages[-1]["content"])
    except ValueError as error:
        raise ValueError(f"answer: {error}") from None


@contextmanager
def progress_of(title: str, size: int) -> Iterator[Callable[[int], None]]:
    """Yield a function of the bytes done since its last call; rank 0 shows progress if `size` is large."""
    if size < _LARGE or os.environ.get("RANK", "0") != "0":
        yield lambda size: None
        return
    from megatron_srpo.distributed.byte_progress import ByteProgress

    left = 0
    with ByteProgress(title, size) as progress:

        def advance(size: int) -> None:
            nonlocal left
            left += size
            if left >= _SHOWN:
                progress.advance(left)
                left = 0

        yield advance
        progress.advance(left)


def text_hash(messages: Sequence[dict[str, str]]) -> int:
    """Return a hash of the user's words, of 64 bits; another process has others."""
    return hash(" ".join(messages[-1]["content"].split()))


def most_tokens(text: str) -> int:
    """Return a number of tokens that no tokenizer exceeds on this text, whose tokens are bytes or longer.

    A normalizer may replace a character of a text that is not in its normal form by eleven times its bytes
    (NFKC), or decompose it into three times its bytes (NFD).
    """
    if text.isascii():
        return len(text)
    size = len(text.encode())
    plain = len(text.encode("ascii", "ignore"))
    return plain + (size - plain) * (3 if unicodedata.is_normalized("NFKC", text) else 11)


class Questions(Sequence[Question]):
    """Some questions of a file, in an order."""

    def __init__(self, file: QuestionIndex, numbers: Sequence[int] | np.ndarray):
        self.file, self.numbers = file, np.asarray(numbers, np.uint32)

    @override
    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Question: ...
    @overload
    def __getitem__(self, place: slice) -> "Questions": ...
    @override
    def __getitem__(self, place):
        if isinstance(place, slice):
            return Questions(self.file, self.numbers[place])
        return self.file.question(int(self.numbers[place]))


def read_questions(
    path: Path, phrase: Callable[[str], str] = str, check_gold: Callable[[str, str], None] | None = None
) -> Questions:
    """Return all questions of a file, checked; see `QuestionIndex`."""
    index = QuestionIndex(path, phrase, check_gold)
    return Questions(index, range(len(index)))
