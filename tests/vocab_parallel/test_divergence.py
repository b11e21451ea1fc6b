"""Test divergences and their closed-form gradients against float64 autograd, and their bounds."""

import math

import pytest
import torch
from exact_vocab import WIDE, divergence, largest_error
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from tables import each_row
from vocab_inputs import FULL

from megatron_srpo.vocab_parallel.divergence import Divergence, divergence_on_tile
from megatron_srpo.vocab_parallel.shard import VocabShard

SHARP = st.sampled_from([0.1, 1.0, 5.0, 30.0])  # how far from uniform


def logits(seed, rows=4, vocab_size=23, scale=2.0, dtype=WIDE):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, rows, vocab_size, generator=generator, dtype=WIDE)).to(dtype)


def on(kind, k, side="student"):
    """Return `kind` on the top k of one side and a tail, or on the full support for k = None."""
    return kind if k is None else kind._replace(support=f"{side}_topk", top_k=k)


def ours(z_student, z_teacher, kind):
    """Return (D, dD/dz) of the package on one shard that holds the complete vocabulary."""
    logp, logq = z_student.log_softmax(1), z_teacher.log_softmax(1)
    return divergence_on_tile(logp, logq, kind, VocabShard(0, logp.shape[1], logp.shape[1]))


def reference(z_student, z_teacher, kind):
    z_student = z_student.to(WIDE).requires_grad_()
    values = divergence(z_student.log_softmax(1), z_teacher.to(WIDE).log_softmax(1), kind)
    (gradient,) = torch.autograd.grad(values.sum(), z_student)
    return values.detach(), gradient


@pairwise(kind=FULL, k=[None, 1, 22], side=["student", "teacher"], scale=[0.3, 2.0, 8.0])
def test_value_and_gradient(kind, k, side, scale):
    kind = on(kind, k, side)
    student, teacher = logits(0, scale=scale)
    value, gradient = ours(student, teacher, kind)
    expected, expected_gradient = reference(student, teacher, kind)
    assert largest_error(value, expected) < 1e-11
    assert largest_error(gradient, expected_gradient) < 1e-11


@given(st.integers(0, 10**6), SHARP, st.sampled_from(FULL), st.sampled_from([None, 1, 5, 40]))
@settings(deadline=None, max_examples=100)
def test_value_and_gradient_everywhere(seed, scale, kind, k):
    student, teacher = logits(seed, scale=scale)
    kind = on(kind, k)
    value, gradient = ours(student, teacher, kind)
    expected, expected_gradient = reference(student, teacher, kind)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 10**6), SHARP, st.sampled_from(FULL))
@settings(deadline=None, max_examples=60)
def test_top_k_of_the_complete_vocabulary_is_full(seed, scale, kind):
    student, teacher = logits(seed, scale=scale)
    for k in (23, 24, 1000):
        for found, expected in zip(
            ours(student, teacher, on(kind, k)), ours(student, teacher, kind), strict=True
        ):
            assert torch.equal(found, expected)


@given(st.integers(0, 10**6), SHARP, st.sampled_from([None, 1, 5]))
@settings(deadline=None, max_examples=100)
def test_bounds(seed, scale, k):
    # 0 ≤ JSD_½ ≤ ln 2 and KL ≥ 0; a coarser support never gives more than the finer one (data processing).
    student, teacher = logits(seed, scale=scale)
    for kind in FULL:
        value = ours(student, teacher, on(kind, k))[0]
        assert value.min() >= -1e-12
        assert (value <= ours(student, teacher, kind)[0] + 1e-10).all()
        if kind.name == "jsd" and kind.alpha == 0.5:
            assert value.max() <= math.log(2) + 1e-12


def test_jsd_of_disjoint_distributions_is_ln_2():
    student, teacher = torch.full((1, 6), -1e4), torch.full((1, 6), -1e4)
    student[0, 1], teacher[0, 4] = 1e4, 1e4
    for k in (None, 2):
        value, gradient = ours(student, teacher, on(Divergence(), k))
        assert value.item() == pytest.approx(math.log(2), rel=1e-6)
        assert gradient.isfinite().all()


@given(st.integers(0, 10**6), SHARP)
@settings(deadline=None, max_examples=60)
def test_jsd_symmetry(seed, scale):
    # JSD_½ is symmetric in student and teacher; JSD_α(p, q) = JSD_{1-α}(q, p).
    student, teacher = logits(seed, scale=scale)
    for alpha in (0.5, 0.2):
        there = ours(student, teacher, Divergence("jsd", alpha))[0]
        back = ours(teacher, student, Divergence("jsd", 1 - alpha))[0]
        torch.testing.assert_close(there, back, rtol=1e-10, atol=1e-13)


def test_forward_and_reverse_are_each_other_swapped():
    # METHOD's convention: forward is KL(q‖p), reverse KL(p‖q), p the student.
    p, q = torch.tensor([[0.5, 0.5]], dtype=WIDE), torch.tensor([[0.9, 0.1]], dtype=WIDE)
    q_over_p = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    p_over_q = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert divergence_on_tile(p.log(), q.log(), Divergence("forward"), VocabShard(0, 2, 2))[
        0
    ].item() == pytest.approx(q_over_p)
    assert divergence_on_tile(p.log(), q.log(), Divergence("reverse"), VocabShard(0, 2, 2))[
        0
    ].item() == pytest.approx(p_over_q)


def test_alpha_is_the_weight_of_the_teacher():
    # m = (1-α)p + αq and ℓ = (1-α) KL(p‖m) + α KL(q‖m), by hand on two ids.
    p, q, alpha = [0.5, 0.5], [0.9, 0.1], 0.25
    m = [0.6, 0.4]
    expected = sum(
        0.75 * a * math.log(a / c) + 0.25 * b * math.log(b / c) for a, b, c in zip(p, q, m, strict=True)
    )
    logp, logq = torch.tensor([p], dtype=WIDE).log(), torch.tensor([q], dtype=WIDE).log()
    value = divergence_on_tile(logp, logq, Divergence("jsd", alpha), VocabShard(0, 2, 2))[0]
    assert value.item() == pytest.approx(expected)


@each_row("kind", FULL)
def test_gradient_sums_to_zero(kind):
    # Adding a constant to all logits changes nothing.
    student, teacher = logits(4)
    for k in (None, 5):
        gradient = ours(student, teacher, on(kind, k))[1]
        assert gradient.sum(1).abs().max() < 1e-14 and gradient.abs().max() > 1e-3


@each_row("kind", FULL)
def test_identical_distributions_have_divergence_and_gradient_zero(kind):
    for dtype, tolerance in ((WIDE, 1e-15), (torch.float32, 1e-6)):
        student = logits(5, scale=4.0, dtype=dtype)[0]
        for k in (None, 5):
            value, gradient = ours(student, student.clone(), on(kind, k))
            assert value.abs().max() <= tolerance and gradient.abs().max() <= tolerance


@pairwise(kind=FULL, k=[None, 1, 3], size=[50.0, 300.0, 1e4])
def test_extreme_logits_stay_finite_and_right_in_fp32(kind, k, size):
    # One-hot student and one-hot teacher, agreeing or not: nothing may become inf or NaN.
    patterns = torch.tensor(
        [
            [1.0, -1.0, -1.0, -1.0, -1.0],
            [-1.0, 1.0, -1.0, -1.0, -1.0],
            [-1.0, -1.0, 1.0, 1.0, -1.0],
            [0.0, 0.0, 0.0, 0.0, 0.0],
            [-1.0, -0.5, 0.0, 0.5, 1.0],
        ]
    )
    student, teacher = (size * patterns).repeat_interleave(5, 0), (size * patterns).repeat(5, 1)
    student = student + torch.arange(5) * 1e-3 * size  # no ties: the top K is well defined
    kind = on(kind, k)
    value, gradient = ours(student, teacher, kind)
    expected, expected_gradient = reference(student, teacher, kind)
    assert value.isfinite().all() and gradient.isfinite().all()
    rounding = 1e-5 + 1e-7 * size  # of fp32 logits this large
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=rounding)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=rounding)


def test_tail_bucket_with_next_to_no_mass():
    # The student's distribution is so sharp that its tail underflows in fp32, to 0 or to a denormal number.
    student = torch.tensor([[40.0, -60.0, -65.0, -70.0], [120.0, 110.0, -5.0, -10.0], [90.0, 0.0, -1.0, 1.0]])
    teacher = torch.tensor([[0.0, 3.0, 2.0, 1.0]] * 3)
    for kind in FULL:
        for k in (1, 2):
            value, gradient = ours(student, teacher, on(kind, k))
            expected, expected_gradient = reference(student, teacher, on(kind, k))
            assert value.isfinite().all() and gradient.isfinite().all(), kind
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


def test_fp32_is_close_to_float64():
    student, teacher = logits(7, rows=64, vocab_size=300, scale=3.0)
    for kind in FULL:
        for k in (None, 20):
            found = ours(student.float(), teacher.float(), on(kind, k))
            expected = reference(student.float(), teacher.float(), on(kind, k))
            assert largest_error(found[0], expected[0]) < 1e-5
            assert largest_error(found[1], expected[1]) < 1e-5
