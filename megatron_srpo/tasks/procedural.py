"""reasoning-gym's procedural tasks, any of them by name and config: `task.name:
reasoning_gym/basic_arithmetic` (extra `tasks`).
"""

from __future__ import annotations

import ast
import json
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from megatron_srpo.config.schema import ConfigError, TaskSection, TaskSource
from megatron_srpo.data.records import Prompt, Verdict
from megatron_srpo.tasks.extract import last_answer_block
from megatron_srpo.tasks.pool import Job, Pool
from megatron_srpo.tasks.procedural_scorers import SCORERS

CHECKED = 10  # entries tried before a run
PREFIX = "reasoning_gym/"
SIZE = 1_000  # entries of one dataset, some are made at once; the next thousand comes from another seed
# what scorers raise for an answer without form, or of a depth that parsers do not take
NO_FORM = (
    ValueError,
    TypeError,
    LookupError,
    SyntaxError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RecursionError,
)


class Procedural:
    """Entries by (seed, split, index). The ground truth is JSON: the dataset, its options, and the entry as a
    Python literal (tuples and whole numbers as keys would not come back from JSON, and scorers compare them).
    """

    verifier = "megatron_srpo.tasks.procedural:verify"

    def __init__(self, source: TaskSource, seed: int):
        """Raise ConfigError for an unknown dataset, wrong options, or without reasoning-gym."""
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ConfigError(
                f"task.name: {source.name} needs reasoning-gym ({error}); pip install 'megatron_srpo[tasks]'"
            ) from None
        self.name, self.seed, self.options = source.name, seed, source.options
        self.dataset = source.name.removeprefix(PREFIX)
        if self.dataset not in DATASETS:
            raise ConfigError(
                f"task.name: reasoning-gym has no dataset {self.dataset!r}; known:"
                f" {', '.join(sorted(DATASETS))}"
            )
        self._create = lru_cache(maxsize=4)(
            lambda number: _dataset(self.dataset, self.options, seed=number, size=SIZE)
        )
        try:
            prompts = [self.prompt("train", index) for index in range(CHECKED)]
        except Exception as error:  # the library raises whatever a wrong option makes it trip over
            raise ConfigError(
                f"task.options: {self.dataset} cannot be made with {self.options}: {error}"
            ) from None
        self._check(prompts)

    def _check(self, prompts: list[Prompt]) -> None:
        """Judge own answers and nonsense as a run would. Raises ConfigError.

        Some datasets take nonsense for right; some might evaluate answers as Python code, which the workers
        refuse.
        """
        own = [(prompt, _entry(prompt.answer)["answer"]) for prompt in prompts]
        # some have no answer of their own, and what sympy left as an integral is none
        own = [
            (prompt, answer)
            for prompt, answer in own
            if answer is not None and "Integral(" not in str(answer)
        ]
        right = [Job(self.name, prompt.answer, f"<answer>{answer}</answer>") for prompt, answer in own]
        nonsense = [Job(self.name, prompt.answer, "<answer>[no such answer]</answer>") for prompt in prompts]
        pool = Pool({self.name: self.verifier}, TaskSection(verifier_workers=1))
        verdicts = pool.verify([*right, *nonsense])
        pool.close()
        if not all(verdict.correct for verdict in verdicts[: len(right)]):
            raise ConfigError(
                f"task.name: {self.name} cannot be verified: reasoning-gym does not accept its own answers,"
                f" or would evaluate them as code"
            )
        if any(verdict.correct or verdict.verifier_failed for verdict in verdicts[len(right) :]):
            raise ConfigError(
                f"task.name: {self.name} cannot be verified: reasoning-gym takes nonsense for right, or"
                f" cannot judge it"
            )

    def size(self, split: str) -> None:
        """Endless."""

    def prompt(self, split: str, index: int) -> Prompt:
        """Entry `index` of `split`.

        Splits have seeds of their own; where a dataset knows few questions, they share some.
        """
        thousand, place = divmod(index, SIZE)
        entry = self._create(zlib.crc32(f"{self.seed}/{split}/{thousand}".encode()))[place]
        text = f"{entry['question']}\n\nPut your final answer between <answer> and </answer>."
        return Prompt(
            id=f"{self.name}/{split}/{index}",
            task=self.name,
            messages=({"role": "user", "content": text},),
            answer=json.dumps(
                {"dataset": self.dataset, "options": self.options, "entry": repr(_plain(entry))}
            ),
        )


def verify(answer: str, text: str) -> Verdict:
    """Right when the dataset gives the extracted answer its full score: partial scores are wrong, and so is
    what it cannot read.
    """
    given = last_answer_block(text)
    if given is None:
        return Verdict(
            reward=0.0, correct=False, format_ok=False, feedback="Your response holds no <answer> block."
        )
    truth: dict[str, Any] = json.loads(answer)
    score, entry = _scorer(truth["dataset"], json.dumps(truth["options"])), _entry(answer)
    try:
        correct = (
            score(given, entry) == 1.0
        )  # spell_backward's partial scores are sums that can come out above 1
    except NO_FORM:
        correct = False
    return Verdict(
        reward=float(correct),
        correct=correct,
        format_ok=True,
        feedback=None if correct else "Your answer is wrong.",
    )


@lru_cache(maxsize=64)
def _scorer(dataset: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    """The score of (answer, entry), ours or that of the dataset with these options (as JSON)."""
    if dataset == "composite":
        parts = {part["name"]: json.dumps(part["config"]) for part in json.loads(options)["datasets"]}
        return lambda given, entry: _scorer(name := entry["metadata"]["source_dataset"], parts[name])(
            given, entry
        )
    return SCORERS.get(dataset) or _dataset(dataset, json.loads(options), seed=0).score_answer


def _dataset(name: str, options: dict[str, Any], **more: int) -> Any:
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import create_dataset

    if name == "composite" and "datasets" in options:
        options = {**options, "datasets": [DatasetSpec(**part) for part in options["datasets"]]}
    return create_dataset(name, **options, **more)


def _entry(answer: str) -> dict[str, Any]:
    """The entry in a ground truth."""
    return ast.literal_eval(json.loads(answer)["entry"])


def _plain(value: Any) -> Any:
    """The same of Python's own types, whose repr can be read again; of any other type, its text."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(_plain(item) for item in value)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value if value is None else str(value)
