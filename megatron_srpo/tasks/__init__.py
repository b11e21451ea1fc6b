"""Tasks: where prompts come from and who says whether a response is right. One file a family."""

from __future__ import annotations

from typing import Protocol

from megatron_srpo.config import ConfigError
from megatron_srpo.records import Prompt, Verdict


class Task(Protocol):
    """What a task must offer. Prompts are addressed by number, so a run is defined by its seed alone."""

    name: str

    def prompt(self, split: str, index: int) -> Prompt:
        """Prompt `index` (0, 1, …) of `split` ("train" or "test"), without token ids."""

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """Judge one decoded response. Must not evaluate it as code."""


def create_task(name: str, seed: int) -> Task:
    """The task called `name`. Raises ConfigError for an unknown name."""
    if name == "addition":
        from megatron_srpo.tasks.addition import Addition

        return Addition(seed)
    raise ConfigError(f"task.name: unknown task {name!r}; known: addition")
