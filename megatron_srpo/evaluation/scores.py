"""The arithmetic of evaluation, as pure functions: avg@k, pass@k and bootstrap intervals over questions."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from megatron_srpo.data.records import Sample

RESAMPLES = 2_000


class Score(NamedTuple):
    """A verified sample's part in the scores."""

    correct: bool
    policy_tokens: int
    format_ok: bool
    is_truncated: bool
    verifier_failed: bool

    @classmethod
    def of(cls, sample: Sample) -> "Score":
        """Return the score of a verified sample."""
        verdict, is_truncated = sample.judged, sample.finish_reason == "length"
        failed = verdict.verifier_failed is not None
        return cls(verdict.correct, sample.policy_tokens, verdict.format_ok, is_truncated, failed)


class Interval(NamedTuple):
    """A mean with the 2.5th and 97.5th percentile of its bootstrap distribution."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of other - base, with interval; p: twice the share of resamples on the rarer side of 0, ≤ 1."""

    mean: float
    low: float
    high: float
    p: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Estimate without bias that one of k samples is right: 1 - C(n-c, k) / C(n, k) (Chen et al., 2021)."""
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} needs 1 <= k <= n and 0 <= c <= n, not n = {samples}, c = {correct}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def sample_means(scores: Sequence[Score]) -> dict[str, float]:
    """Return the mean length and the shares of well-formed, truncated and unverified samples."""
    count = len(scores)
    return {
        "response_tokens_mean": sum(score.policy_tokens for score in scores) / count,
        "format_rate": sum(score.format_ok for score in scores) / count,
        "truncated_share": sum(score.is_truncated for score in scores) / count,
        "verifier_failed_share": sum(score.verifier_failed for score in scores) / count,
    }


def interval(tasks: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Average the tasks' means of their questions' scores in [0, 1]; resample questions within their task."""
    return _bootstrap([np.asarray(values, dtype=np.float64) for values in tasks], seed)[0]


def paired_difference(
    base: Sequence[Sequence[float]], other: Sequence[Sequence[float]], seed: int = 0
) -> Difference:
    """Compare each task's scores of the same questions, resampled in pairs; ValueError if sizes differ."""
    if [len(values) for values in base] != [len(values) for values in other]:
        raise ValueError("a paired comparison needs the same questions on both sides")
    gaps = [np.subtract(b, a, dtype=np.float64) for a, b in zip(base, other, strict=True)]
    found, means = _bootstrap(gaps, seed)
    p = min(1.0, 2 * min(float(np.mean(means <= 0)), float(np.mean(means >= 0))))
    return Difference(*found, p)


def _bootstrap(tasks: Sequence[np.ndarray], seed: int) -> tuple[Interval, np.ndarray]:
    """Return the mean over tasks with its interval, and the same mean of each resample, [RESAMPLES]."""
    rng = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for values in tasks:
        for place in range(RESAMPLES):
            total[place] += values[rng.integers(len(values), size=len(values))].mean()
    means = total / len(tasks)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(np.mean([values.mean() for values in tasks])), float(low), float(high)), means


def with_history(
    scores: Mapping[str, float], earlier: Sequence[Mapping[str, float]], last: int = 5
) -> dict[str, float]:
    """Add avg@K's best so far, biased upwards (`…/avg_best`), and the mean of the last (`…/avg_last_5`)."""
    extended = dict(scores)
    for key, value in scores.items():
        label, separator, _ = key.rpartition("/avg@")
        if separator:
            seen = [row[key] for row in earlier if row.get(key) is not None] + [value]
            extended[f"{label}/avg_best"] = max(seen)
            extended[f"{label}/avg_last_{last}"] = sum(seen[-last:]) / len(seen[-last:])
    return extended
