"""The arithmetic of evaluation: avg@k, pass@k and bootstrap intervals over questions.

Pure functions on small arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2_000


class Interval(NamedTuple):
    """A mean with the 2.5th and 97.5th percentile of its bootstrap distribution."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of (other - base) with its interval; p: twice the share of resamples on the rarer side of zero,
    at most 1.
    """

    mean: float
    low: float
    high: float
    p: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the unbiased estimate that one of k samples is right, from c of n (Chen et
    al., 2021).

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} needs 1 <= k <= n and 0 <= c <= n, not n = {samples}, c = {correct}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def interval(tasks: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """The mean over tasks of each task's mean over its questions; questions are resampled within their task.

    Args:
        tasks: for every task the score of each question, in [0, 1].
    """
    means = _bootstrap_means([np.asarray(values, dtype=np.float64) for values in tasks], seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(np.mean([np.mean(values) for values in tasks])), float(low), float(high))


def paired_difference(
    base: Sequence[Sequence[float]], other: Sequence[Sequence[float]], seed: int = 0
) -> Difference:
    """other - base on the same questions: the questions are resampled, each with both of its scores.

    Args:
        base, other: for every task the score of each question, questions in the same order. Raises ValueError
        when sizes differ.
    """
    if [len(values) for values in base] != [len(values) for values in other]:
        raise ValueError("a paired comparison needs the same questions on both sides")
    gaps = [
        np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
        for a, b in zip(base, other, strict=True)
    ]
    means = _bootstrap_means(gaps, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    p = min(1.0, 2 * min(float(np.mean(means <= 0)), float(np.mean(means >= 0))))
    return Difference(float(np.mean([gap.mean() for gap in gaps])), float(low), float(high), p)


def _bootstrap_means(tasks: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """[RESAMPLES] means over tasks of resampled questions' means."""
    rng = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for values in tasks:
        for place in range(RESAMPLES):
            total[place] += values[rng.integers(len(values), size=len(values))].mean()
    return total / len(tasks)


def with_history(
    scores: Mapping[str, float], earlier: Sequence[Mapping[str, float]], last: int = 5
) -> dict[str, float]:
    """`scores` of one evaluation, and for every avg@K the best so far and the mean of the last `last`, this
    one among them.

    Keys `…/avg_best` and `…/avg_last_5`. The papers report the best value seen on the test set, which
    flatters.
    """
    extended = dict(scores)
    for key, value in scores.items():
        label, separator, _ = key.rpartition("/avg@")
        if separator:
            seen = [row[key] for row in earlier if key in row] + [value]
            extended[f"{label}/avg_best"] = max(seen)
            extended[f"{label}/avg_last_{last}"] = sum(seen[-last:]) / len(seen[-last:])
    return extended
