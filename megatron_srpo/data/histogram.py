"""Quantiles of values on many ranks, from counts in fixed bins, which can be added."""

import torch
from torch import Tensor

_SMALLEST, _PER_DECADE, _DECADES = 1e-4, 40, 6  # values in nats, from 0.0001 to 100; a bin is 6 % wide
BINS = 2 + _PER_DECADE * _DECADES


def counts(values: Tensor) -> Tensor:
    """Count the non-negative `values` [T] by bin: [BINS] float64. The first bin is for values near 0."""
    scaled = values.double().clamp(min=_SMALLEST / 10) / _SMALLEST
    bins = torch.floor(torch.log10(scaled) * _PER_DECADE).long() + 1
    return torch.bincount(bins.clamp(0, BINS - 1), minlength=BINS).double()


def quantile(counted: Tensor, share: float) -> float:
    """Return the `share` quantile (0 < share <= 1) of the counted values, to 3 %; 0 if there are none."""
    total = float(counted.sum())
    if not total:
        return 0.0
    number = int(torch.searchsorted(counted.cumsum(0), share * total))
    return _SMALLEST * 10 ** ((number - 0.5) / _PER_DECADE) if number else 0.0
