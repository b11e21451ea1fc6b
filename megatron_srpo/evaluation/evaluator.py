"""Evaluations of the policy during a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_srpo.config.schema import Config, EvaluationSection
from megatron_srpo.evaluation.evaluate import evaluate
from megatron_srpo.evaluation.scores import with_history
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.rollout.source import LiveRollouts, Rollouts
from megatron_srpo.tasks import Task


class Evaluator:
    """Evaluates after every `settings.every` steps and after the last one.

    Args:
        collector: samples and verifies with the engine's weights.
        tasks: by name.
        settings: the evaluation section.
        max_response_tokens: of one response.
        seed: train.seed; every evaluation draws the same random numbers.
        last_step: train.steps.
    """

    def __init__(
        self,
        collector: Collector,
        tasks: Mapping[str, Task],
        settings: EvaluationSection,
        max_response_tokens: int,
        seed: int,
        last_step: int,
    ):
        self._collector = collector
        self._tasks = tasks
        self._settings = settings
        self._max_response_tokens = max_response_tokens
        self._seed = seed
        self._last_step = last_step

    def is_due(self, step: int) -> bool:
        """Return True if the policy after `step` (0: before training) is to be evaluated."""
        return step % self._settings.every == 0 or step == self._last_step

    def __call__(self, earlier: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Evaluate; all ranks together. Returns the metrics, with best and mean over `earlier` rows."""
        start = time.perf_counter()
        scores = evaluate(self._collector, self._tasks, self._settings, self._max_response_tokens, self._seed)
        return {**with_history(scores, earlier), "seconds_evaluate": time.perf_counter() - start}


def create_evaluator(config: Config, rollouts: Rollouts, say: Callable[[str, str], None]) -> Evaluator | None:
    """Create the run's evaluator, or None without evaluations: replayed runs have no engine for them."""
    if config.evaluation.every == 0:
        return None
    if not isinstance(rollouts, LiveRollouts):
        say("replaying: there is no engine, so there are no evaluations", "yellow")
        return None
    limit, seed, last = config.rollout.max_response_tokens, config.train.seed, config.train.steps
    return Evaluator(rollouts.collector, rollouts.evaluated, config.evaluation, limit, seed, last)
