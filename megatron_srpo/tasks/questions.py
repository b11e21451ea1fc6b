"""Questions in JSONL files, checked when they are read, served by number (see `question_lines`).

An answer that its verifier cannot match is refused.
"""

import random
from array import array
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.data.records import Prompt
from megatron_srpo.tasks.catalog import Verifier, verifiers
from megatron_srpo.tasks.question_index import Questions, read_questions

SPLITS = ("train", "validation", "test")


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

    def text_hashes(self, split: str) -> np.ndarray:
        """Return `text_hash` of all questions of a split, in the order of `prompt` (the first epoch's)."""
        return self._in_order(split, self.splits[split].file.texts)

    def most_tokens(self, split: str) -> np.ndarray:
        """Return `most_tokens` of all questions of a split, in the order of `prompt` (the first epoch's)."""
        return self._in_order(split, self.splits[split].file.most_tokens)

    def message_counts(self, split: str) -> np.ndarray:
        """Return the number of messages of all questions, in the order of `most_tokens`."""
        return self._in_order(split, self.splits[split].file.message_counts)

    def _in_order(self, split: str, values: array) -> np.ndarray:
        found = np.asarray(values)[self.splits[split].numbers]
        return found[np.asarray(self._order(0))] if split == "train" else found

    def _shuffled(self, epoch: int) -> array:
        order = array("I", range(len(self.splits["train"])))
        random.Random(f"{self.seed}/{self.name}/{epoch}").shuffle(order)  # type: ignore[arg-type]
        return order


def read_splits(source: TaskSource, verifier: Verifier) -> dict[str, Questions]:
    """Read train, validation and test of a folder or of one file; raise ConfigError."""
    path = source.path
    assert path is not None
    read = partial(_read, verifier=verifier.name, rule=source.rule)
    if path.is_dir():
        files = {name: path / f"{name}.jsonl" for name in SPLITS}
        splits = {name: read(file) for name, file in files.items() if file.is_file()}
        if not splits.keys() & {"train", "test"}:
            raise ConfigError(
                f"task.path: {path.resolve()} has neither train.jsonl nor test.jsonl; expected them"
            )
        splits |= {name: next(iter(splits.values()))[:0] for name in SPLITS if name not in splits}
    elif path.suffix == ".jsonl":
        questions = read(path)
        test, train = hold_out(questions, 0.1 if source.test_share is None else source.test_share)
        splits = {"train": train, "validation": questions[:0], "test": test}
    else:
        expected = "expected one of them, or your .py file"
        raise ConfigError(f"task.path: {path.resolve()} is neither a folder nor a .jsonl file; {expected}")
    if source.validation_share and not splits["validation"]:
        splits["validation"], splits["train"] = hold_out(splits["train"], source.validation_share)
    return splits


def _read(path: Path, verifier: str, rule: str) -> Questions:
    """Return the questions of a file, which is read again only if it has changed."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"task.path: {path}: cannot be read: {error.strerror}") from None
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _read_once(path, stamp, verifier, rule)


@lru_cache(maxsize=16)
def _read_once(path: Path, stamp: tuple[int, ...], verifier: str, rule: str) -> Questions:
    judge = verifiers()[verifier]
    return read_questions(path, judge.phrase, partial(_check_gold, judge, rule))


def _check_gold(verifier: Verifier, rule: str, answer: str, question: str) -> None:
    verifier.check_gold(answer, question, verifier.rules[rule])


def hold_out(questions: Questions, share: float) -> tuple[Questions, Questions]:
    """Return (a `share` of the questions, the others), in order, by a hash of the ids: no seed changes it."""
    count = round(share * len(questions))
    if not count:
        return questions[:0], questions
    ranks = np.asarray(questions.file.id_checksums)[questions.numbers]
    order = np.argsort(ranks, kind="stable")
    last = ranks[order[count - 1]]
    is_chosen = ranks < last
    tied = sorted(np.flatnonzero(ranks == last).tolist(), key=lambda place: questions[place].id)
    is_chosen[tied[: count - int(is_chosen.sum())]] = True
    numbers = questions.numbers[is_chosen], questions.numbers[~is_chosen]
    return Questions(questions.file, numbers[0]), Questions(questions.file, numbers[1])
