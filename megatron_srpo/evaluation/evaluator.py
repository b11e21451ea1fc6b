"""Evaluations of the policy during a training run."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_srpo.config.schema import Config, EvaluationSection
from megatron_srpo.evaluation.evaluate import evaluate
from megatron_srpo.evaluation.scores import with_history
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.rollout.source import LiveRollouts, Rollouts
from megatron_srpo.tasks import Task


@dataclass(frozen=True)
class Evaluator:
    """Evaluate after every `settings.every` steps and after `last_step`, with the same seed every time."""

    collector: Collector
    tasks: Mapping[str, Task]
    settings: EvaluationSection
    max_response_tokens: int
    seed: int
    last_step: int

    def is_due(self, step: int) -> bool:
        """Return True if the policy after `step` (0: before training) is to be evaluated."""
        return step % self.settings.every == 0 or step == self.last_step

    def __call__(self, earlier: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return an evaluation's metrics, with best and mean over `earlier` rows. A collective call."""
        start = time.perf_counter()
        scores = evaluate(self.collector, self.tasks, self.settings, self.max_response_tokens, self.seed)
        return {**with_history(scores, earlier), "seconds_evaluate": time.perf_counter() - start}


def create_evaluator(config: Config, rollouts: Rollouts, say: Callable[[str, str], None]) -> Evaluator | None:
    """Create the run's evaluator, or None without evaluations: replayed runs have no engine for them."""
    if config.evaluation.every == 0:
        return None
    if not isinstance(rollouts, LiveRollouts):
        say("no evaluations: a replayed run has no engine", "yellow")
        return None
    limit, seed, last = config.rollout.max_response_tokens, config.train.seed, config.train.steps
    return Evaluator(rollouts.collector, rollouts.evaluated, config.evaluation, limit, seed, last)
