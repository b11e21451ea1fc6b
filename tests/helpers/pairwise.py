"""Choose few test cases that contain every pair of values, instead of the product of all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest


def combinations(*axes: Iterable) -> list[tuple]:
    """Return combinations, one value of each axis, in which every pair of values of two axes occurs.

    Greedy and deterministic: next comes the combination with the most pairs not seen before.
    """
    axes = [list(axis) for axis in axes]
    pairs_of = {}
    for indices in itertools.product(*(range(len(axis)) for axis in axes)):
        pairs_of[indices] = set(itertools.combinations(enumerate(indices), 2))
    missing = set().union(*pairs_of.values())
    chosen = []
    while missing:
        best = max(pairs_of, key=lambda indices: len(pairs_of[indices] & missing))
        missing -= pairs_of.pop(best)
        chosen.append(tuple(axis[index] for axis, index in zip(axes, best, strict=True)))
    return chosen


def pairwise(**axes) -> pytest.MarkDecorator:
    """Parametrise a test with `combinations` of its arguments' values."""
    return pytest.mark.parametrize(tuple(axes), combinations(*axes.values()), ids=str)
