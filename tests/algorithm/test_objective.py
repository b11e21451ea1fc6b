"""Compare the per-token loss terms and their gradients with METHOD's formulas.

The formulas are written a second time, token by token in float64.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import pack
from samples import encode_bytes, make_group
from tables import each_row

from megatron_srpo.algorithm.methods.grpo import GRPO
from megatron_srpo.algorithm.methods.srpo import SRPO
from megatron_srpo.algorithm.objective import (
    TokenTerms,
    entropy_weights,
    policy_term,
    routed_objective,
    truncated_importance,
)
from megatron_srpo.algorithm.routing import route_groups
from megatron_srpo.training.packing import PackingRules

WIDE = torch.float64


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=WIDE, requires_grad=grad)


def grpo_token(logprob, old, advantage, low=0.2, high=0.28, dual=3.0):
    """Return (ℓ, dℓ/d log π) of one token without importance weight, by cases."""
    ratio = math.exp(logprob - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    inert = ratio * advantage > clipped * advantage  # the clipped side is the minimum: no gradient
    loss = -(clipped if inert else ratio) * advantage
    gradient = 0.0 if inert else -ratio * advantage
    if dual is not None and advantage < 0 and loss > -dual * advantage:
        loss, gradient = -dual * advantage, 0.0
    return loss, gradient


def routed_token(logprob, divergence, engine, old, advantage, policy, distillation, cap=2.0):
    """Return (ℓ, dℓ/d log π, dℓ/d divergence) of one token of the routed loss with the default switches."""
    before = logprob if old is None else old
    importance = 1.0 if cap is None else min(math.exp(before - engine), cap)
    loss, gradient = grpo_token(logprob, before, advantage)
    drift = 1.0 if cap is None else min(math.exp(logprob - before), cap)
    factor = distillation * importance * drift
    return policy * importance * loss + factor * divergence, policy * importance * gradient, factor


@each_row(
    "ratio, advantage, loss, gradient",
    [
        (1.0, 0.5, -0.5, -0.5),
        (1.2, 0.5, -0.6, -0.6),
        (1.5, 0.5, -0.64, 0.0),  # clipped above at 1.28
        (0.5, 0.5, -0.25, -0.25),  # a good token that lost probability is not clipped
        (0.5, -0.5, 0.4, 0.0),  # clipped below at 0.8
        (1.5, -0.5, 0.75, 0.75),  # a bad token that gained probability is not clipped …
        (2.9, -0.5, 1.45, 1.45),
        (4.0, -0.5, 1.5, 0.0),  # … until the dual clip at 3
        (4.0, 0.0, 0.0, 0.0),
    ],
)
def test_policy_term_by_hand(ratio, advantage, loss, gradient):
    old = tensor(-2.0)
    logprob = (old + math.log(ratio)).requires_grad_()
    found = policy_term(logprob, old, tensor(advantage), GRPO())
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert logprob.grad.item() == pytest.approx(gradient, abs=1e-12)


def test_dual_clip_is_a_switch():
    old, logprob = tensor(-2.0), tensor(-2.0 + math.log(4.0), grad=True)
    found = policy_term(logprob, old, tensor(-0.5), GRPO(dual_clip=None))
    found.sum().backward()
    assert found.item() == pytest.approx(2.0) and logprob.grad.item() == pytest.approx(2.0)


def test_clip_ranges_are_switches():
    old, logprob = tensor(-2.0, -2.0), tensor(-2.0 + math.log(1.5), -2.0 + math.log(0.5))
    found = policy_term(logprob, old, tensor(1.0, -1.0), GRPO(clip_low=0.4, clip_high=0.1))
    np.testing.assert_allclose(found, [-1.1, 0.6])


def test_truncated_importance():
    old, engine = tensor(-1.0, -1.0, -1.0, grad=True), tensor(-1.0, -4.0, -0.5)
    rho = truncated_importance(old, engine, 2.0)
    np.testing.assert_allclose(rho, [1.0, 2.0, math.exp(-0.5)])
    assert not rho.requires_grad
    np.testing.assert_array_equal(truncated_importance(old, engine, None), np.ones(3))


numbers = st.floats(-3, 0)
tokens = st.lists(
    st.tuples(
        numbers,  # log π_θ
        st.floats(0, 2),  # divergence
        numbers,  # log π_roll
        numbers,  # log π_old
        st.sampled_from([-1.0, -0.25, 0.0, 0.5]),  # advantage
        st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.9, 0.1), (0.0, 0.0)]),
    ),
    min_size=1,
    max_size=8,
)


@given(tokens, st.booleans(), st.sampled_from([2.0, 1.1, None]))
@settings(deadline=None, max_examples=150)
def test_routed_objective_token_by_token(rows, has_old, cap):
    logprobs, divergences, engines, olds, advantages, weights = zip(*rows, strict=True)
    logprob, divergence = tensor(*logprobs, grad=True), tensor(*divergences, grad=True)
    policy, distillation = zip(*weights, strict=True)
    terms = TokenTerms(
        tensor(*advantages),
        tensor(*policy),
        tensor(*distillation),
        tensor(*engines),
        tensor(*olds) if has_old else None,
    )
    loss = routed_objective(logprob, divergence, terms, SRPO(importance_cap=cap))
    loss.backward()
    expected = np.array(
        [
            routed_token(p, d, e, o if has_old else None, a, *w, cap=cap)
            for p, d, e, o, a, w in zip(
                logprobs, divergences, engines, olds, advantages, weights, strict=True
            )
        ]
    )
    assert loss.item() == pytest.approx(expected[:, 0].sum(), rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(logprob.grad, expected[:, 1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(divergence.grad, expected[:, 2], rtol=1e-9, atol=1e-12)


def test_importance_and_drift_carry_no_gradient():
    # With a policy weight of 0, the log-probability gets no gradient from the factors of the distillation
    # term.
    logprob, divergence = tensor(-1.0, -2.0, grad=True), tensor(0.3, 0.4, grad=True)
    old = tensor(-1.5, -1.0)
    terms = TokenTerms(tensor(1.0, 1.0), tensor(0.0, 0.0), tensor(1.0, 1.0), tensor(-1.2, -1.3), old)
    routed_objective(logprob, divergence, terms, SRPO()).backward()
    assert logprob.grad.abs().max() == 0
    np.testing.assert_allclose(divergence.grad, [math.exp(0.5 - 0.3), math.exp(-1.0 + 0.3)])


def test_drift_is_capped():
    logprob, divergence = tensor(-1.0), tensor(0.5, grad=True)
    terms = TokenTerms(tensor(0.0), tensor(0.0), tensor(1.0), tensor(-4.0), tensor(-4.0))
    routed_objective(logprob, divergence, terms, SRPO(importance_cap=2.0)).backward()
    assert divergence.grad.item() == 2.0  # ρ = 1, e³ capped at 2


def test_without_old_logprobs_the_ratio_is_one_and_has_a_gradient():
    logprob = tensor(-1.0, -3.0, grad=True)
    terms = TokenTerms(tensor(0.5, -0.5), tensor(1.0, 1.0), tensor(0.0, 0.0), tensor(-1.5, -3.0), None)
    loss = routed_objective(logprob, None, terms, GRPO())
    loss.backward()
    rho = math.exp(0.5)
    assert loss.item() == pytest.approx(-0.5 * rho + 0.5)
    np.testing.assert_allclose(logprob.grad, [-0.5 * rho, 0.5])


def test_advantage_zero_gives_exactly_zero_gradient():
    generator = torch.Generator().manual_seed(0)
    logprob, old, engine = (-3 * torch.rand(50, generator=generator) for _ in range(3))
    logprob.requires_grad_()
    for before in (old, None):
        terms = TokenTerms(torch.zeros(50), torch.ones(50), torch.zeros(50), engine, before)
        loss = routed_objective(logprob, None, terms, GRPO())
        (gradient,) = torch.autograd.grad(loss, logprob)
        assert loss.item() == 0 and gradient.abs().max() == 0


def test_rows_select_tokens_of_every_field():
    terms = TokenTerms(*(torch.arange(5) + 10 * field for field in range(4)), None)
    assert [field if field is None else field.tolist() for field in terms.rows(slice(1, 3))] == [
        [1, 2],
        [11, 12],
        [21, 22],
        [31, 32],
        None,
    ]


def test_tiles_add_up_to_the_untiled_loss():
    generator = torch.Generator().manual_seed(1)
    logprob, divergence, engine, advantage = (
        torch.rand(9, generator=generator, dtype=WIDE) - 1 for _ in range(4)
    )
    terms = TokenTerms(advantage, torch.ones(9), torch.ones(9), engine, None)
    untiled = routed_objective(logprob, divergence, terms, SRPO())
    parts = [
        routed_objective(logprob[rows], divergence[rows], terms.rows(rows), SRPO())
        for rows in (slice(0, 4), slice(4, 5), slice(5, 9))
    ]
    assert untiled.item() == pytest.approx(sum(parts).item(), rel=1e-12)


def test_batch_without_distillation_is_plain_grpo():
    # METHOD §7 (b): SRPO's groups without a teacher (prompts too long) give GRPO's loss and gradient, bit for
    # bit.
    groups = [make_group((1, 0, 0), "a"), make_group((1, 1, 1), "b"), make_group((0, 0, 0), "c")]
    generator = torch.Generator().manual_seed(0)
    logprob = -3 * torch.rand(6, generator=generator)  # of the only group whose gradient is not zero
    results = []
    for algorithm in (SRPO(), GRPO()):
        routed = route_groups(groups, algorithm, encode_bytes, 5, "s")
        batch = pack(routed, 0, 1, PackingRules(1000))
        (micro_batch,) = batch.micro_batches
        assert batch.distilled_tokens == micro_batch.distilled == 0 and batch.teacher_micro_batches == []
        own = logprob.clone().requires_grad_()
        loss = routed_objective(
            own, None, batch.terms(micro_batch, torch.empty(0), None, torch.device("cpu")), algorithm
        )
        loss.backward()
        results.append((loss.item(), own.grad, [sequence.key for sequence in micro_batch.sequences]))
    (loss, gradient, keys), other = results
    assert (loss, keys) == (other[0], other[2])
    assert torch.equal(gradient, other[1]) and gradient.abs().max() > 0
    advantages = [sample.route.advantage for group in routed for sample in group]
    per_token = np.repeat([advantages[key] for key in keys], 2)
    expected = (
        -np.minimum(np.exp(logprob.numpy() + 1.0), 2) * per_token / 18
    )  # the engine's log-probs are all -1
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)
    assert loss == pytest.approx(expected.sum(), rel=1e-4)


@given(st.lists(st.floats(0, 12), min_size=1, max_size=30), st.floats(0, 3))
@settings(deadline=None, max_examples=100)
def test_entropy_weights_closed_form(entropies, beta):
    mean = entropy_weights(tensor(*entropies), beta).mean()
    weights = entropy_weights(tensor(*entropies), beta, mean)
    expected = np.exp(-beta * np.array(entropies))
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-9)
    assert weights.mean().item() == pytest.approx(1)
    order = torch.tensor(entropies).argsort()
    assert (weights[order].diff() <= 0).all()  # uncertain tokens weigh less


def test_beta_zero_gives_weight_one():
    assert entropy_weights(tensor(0.0, 1.0, 7.0), 0.0).tolist() == [1.0, 1.0, 1.0]


def test_an_unsure_teacher_and_a_large_beta_give_finite_weights():
    # Teachers' entropies are fp32, and exp(-20 · 6) underflows to 0 in fp32.
    entropies = torch.tensor([6.0, 6.0, 6.5])
    weights = entropy_weights(entropies, 20.0, entropy_weights(entropies, 20.0).mean())
    np.testing.assert_allclose(weights, np.array([1, 1, math.exp(-10)]) * 3 / (2 + math.exp(-10)))


def test_entropy_weights_keep_the_mean_they_are_given_and_are_capped():
    # Ω spans several micro-batches, so the mean is passed in.
    entropies, mean = -tensor(0.1, 0.5, 0.9).log(), tensor(0.5)
    np.testing.assert_allclose(entropy_weights(entropies, 1.0, mean), [0.2, 1.0, 1.8])
    np.testing.assert_allclose(entropy_weights(entropies, 1.0, mean, cap=1.5), [0.2, 1.0, 1.5])
