"""reasoning-gym's procedural tasks, any of them by name and config: `task.name: reasoning_gym/basic_arithmetic` (extra `tasks`)."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from megatron_srpo.config import ConfigError, TaskSource
from megatron_srpo.records import Prompt, Verdict
from megatron_srpo.tasks.extract import last_answer_block

PREFIX = "reasoning_gym/"
SIZE = 100_000  # entries of one dataset; training goes on with the next seed
OFFSETS = {"train": 0, "validation": 1 << 30, "test": 2 << 30}  # seeds of the splits: tiny task spaces may still repeat questions


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
            self._create(seed)[0]
        except Exception as error:  # the library raises whatever a wrong option makes it trip over
            raise ConfigError(f"task.options: {self.dataset} cannot be made with {self.options}: {error}") from None

    def size(self, split: str) -> None:
        """Endless."""

    def prompt(self, split: str, index: int) -> Prompt:
        """Entry `index` of `split`."""
        round_, place = divmod(index, SIZE)
        entry = self._create(self.seed + OFFSETS[split] + round_ * SIZE)[place]
        text = f"{entry['question']}\n\nPut your final answer between <answer> and </answer>."
        return Prompt(
            id=f"{self.name}/{split}/{index}",
            task=self.name,
            messages=({"role": "user", "content": text},),
            answer=json.dumps({"dataset": self.dataset, "entry": entry}, default=str),
        )


def verify(answer: str, text: str) -> Verdict:
    """Right when the dataset gives the extracted answer its full score: partial scores are wrong."""
    given = last_answer_block(text)
    if given is None:
        return Verdict(reward=0.0, correct=False, format_ok=False, feedback="Your response holds no <answer> block.")
    truth: dict[str, Any] = json.loads(answer)
    from reasoning_gym import get_score_answer_fn

    correct = get_score_answer_fn(truth["dataset"])(given, truth["entry"]) >= 1.0
    return Verdict(reward=float(correct), correct=correct, format_ok=True, feedback=None if correct else "Your answer is wrong.")
