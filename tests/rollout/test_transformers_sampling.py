"""Compare the embedded engine's sampling with the inverse of the cumulative distribution in float64."""

import pytest
import torch

from megatron_srpo.rollout.engine import Sampling
from megatron_srpo.rollout.transformers.sampling import sample

VOCABULARY = 151_936
BELOW_1 = 1 - 2**-53


def logits_of(kind, rows, vocabulary=VOCABULARY):
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1))
    if kind == "peaked":
        return 6 * logits
    if kind == "masked":  # most tokens are impossible, the last ones of the vocabulary too
        logits[:, 5::3] = logits[:, 4::3] = -torch.inf
        logits[:, -2000:] = -torch.inf
    return logits


def exact(logits, uniforms, temperature, top_p):
    """Return tokens, their log-probabilities, and how far a uniform number is from a border, in float64."""
    masses, ids = (logits.double() / temperature).softmax(-1), torch.arange(logits.shape[1]).expand_as(logits)
    if top_p < 1:
        masses, ids = masses.sort(-1, descending=True)
    edges = masses.cumsum(-1) / masses.sum(-1, keepdim=True)
    kept = torch.ones(len(logits), 1, dtype=torch.double)
    if top_p < 1:
        last = (edges < top_p).sum(-1, keepdim=True)
        kept = edges.gather(1, last)
    target = uniforms[:, None] * kept
    place = (edges <= target).sum(-1, keepdim=True)
    distance = (edges - target).abs().amin(-1)
    return ids.gather(1, place)[:, 0], (masses.gather(1, place) / kept).log()[:, 0], distance


@pytest.mark.parametrize("kind", ["flat", "peaked", "masked"])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.9), (0.7, 0.3)])
def test_tokens_and_logprobs(kind, temperature, top_p):
    # With a flat distribution a nucleus has more than 100,000 tokens.
    logits = logits_of(kind, 24)
    uniforms = torch.rand(24, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    expected, logprobs, distance = exact(logits, uniforms, temperature, top_p)
    chosen = sample(logits.clone(), uniforms, Sampling(temperature, top_p, 1, ()))
    is_near_tie = distance < 2e-7  # of fp32 sums of 512 tokens
    assert is_near_tie.sum() <= (5 if kind == "flat" else 2)
    assert torch.equal(chosen.ids[~is_near_tie], expected[~is_near_tie])
    errors = (chosen.logprobs - logprobs)[~is_near_tie].abs()
    assert errors.max() < 2e-6


@pytest.mark.parametrize("kind", ["flat", "peaked", "masked"])
@pytest.mark.parametrize("vocabulary", [1, 7, 512, 513, 3000])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_extreme_uniform_numbers_choose_possible_tokens(kind, vocabulary, top_p):
    logits = logits_of("flat" if vocabulary < 3000 else kind, 3, vocabulary)
    chosen = sample(logits, torch.tensor([0.0, 0.5, BELOW_1]).double(), Sampling(1.0, top_p, 1, ()))
    assert (chosen.ids < vocabulary).all() and chosen.logprobs.isfinite().all()
    if top_p == 1:
        possible = logits.isfinite()
        assert chosen.ids[0] == possible[0].nonzero()[0, 0]
        assert chosen.ids[2] >= possible[2].nonzero()[-3:, 0].min()


def test_greedy_has_the_logprob_at_temperature_1():
    logits = logits_of("peaked", 5)
    chosen = sample(logits, torch.zeros(5).double(), Sampling(0.0, 1.0, 1, ()))
    expected, ids = logits.double().log_softmax(-1).max(-1)
    assert torch.equal(chosen.ids, ids)
    assert (chosen.logprobs - expected).abs().max() < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (1.0, 0.9)])
def test_invalid_logits_give_nan(bad, temperature, top_p):
    logits = logits_of("flat", 2, 3000)
    logits[1, 2345] = bad
    chosen = sample(logits, torch.full((2,), 0.5).double(), Sampling(temperature, top_p, 1, ()))
    assert chosen.logprobs.isnan().tolist() == [False, True]
