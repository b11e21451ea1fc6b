"""Quantiles of values that lie on many ranks: counts in fixed bins, which can be added, and what they say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST, _A_DECADE, _DECADES = 1e-4, 40, 6  # values in nats, from 0.0001 to 100; a bin is 6 % wide
BINS = 2 + _A_DECADE * _DECADES


def counts(values: Tensor) -> Tensor:
    """How many of `values` [T], none negative, lie in each bin: [BINS] float64.

    The first bin holds what is as good as 0.
    """
    bins = (
        torch.floor(torch.log10(values.double().clamp(min=_SMALLEST / 10) / _SMALLEST) * _A_DECADE).long() + 1
    )
    return torch.bincount(bins.clamp(0, BINS - 1), minlength=BINS).double()


def quantile(counted: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of what was counted lies, to 3 %; 0 when nothing was."""
    wanted, passed = share * sum(counted), 0.0
    for number, count in enumerate(counted):
        passed += count
        if count and passed >= wanted:
            return _SMALLEST * 10 ** ((number - 0.5) / _A_DECADE) if number else 0.0
    return 0.0
