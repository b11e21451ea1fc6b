"""Compare quantiles computed from counts with numpy's quantiles of the values."""

import numpy as np
import pytest
import torch

from megatron_srpo.data import histogram as quantiles

SHARES = (0.1, 0.5, 0.9)


@pytest.mark.parametrize("scale", [0.003, 0.2, 3.0])
def test_quantiles_of_parts_that_are_added(scale):
    values = torch.from_numpy(np.random.default_rng(0).gamma(0.7, scale, 20_000)).float()
    counted = sum(quantiles.counts(part) for part in values.split(3_000))
    assert sum(counted) == len(values)
    for share in SHARES:
        assert quantiles.quantile(counted, share) == pytest.approx(
            np.quantile(values.numpy(), share), rel=0.03, abs=1e-4
        )


def test_zeros_and_nothing():
    assert [quantiles.quantile(quantiles.counts(torch.zeros(5)), share) for share in SHARES] == [0.0] * 3
    assert quantiles.quantile(quantiles.counts(torch.empty(0)), 0.5) == 0.0


def test_what_is_far_out_is_counted():
    assert quantiles.quantile(quantiles.counts(torch.tensor([1e9, 1e-9, 5.0])), 0.5) == pytest.approx(
        5.0, rel=0.03
    )
