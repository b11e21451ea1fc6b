"""Test the fused pass against float64 autograd on full matrices: values, statistics, both gradients."""

import math

import pytest
import torch
from exact_vocab import WIDE, largest_error, log_softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from tables import each_row
from vocab_inputs import FULL, KERNELS, SAMPLED, SUPPORTS, FusedCase, assert_close

from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.fused import fused_objective, score
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Logits, Projection
from megatron_srpo.vocab_parallel.shard import VocabShard

SHARD = VocabShard(0, 29, 29)
# one of each sort, for what does not depend on the divergence
SORTS = [
    FULL[1],
    FULL[2]._replace(support="teacher_topk", top_k=6),
    FULL[3]._replace(support="student_topk", top_k=6),
    FULL[4],
    SAMPLED,
]
either_kernel = pytest.mark.parametrize("kernel", KERNELS)


@pairwise(divergence=FULL, support=SUPPORTS, kernel=KERNELS, temperature=[1.0, 0.7])
def test_every_divergence(divergence, support, kernel, temperature):
    divergence, case = divergence._replace(support=support, top_k=6), FusedCase()
    found = case.fused(divergence, temperature, tile_tokens=4, kernel=kernel)
    assert_close(found, case.exact(divergence, temperature), 1e-11)


@either_kernel
def test_sampled_divergence(kernel):
    case = FusedCase()
    assert_close(
        case.fused(SAMPLED, 0.7, tile_tokens=4, kernel=kernel), case.exact(SAMPLED, temperature=0.7), 1e-11
    )


@pairwise(counts=[(13, 0), (13, 13), (1, 1), (7, 6)], tile_tokens=[1, 3, None], kernel=KERNELS)
def test_tiles_and_numbers_of_distilled_tokens(counts, tile_tokens, kernel):
    case = FusedCase(*counts)
    assert_close(case.fused(tile_tokens=tile_tokens, kernel=kernel), case.exact(), 1e-11)


@either_kernel
def test_no_tokens_at_all(kernel):
    (loss, hidden_grad, weight_grad), statistics = FusedCase(0, 0).fused(kernel=kernel)
    assert loss.item() == 0 and hidden_grad.shape == (0, 8)
    assert weight_grad.shape == (32, 8) and weight_grad.abs().max() == 0
    assert [len(vector) for vector in statistics] == [0, 0, 0]


def test_teacher_of_no_tokens_is_no_teacher():
    # D = 0 may also come as tensors with no rows.
    case = FusedCase(5, 0)
    teacher = Projection(case.hidden[:0], case.weight)
    student = Projection(case.hidden, case.weight)
    loss, statistics = fused_objective(student, case.targets, case.objective, SHARD, teacher=teacher)
    assert loss.item() == pytest.approx(case.exact()[0][0].item()) and statistics.divergence.shape == (0,)


@pairwise(divergence=[SORTS[0], SORTS[2]], kernel=KERNELS)
def test_padded_rows_are_ignored(divergence, kernel):
    case = FusedCase()
    first, first_statistics = case.fused(divergence, kernel=kernel)
    assert first[2][case.vocab_size :].abs().max() == 0
    case.weight[case.vocab_size :] = -7.0
    case.teacher_weight[case.vocab_size :] = 0.0
    second, second_statistics = case.fused(divergence, kernel=kernel)
    for one, other in zip((*first, *first_statistics), (*second, *second_statistics), strict=True):
        assert torch.equal(one, other)


def test_vocabulary_without_padding():
    case = FusedCase(vocab_size=29, padded=29)
    assert_close(case.fused(), case.exact(), 1e-11)


@either_kernel
@given(
    st.integers(0, 10**6),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(2, 12),
    st.integers(0, 3),
    st.integers(1, 5),
    st.sampled_from(FULL),
    st.sampled_from([*SUPPORTS, "sampled"]),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.1, 1.0, 4.0]),
)
@settings(deadline=None, max_examples=60)
def test_any_shape(
    kernel, seed, tokens, distilled, vocab_size, padding, tile_tokens, divergence, support, temperature, scale
):
    divergence = SAMPLED if support == "sampled" else divergence._replace(support=support, top_k=6)
    distilled, padded = min(tokens, distilled), vocab_size + padding
    case = FusedCase(tokens, distilled, vocab_size, padded, seed=seed, scale=scale)
    found = case.fused(divergence, temperature, tile_tokens=tile_tokens, kernel=kernel)
    expected = case.exact(divergence, temperature)
    rounding = max(1e-11, 1e-14 * abs(float(expected[0][0])))  # losses of up to 10^4, gradients of 10^-12
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=rounding)


@pytest.mark.parametrize("divergence", [*FULL[:4], *SORTS[1:]], ids=str)
def test_several_blocks_of_columns_and_parts_of_rows(divergence):
    # Wider than a block of the CPU kernel, and tiles large enough for huge pages.
    case = FusedCase(40, 33, 9001, 9008)
    assert_close(case.fused(divergence, 0.7), case.exact(divergence, 0.7), 1e-11)


@pytest.mark.parametrize("divergence", SORTS, ids=str)
def test_fp32_is_close_to_float64(divergence):
    case = FusedCase(64, 32, 500, 512, width=16, dtype=torch.float32)
    assert_close(case.fused(divergence, tile_tokens=24), case.exact(divergence), 1e-5)


def test_statistics_of_fp32_are_close_to_float64_token_by_token():
    case = FusedCase(64, 64, 500, 512, width=16, dtype=torch.float32)
    for ours, theirs in zip(case.fused()[1], case.exact()[1], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.to(WIDE), theirs, rtol=1e-5, atol=1e-6)


@pairwise(divergence=[SORTS[0], SORTS[2], SORTS[3]], kernel=KERNELS)
def test_bf16_inputs(divergence, kernel):
    # Products in bf16, everything after them in fp32: close to float64 on the same rounded inputs.
    case = FusedCase(24, 12, 100, 112, width=16, dtype=torch.bfloat16)
    found = case.fused(divergence, kernel=kernel)
    assert [x.dtype for x in found[0]] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert all(x.dtype == torch.float32 for x in found[1])
    assert_close(found, case.exact(divergence), 0.03)


def test_gradient_is_scaled_by_the_upstream_factor():
    case = FusedCase()
    once, scaled = case.fused()[0], case.fused(factor=-2.5)[0]
    torch.testing.assert_close(scaled[1], -2.5 * once[1])
    torch.testing.assert_close(scaled[2], -2.5 * once[2])


def test_no_gradient_flows_to_the_teacher_or_from_the_statistics():
    case = FusedCase()
    case.teacher_hidden.requires_grad_()
    case.teacher_weight.requires_grad_()
    _, statistics = case.fused()
    assert case.teacher_hidden.grad is None and case.teacher_weight.grad is None
    assert not any(vector.requires_grad for vector in statistics)


def _sum_of_logprobs(rows, tile):
    return tile.logprob.sum()


def test_only_what_needs_a_gradient_gets_one():
    case = FusedCase()
    hidden, exact_hidden = case.hidden.clone().requires_grad_(), case.hidden.clone().requires_grad_()
    loss, _ = fused_objective(Projection(hidden, case.weight), case.targets, _sum_of_logprobs, SHARD)
    loss.backward()
    log_softmax(exact_hidden, case.weight, 29).gather(1, case.targets[:, None]).sum().backward()
    torch.testing.assert_close(hidden.grad, exact_hidden.grad)
    with torch.no_grad():
        loss, _ = fused_objective(Projection(hidden, case.weight), case.targets, _sum_of_logprobs, SHARD)
    assert not loss.requires_grad


@either_kernel
def test_inputs_are_not_changed(kernel):
    case = FusedCase()
    inputs = (case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.targets)
    before = [x.clone() for x in inputs]
    case.fused(temperature=0.5, kernel=kernel)
    assert all(torch.equal(x, y) for x, y in zip(before, inputs, strict=True))


@pairwise(divergence=SORTS, dtype=[torch.float32, torch.bfloat16], kernel=KERNELS)
def test_student_equal_to_teacher_has_loss_and_gradient_zero(divergence, dtype, kernel):
    # Exactly zero, not zero within rounding.
    case = FusedCase(9, 9, dtype=dtype)
    case.teacher_hidden, case.teacher_weight = case.hidden.clone(), case.weight.clone()
    case.only_divergence()
    (loss, hidden_grad, weight_grad), statistics = case.fused(divergence, kernel=kernel)
    for found in (loss, hidden_grad, weight_grad, statistics.divergence):
        assert found.abs().max() == 0


@pairwise(divergence=SORTS, kernel=KERNELS)
def test_extreme_logits_in_fp32(divergence, kernel):
    # Logits of ±10⁴: finite, and float64's values within the rounding of terms that cancel.
    generator = torch.Generator().manual_seed(3)
    case = FusedCase(12, 12, 20, 24, width=4, dtype=torch.float32)
    case.weight[:20] = torch.randint(-3, 4, (20, 4), generator=generator).float()
    case.teacher_weight[:20] = torch.randint(-3, 4, (20, 4), generator=generator).float()
    case.hidden, case.teacher_hidden = 1500 * case.hidden.sign(), 1500 * case.teacher_hidden.sign()
    case.weight[:20, 0] += torch.arange(20) / 64  # no ties among the top K
    case.only_divergence()
    assert (case.hidden @ case.weight[:20].t()).abs().max() > 1e4
    found, expected = case.fused(divergence, kernel=kernel), case.exact(divergence)
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert ours.isfinite().all()
        assert (ours.to(WIDE) - theirs).abs().max() <= 1e-6 * theirs.abs().max() + 1e-6


@pairwise(dtype=[WIDE, torch.float32, torch.bfloat16], temperature=[1.0, 0.6], kernel=KERNELS)
def test_score_agrees(dtype, temperature, kernel):
    tolerance = {WIDE: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    case = FusedCase(dtype=dtype)
    source = Projection(case.hidden.clone().requires_grad_(), case.weight)
    found = score(source, case.targets, SHARD, temperature=temperature, kernel=kernel)
    logprob, entropies, _ = case.exact(temperature=temperature)[1]
    assert largest_error(found.logprob, logprob) < tolerance
    assert largest_error(found.entropy, entropies) < tolerance
    assert found.divergence.shape == (0,)
    assert not found.logprob.requires_grad and not found.entropy.requires_grad
    if dtype == WIDE:
        fused = case.fused(temperature=temperature)[1]
        torch.testing.assert_close(found.logprob, fused.logprob)
        torch.testing.assert_close(found.entropy, fused.entropy)


def test_score_of_several_tiles():
    case = FusedCase(50, 0)
    source = Projection(case.hidden, case.weight)
    untiled = score(source, case.targets, SHARD)
    tiled = score(source, case.targets, SHARD, memory=1)  # tiles of 16, the smallest
    for ours, theirs in zip(tiled, untiled, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_score_of_nothing():
    case = FusedCase(0, 0)
    found = score(Projection(case.hidden, case.weight), case.targets, SHARD)
    assert [len(x) for x in found] == [0, 0, 0]


@either_kernel
def test_score_without_targets(kernel):
    # The log-probs are then zeros; entropies are the same.
    case = FusedCase()
    source = Projection(case.hidden, case.weight)
    found = score(source, None, SHARD, kernel=kernel)
    torch.testing.assert_close(found.entropy, score(source, case.targets, SHARD).entropy)
    assert found.logprob.tolist() == [0.0] * 13


def test_teacher_entropy_is_of_the_full_vocabulary():
    # Uniform teacher: H = log V, for any padding.
    found = score(Projection(torch.zeros(3, 8), torch.ones(32, 8)), None, SHARD)
    assert found.entropy.tolist() == pytest.approx([math.log(29)] * 3)


@each_row(
    "rank, padded_width, vocab_size, expected",
    [
        (0, 32, 29, (0, 29)),
        (0, 10, 29, (0, 10)),
        (2, 10, 29, (20, 9)),
        (2, 16, 29, (29, 0)),
        (3, 16, 29, (29, 0)),
        (1, 16, 32, (16, 16)),
    ],
)
def test_shard_of_rank(rank, padded_width, vocab_size, expected):
    shard = VocabShard.of_rank(rank, padded_width, vocab_size, None)
    assert (shard.start, shard.width, shard.vocab_size) == (*expected, vocab_size)


def _arguments(**changes):
    """Return arguments of `fused_objective` that fit, except for `changes`."""
    case = FusedCase()
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    given = {name: changes.pop(name, getattr(case, name)) for name in names}
    arguments = {
        "student": Projection(given["hidden"], given["weight"]),
        "targets": case.targets,
        "objective": case.objective,
        "shard": VocabShard.of_rank(0, 32, 29, None),
        "teacher": Projection(given["teacher_hidden"], given["teacher_weight"]),
    }
    return arguments | changes


def _zeros(*shape, dtype=WIDE, **options):
    return torch.zeros(*shape, dtype=dtype, **options)


@each_row(
    "changes, message",
    [
        ({"hidden": _zeros(13, 7)}, r"hidden \[13, 7\] and weight \[32, 8\]"),
        ({"hidden": _zeros(13, 1, 8)}, r"hidden \[13, 1, 8\]"),
        ({"hidden": torch.zeros(13, 8)}, r"hidden \(torch.float32, cpu\) and weight \(torch.float64, cpu\)"),
        ({"weight": _zeros(32, 8, device="meta")}, "weight .torch.float64, meta."),
        ({"targets": torch.zeros(12, dtype=torch.int64)}, r"targets \[12\].*expected \[13\] int64"),
        ({"targets": torch.zeros(13, dtype=torch.int32)}, r"torch.int32.*expected \[13\] int64"),
        ({"targets": torch.full((13,), 29)}, "ids from 29 to 29 at 13 positions; expected 0 … 28"),
        ({"targets": torch.full((13,), -1)}, "ids from -1 to -1"),
        ({"targets": None, "divergence": SAMPLED}, "targets: None"),
        ({"divergence": Divergence("jsd", support="sampled")}, "jsd on sampled tokens"),
        ({"divergence": Divergence("jsd", 1.0)}, "alpha 1.0: expected"),
        ({"divergence": Divergence("jsd", 0.0)}, "alpha 0.0: expected"),
        ({"divergence": Divergence("kl")}, "'kl' on 'full': expected one of"),
        ({"divergence": Divergence(support="half")}, "'jsd' on 'half': expected one of"),
        ({"divergence": Divergence(support="student_topk", top_k=0)}, "top_k 0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"shard": VocabShard(0, 33, 40)}, "does not fit weight of 32 rows"),
        ({"shard": VocabShard(0, 20, 29)}, "holds 20 of 29 ids, but has no process group"),
        ({"weight_grad": _zeros(31, 8)}, r"weight_grad \[31, 8\].*expected \[32, 8\]"),
        ({"weight_grad": torch.zeros(32, 8)}, r"weight_grad \[32, 8\] \(torch.float32"),
        (
            {"student": Logits(_zeros(13, 32)), "weight_grad": _zeros(32, 8)},
            "weight_grad: given, but .* without a weight",
        ),
        ({"student": Logits(_zeros(13, 28))}, "does not fit logits of 28 columns"),
        ({"student": Logits(torch.zeros(13, 32, dtype=torch.int64))}, "floating-point"),
        (
            {"teacher": InterpolatedLogits(Logits(_zeros(5, 32)), Logits(_zeros(6, 32)), 0.5)},
            "5 tokens .* and 6 tokens",
        ),
        (
            {"teacher": InterpolatedLogits(Logits(_zeros(5, 32)), Logits(_zeros(5, 32)), 1.5)},
            "teacher.interpolation 1.5",
        ),
        (
            {"teacher": InterpolatedLogits(Logits(_zeros(5, 32)), Logits(_zeros(5, 20)), 0.5)},
            "teacher.policy of 20 columns",
        ),
        ({"teacher": Logits(torch.zeros(5, 32))}, "teacher of 5 tokens .torch.float32"),
        ({"shard": VocabShard(20, 10, 29)}, "or its own vocabulary"),
        ({"teacher_hidden": _zeros(14, 8)}, "teacher of 14 tokens.*at most 13"),
        ({"teacher_weight": _zeros(28, 7)}, r"teacher.hidden \[5, 8\] and teacher.weight \[28, 7\]"),
    ],
)
def test_invalid_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        fused_objective(**_arguments(**changes))
