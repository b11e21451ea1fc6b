"""reasoning-gym's procedural tasks, any of them by name and config: `task.name: reasoning_gym/basic_arithmetic` (extra `tasks`)."""

from __future__ import annotations

import json
import zlib
from functools import lru_cache
from typing import Any

from megatron_srpo.config import ConfigError, TaskSection, TaskSource
from megatron_srpo.records import Prompt, Verdict
from megatron_srpo.tasks.extract import last_answer_block
from megatron_srpo.tasks.pool import Job, Pool

CHECKED = 10  # entries tried before a run
PREFIX = "reasoning_gym/"
SIZE = 1_000  # entries of one dataset, some are made at once; the next thousand comes from another seed


class Procedural:
    """Entries by (seed, split, index). The ground truth is the entry itself, as JSON."""

    verifier = "megatron_srpo.tasks.procedural:verify"

    def __init__(self, source: TaskSource, seed: int):
        """Raises ConfigError for an unknown dataset, wrong options, or when reasoning-gym is not installed."""
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ConfigError(f"task.name: {source.name} needs reasoning-gym ({error}); pip install 'megatron_srpo[tasks]'") from None
        self.name, self.seed, self.options = source.name, seed, source.options
        self.dataset = source.name.removeprefix(PREFIX)
        if self.dataset not in DATASETS:
            raise ConfigError(f"task.name: reasoning-gym has no dataset {self.dataset!r}; known: {', '.join(sorted(DATASETS))}")
        self._create = lru_cache(maxsize=4)(
            lambda number: reasoning_gym.create_dataset(self.dataset, seed=number, size=SIZE, **self.options)
        )
        try:
            prompts = [self.prompt("train", index) for index in range(CHECKED)]
        except Exception as error:  # the library raises whatever a wrong option makes it trip over
            raise ConfigError(f"task.options: {self.dataset} cannot be made with {self.options}: {error}") from None
        self._check(prompts)

    def _check(self, prompts: list[Prompt]) -> None:
        """Judge own answers and nonsense as a run would. Raises ConfigError.

        Some datasets give their own answer no full score once it has been JSON, or nonsense a full one; some evaluate answers as
        Python code, which the workers refuse.
        """
        own = [(prompt, json.loads(prompt.answer)["entry"]["answer"]) for prompt in prompts]
        right = [Job(self.name, prompt.answer, f"<answer>{answer}</answer>") for prompt, answer in own if answer is not None]
        nonsense = [Job(self.name, prompt.answer, "<answer>[no such answer]</answer>") for prompt in prompts]
        pool = Pool({self.name: self.verifier}, TaskSection(verifier_workers=1))
        verdicts = pool.verify([*right, *nonsense])
        pool.close()
        if not all(verdict.correct for verdict in verdicts[: len(right)]):
            raise ConfigError(f"task.name: {self.name} cannot be verified: reasoning-gym does not accept its own answers")
        if any(verdict.correct or verdict.verifier_failed for verdict in verdicts[len(right) :]):
            raise ConfigError(f"task.name: {self.name} cannot be verified: reasoning-gym takes nonsense for right, or cannot judge it")

    def size(self, split: str) -> None:
        """Endless."""

    def prompt(self, split: str, index: int) -> Prompt:
        """Entry `index` of `split`. Splits have seeds of their own; where a dataset knows few questions, they share some."""
        thousand, place = divmod(index, SIZE)
        entry = self._create(zlib.crc32(f"{self.seed}/{split}/{thousand}".encode()))[place]
        text = f"{entry['question']}\n\nPut your final answer between <answer> and </answer>."
        return Prompt(
            id=f"{self.name}/{split}/{index}",
            task=self.name,
            messages=({"role": "user", "content": text},),
            answer=json.dumps({"dataset": self.dataset, "entry": entry}, default=str),
        )


def verify(answer: str, text: str) -> Verdict:
    """Right when the dataset gives the extracted answer its full score: partial scores are wrong, and so is what it cannot read."""
    given = last_answer_block(text)
    if given is None:
        return Verdict(reward=0.0, correct=False, format_ok=False, feedback="Your response holds no <answer> block.")
    truth: dict[str, Any] = json.loads(answer)
    from reasoning_gym import get_score_answer_fn

    try:
        correct = get_score_answer_fn(truth["dataset"])(given, truth["entry"]) >= 1.0
    except (ValueError, TypeError, LookupError, SyntaxError, ArithmeticError):  # how it says that an answer has no form
        correct = False
    return Verdict(reward=float(correct), correct=correct, format_ok=True, feedback=None if correct else "Your answer is wrong.")
