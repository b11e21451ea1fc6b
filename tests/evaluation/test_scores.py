"""Test avg@k, pass@k and the bootstrap against enumeration and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from tables import each_row

from megatron_srpo.evaluation.scores import interval, paired_difference, pass_at_k, with_history


@each_row("n", [1, 2, 5, 7])
def test_pass_at_k_by_enumeration(n):
    # The share of all k-subsets of n samples that hold a correct one.
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * c + [False] * (n - c)
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_ends():
    assert (
        pass_at_k(16, 0, 16) == 0 and pass_at_k(16, 1, 16) == 1 and pass_at_k(16, 4, 1) == pytest.approx(0.25)
    )
    for wrong in ((4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)):
        with pytest.raises(ValueError):
            pass_at_k(*wrong)


def test_interval_of_a_large_sample_is_the_normal_one():
    rng = np.random.default_rng(3)
    values = (rng.random(400) < 0.3).astype(float)
    mean, low, high = interval([list(values)])
    error = 1.96 * values.std() / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - error, abs=0.006) and high == pytest.approx(mean + error, abs=0.006)


def test_interval_over_tasks_is_of_the_mean_of_means():
    # Two tasks of very different size have the same weight: variance (s1²/n1 + s2²/n2) / 4.
    rng = np.random.default_rng(4)
    tasks = [list((rng.random(n) < p).astype(float)) for n, p in ((60, 0.5), (600, 0.2))]
    mean, low, high = interval(tasks)
    assert mean == pytest.approx((np.mean(tasks[0]) + np.mean(tasks[1])) / 2)
    error = 1.96 * math.sqrt(sum(np.var(values) / len(values) for values in tasks)) / 2
    assert high - low == pytest.approx(2 * error, rel=0.08)


def test_constant_scores_have_no_width():
    assert interval([[1.0] * 9]) == (1.0, 1.0, 1.0)
    assert interval([[0.25]]) == (0.25, 0.25, 0.25)


def test_pairing_removes_what_questions_have_in_common():
    # Hard and easy questions with a small constant gain: unpaired intervals overlap, the paired one excludes
    # zero.
    rng = np.random.default_rng(5)
    base = rng.random(200) * 0.9
    other = base + 0.02 + 0.02 * rng.standard_normal(200)
    unpaired = [interval([list(values)]) for values in (base, other)]
    assert unpaired[0].high > unpaired[1].low
    difference = paired_difference([list(base)], [list(other)])
    assert difference.mean == pytest.approx((other - base).mean())
    assert 0 < difference.low < difference.mean < difference.high and difference.p < 0.01


def test_no_difference():
    same = [[0.0, 0.5, 1.0, 1.0]]
    assert paired_difference(same, same) == (0.0, 0.0, 0.0, 1.0)
    rng = np.random.default_rng(6)
    first, second = (list((rng.random(300) < 0.4).astype(float)) for _ in range(2))
    difference = paired_difference([first], [second])
    assert difference.low < 0 < difference.high
    assert paired_difference([second], [first]).mean == pytest.approx(-difference.mean)
    with pytest.raises(ValueError):
        paired_difference([first], [second[:-1]])


def test_history_keeps_the_best_and_the_last():
    rows = []
    for value in (0.1, 0.7, 0.3, 0.2, 0.4, 0.6):
        rows.append(with_history({"eval/x/avg@4": value, "eval/x/pass@4": 1.0}, rows))
    assert [row["eval/x/avg_best"] for row in rows] == [0.1, 0.7, 0.7, 0.7, 0.7, 0.7]
    assert rows[2]["eval/x/avg_last_5"] == pytest.approx((0.1 + 0.7 + 0.3) / 3)
    assert rows[5]["eval/x/avg_last_5"] == pytest.approx((0.7 + 0.3 + 0.2 + 0.4 + 0.6) / 5)
    assert set(rows[0]) == {"eval/x/avg@4", "eval/x/pass@4", "eval/x/avg_best", "eval/x/avg_last_5"}
