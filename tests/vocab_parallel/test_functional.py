"""Test each function against float64 autograd over complete logits, in both forms, with both kernels."""

import math

import exact_vocab
import pytest
import torch
from exact_vocab import WIDE, norm_error
from pairwise import pairwise
from vocab_inputs import (
    DIVERGENCES,
    ENTROPY,
    FORMS,
    FORWARD,
    JSD,
    KERNELS,
    KINDS,
    LOG_PROB,
    REVERSE,
    SAMPLED_KL,
    SORTS,
    SUPPORTS,
    Inputs,
    check,
    each_sort,
    full_logits,
)

from megatron_srpo.vocab_parallel import functional
from megatron_srpo.vocab_parallel.fused import IGNORED, fused_objective
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Logits, Projection

SETTINGS = [(1.0, None, None), (0.7, 3, 0.3)]  # temperature, tile_tokens, interpolation of the teacher


def _check_setting(function, form, kernel, setting):
    temperature, tile_tokens, interpolation = setting
    inputs = Inputs(form, interpolation=interpolation)
    options = {"temperature": temperature, "tile_tokens": tile_tokens, "kernel": kernel}
    check(inputs, inputs.weighted(function), 1e-11, **options)


@pairwise(function=[LOG_PROB, ENTROPY, SAMPLED_KL], form=FORMS, kernel=KERNELS, setting=SETTINGS)
def test_value_and_gradient(function, form, kernel, setting):
    _check_setting(function, form, kernel, setting)


@pairwise(
    function=[JSD, *KINDS],
    support=[
        ("full", 6),
        ("student_topk", 6),
        ("student_topk", 28),
        ("teacher_topk", 1),
        ("teacher_topk", 6),
    ],
    form=FORMS,
    kernel=KERNELS,
    setting=SETTINGS,
)
def test_value_and_gradient_of_divergences(function, support, form, kernel, setting):
    _check_setting(function.on(*support), form, kernel, setting)


@each_sort
def test_no_tokens(function, form, kernel):
    inputs = Inputs(form, tokens=0)
    check(inputs, inputs.weighted(function), 0, kernel=kernel)


@pairwise(function=SORTS[2:], form=FORMS, kernel=KERNELS, distilled=[0, 1, 4], tile_tokens=[1, 3, None])
def test_teacher_of_the_first_tokens_only(function, form, kernel, distilled, tile_tokens):
    inputs = Inputs(form, distilled=distilled, interpolation=0.4)
    check(inputs, inputs.weighted(function), 1e-11, tile_tokens=tile_tokens, kernel=kernel)


def _clipped(f):
    ratio = (f(LOG_PROB) + 3.3).exp()
    return torch.minimum(ratio, ratio.clamp(0.8, 1.2)) - 0.1 * f(ENTROPY)


def _gated(f):
    return f(FORWARD) * torch.sigmoid(f(REVERSE) - 1) + f(DIVERGENCES[1]).sqrt() / f(ENTROPY)


EXPRESSIONS = {
    "log_prob.exp * jsd": lambda f: f(LOG_PROB).exp() * f(JSD),
    "clipped": _clipped,
    "gated": _gated,
    "one twice": lambda f: f(JSD) * f(JSD) - f(JSD).log(),
}


@pairwise(expression=EXPRESSIONS, form=FORMS)
def test_inside_expressions(expression, form):
    check(Inputs(form), EXPRESSIONS[expression], 1e-11, temperature=0.7, tile_tokens=3)


@pairwise(function=KINDS, form=FORMS, kernel=KERNELS, support=SUPPORTS[1:], top_k=[29, 1000])
def test_top_k_of_the_complete_vocabulary_is_the_full_support(function, form, kernel, support, top_k):
    inputs = Inputs(form)
    full = inputs.ours(inputs.weighted(function), kernel=kernel)
    found = inputs.ours(inputs.weighted(function.on(support, top_k)), kernel=kernel)
    torch.testing.assert_close(found, full, rtol=1e-12, atol=1e-13)


@pairwise(form=FORMS, kernel=KERNELS)
def test_samples_are_unbiased(form, kernel):
    # Weighted with the probability of each y, values and gradients add up to those of the reverse KL.
    inputs = Inputs(form)
    logp, logq = (torch.log_softmax(full_logits(x, 29), -1) for x in (inputs.student, inputs.teacher))
    value, total = torch.zeros(7, dtype=WIDE), [torch.zeros_like(x) for x in inputs.student]
    for y in range(29):
        inputs.targets = torch.full((7,), y)
        found, gradients = inputs.ours(lambda f, y=y: f(SAMPLED_KL) * logp[:, y].exp(), kernel=kernel)
        value += found
        total = [a + b for a, b in zip(total, gradients, strict=True)]
        if form == "logits":
            is_y = (torch.arange(29) == y).to(WIDE)
            closed = (logp.exp() * (logp - logq))[:, y, None] * (is_y - logp.exp())
            assert norm_error(gradients[0][:, :29], closed) < 1e-12
    expected, gradients = inputs.exact(lambda f: f(REVERSE))
    assert norm_error(value, expected) < 1e-11
    assert all(norm_error(ours, theirs) < 1e-11 for ours, theirs in zip(total, gradients, strict=True))


@pairwise(function=KINDS, support=SUPPORTS, form=FORMS, kernel=KERNELS)
def test_fp32(function, support, form, kernel):
    function = function.on(support, 100)
    inputs = Inputs(form, 12, 5000, 5056, width=32, dtype=torch.float32, scale=0.35, interpolation=0.25)
    check(inputs, inputs.weighted(function), 2e-6, tile_tokens=5, kernel=kernel)


@pairwise(function=SORTS, form=FORMS, kernel=KERNELS)
def test_bf16(function, form, kernel):
    # Products in fp32; 8300 columns are more than are upcast at a time.
    inputs = Inputs(form, 6, 8300, 8320, width=32, dtype=torch.bfloat16, scale=0.35, interpolation=0.25)
    if form == "logits":  # no ties among the top K
        for start, tensor in zip((0, 15, 15), (*inputs.student, *inputs.teacher_tensors), strict=True):
            tensor[:, :8300].clamp_(max=7)
            tensor[:, start : start + 40] = 8 + torch.arange(40) / 16
    check(inputs, inputs.weighted(function), 1e-5, 1e-2, tile_tokens=4, kernel=kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_and_dtypes_of_student_and_teacher_may_differ(dtype):
    logits, projection = (Inputs(form, 7, 60, 64, dtype=dtype) for form in FORMS)
    projection.teacher = InterpolatedLogits(logits.teacher, Logits(logits.student.logits), 0.5)
    check(projection, projection.weighted(JSD), 1e-5, 1e-2)
    logits.teacher = Projection(*(x.float() for x in projection.student))
    check(logits, logits.weighted(JSD), 1e-5, 1e-2)


@pairwise(
    form=FORMS,
    interpolation=[0.0, 0.3, 1.0],
    temperature=[1.0, 0.7],
    tile_tokens=[1, 3, None],
    ignores=[False, True],
)
def test_entropy_of_a_teacher_is_a_constant(form, interpolation, temperature, tile_tokens, ignores):
    inputs = Inputs(form, interpolation=interpolation)
    logits = full_logits(inputs.teacher, 29)
    expected = exact_vocab.entropy(torch.log_softmax(logits / temperature, -1))
    for tensor in inputs.teacher_tensors:
        tensor.requires_grad_()
    targets = None
    if ignores:
        targets = torch.tensor([1, IGNORED, 2, 3, 4, 5, IGNORED])
        expected = expected * (targets != IGNORED)
    options = {"targets": targets, "temperature": temperature, "tile_tokens": tile_tokens}
    found = functional.entropy(inputs.teacher, inputs.shard, **options)
    assert norm_error(found, expected) < 1e-11 and not found.requires_grad


@pairwise(function=SORTS[2:], form=FORMS, interpolation=[0.0, 1.0], is_broken=[False, True])
def test_interpolation_of_0_and_1(function, form, interpolation, is_broken):
    # The source with weight 0 may even hold -inf.
    inputs = Inputs(form, interpolation=interpolation)
    reference, policy, _ = inputs.teacher
    pure, spare = (reference, policy) if interpolation == 0 else (policy, reference)
    inputs.teacher = pure
    expected = inputs.ours(inputs.weighted(function))
    if is_broken:
        spare[-1][:, 1::2] = -math.inf
    pair = (pure, spare) if interpolation == 0 else (spare, pure)
    inputs.teacher = InterpolatedLogits(*pair, interpolation)
    torch.testing.assert_close(inputs.ours(inputs.weighted(function)), expected, rtol=0, atol=0)


@pairwise(function=SORTS[2:], form=FORMS, kernel=KERNELS, interpolation=[None, 0.3])
def test_no_gradient_flows_to_a_teacher(function, form, kernel, interpolation):
    inputs = Inputs(form, interpolation=interpolation)
    for tensor in inputs.teacher_tensors:
        tensor.requires_grad_()
    inputs.ours(inputs.weighted(function), kernel=kernel)
    assert all(tensor.grad is None for tensor in inputs.teacher_tensors)
    student = inputs.leaves()  # its own teacher: only the student's gradient, which is 0
    function.ours(student, student, inputs.targets, inputs.shard, kernel=kernel).sum().backward()
    assert all((x.grad == 0).all() for x in student)


def _ignoring(form, skipped, distilled, dtype=WIDE):
    """Return inputs in which `skipped` is ignored and all NaN, inputs without it, and the other tokens."""
    kept = [t for t in range(7) if t not in skipped]
    few = [t for t in kept if t < distilled]
    inputs, rest = (Inputs(form, distilled=distilled, dtype=dtype) for _ in range(2))
    field = rest.student._fields[0]
    rest.student = rest.student._replace(**{field: rest.student.tensor[kept]})
    rest.teacher = rest.teacher._replace(**{field: rest.teacher.tensor[few]})
    rest.targets, rest.upstream = rest.targets[kept], rest.upstream[kept]
    inputs.targets[skipped] = IGNORED
    for tensor in (inputs.student.tensor, inputs.teacher.tensor, inputs.upstream):
        tensor[[t for t in skipped if t < len(tensor)]] = math.nan
    return inputs, rest, kept


SKIPS = [[1, 4], [0, 1, 2, 3], list(range(7))]


@pairwise(
    function=SORTS, skipped=SKIPS, form=FORMS, kernel=KERNELS, distilled=[7, 4], dtype=[WIDE, torch.bfloat16]
)
def test_ignored_tokens(function, skipped, form, kernel, distilled, dtype):
    inputs, rest, kept = _ignoring(form, skipped, distilled, dtype)
    options = {"tile_tokens": 3, "kernel": kernel}
    value, _ = inputs.ours(lambda f: f(function), **options)
    weighted, gradients = inputs.ours(inputs.weighted(function), **options)
    expected, expected_gradients = rest.ours(rest.weighted(function), **options)
    is_kept = inputs.targets[: len(value)] != IGNORED
    assert (value[~is_kept] == 0).all() and (gradients[0][skipped] == 0).all()
    found = [weighted[is_kept], gradients[0][kept], *gradients[1:]]
    torch.testing.assert_close(found, [expected, *expected_gradients])


def _objective_on(inputs, divergence, kernel):
    """Return loss, gradients, statistics and the tokens of each tile of an objective."""
    tiles, c = [], inputs.upstream

    def objective(rows, tile):
        tiles.append(rows)
        loss = (c[rows] * tile.logprob.exp() * (1 + tile.entropy)).sum()
        return loss if tile.divergence is None else loss + (c[rows] * tile.divergence).square().sum()

    student = inputs.leaves()
    options = {"teacher": inputs.teacher, "divergence": divergence, "tile_tokens": 2, "kernel": kernel}
    loss, statistics = fused_objective(student, inputs.targets, objective, inputs.shard, **options)
    loss.backward()
    return loss.detach(), [x.grad for x in student], statistics, tiles


@pairwise(function=SORTS[2:], skipped=SKIPS, form=FORMS, kernel=KERNELS)
def test_ignored_tokens_of_an_objective(function, skipped, form, kernel):
    inputs, rest, kept = _ignoring(form, skipped, 4)
    loss, gradients, statistics, tiles = _objective_on(inputs, function.divergence, kernel)
    expected, expected_gradients, expected_statistics, _ = _objective_on(rest, function.divergence, kernel)
    assert all(isinstance(rows, torch.Tensor) for rows in tiles)
    assert sorted(t for rows in tiles for t in rows.tolist()) == kept
    assert (gradients[0][skipped] == 0).all()
    found = [loss, gradients[0][kept], *gradients[1:]]
    torch.testing.assert_close(found, [expected, *expected_gradients])
    for ours, theirs in zip(statistics, expected_statistics, strict=True):
        is_kept = inputs.targets[: len(ours)] != IGNORED
        assert (ours[~is_kept] == 0).all()
        torch.testing.assert_close(ours[is_kept], theirs)


def _extreme_logits():
    """Return logits of ±10⁴: mixed, all on one id (hot), on all but one (cold); and ordinary ones."""
    generator, ids = torch.Generator().manual_seed(1), torch.arange(20)
    return {
        "mixed": 1e4 * torch.randint(-1, 2, (20, 20), generator=generator) + ids / 32,
        "hot": torch.where(ids == ids[:, None] % 20, 1e4, 0.0) - (ids + 1) / 32,
        "hot elsewhere": torch.where(ids == ids[:, None] % 4, 1e4, 0.0) - (ids + 1) / 32,
        "cold": torch.where(ids == ids[:, None], -1e4, ids / 32),
        "plain": torch.randint(-40, 40, (20, 20), generator=generator) / 16 + ids / 1024,
    }


EXTREMES = _extreme_logits()


@pairwise(
    student=[name for name in EXTREMES if name != "hot elsewhere"],
    teacher=EXTREMES,
    function=[LOG_PROB, ENTROPY, SAMPLED_KL, *KINDS],
    support=SUPPORTS,
    dtype=[torch.float32, WIDE],
    kernel=KERNELS,
)
def test_huge_logits(student, teacher, function, support, dtype, kernel):
    if function in DIVERGENCES:
        function = function.on(support)
    inputs = Inputs("logits", 20, 20, 21, dtype=dtype)
    inputs.student.logits[:, :20], inputs.teacher.logits[:, :20] = EXTREMES[student], EXTREMES[teacher]
    value, (gradient,) = inputs.ours(inputs.weighted(function), kernel=kernel)
    expected, (expected_gradient,) = inputs.exact(inputs.weighted(function))
    assert value.isfinite().all() and gradient.isfinite().all()
    is_fp32_kl = function.name.endswith("kl") and dtype == torch.float32
    rounding = 2e-3 if is_fp32_kl else 1e-5  # a unit in the last place of 2·10⁴
    found = [value.to(WIDE), gradient.to(WIDE)]
    torch.testing.assert_close(found, [expected, expected_gradient], rtol=1e-5, atol=rounding)
    if function.name == "jsd":
        alpha = function.divergence.alpha
        largest = -(alpha * math.log(alpha) + (1 - alpha) * math.log(1 - alpha))
        value, _ = inputs.ours(lambda f: f(function), kernel=kernel)
        assert (value >= -1e-6).all() and (value <= largest * (1 + 1e-6)).all()


@pairwise(
    function=[JSD, *KINDS],
    support=SUPPORTS,
    form=FORMS,
    kernel=KERNELS,
    dtype=[torch.bfloat16, torch.float32, WIDE],
    scale=[0.6, 6.0],
    tile_tokens=[None, 1, 3],
)
def test_student_equal_to_teacher_has_value_and_gradient_zero(
    function, support, form, kernel, dtype, scale, tile_tokens
):
    function = function.on(support)
    inputs = Inputs(form, dtype=dtype, scale=scale)
    inputs.teacher = type(inputs.student)(*(x.clone() for x in inputs.student))
    options = {"tile_tokens": tile_tokens, "temperature": 0.7, "kernel": kernel}
    value, gradients = inputs.ours(inputs.weighted(function), **options)
    assert (value == 0).all() and all((x == 0).all() for x in gradients)


@pairwise(function=SORTS, kernel=KERNELS, dtype=[torch.float32, WIDE])
def test_ids_of_probability_0(function, kernel, dtype):
    # Columns of -inf, for the student, the teacher or both, as long as the divergence is finite.
    for of_student, of_teacher in (
        ([], [4, 5, 6, 7, 8]),
        ([3, 4, 5, 6], []),
        ([3, 4, 5, 6], [4, 5, 6, 7, 8]),
    ):
        _check_impossible(function, kernel, dtype, of_student, of_teacher)


def _check_impossible(function, kernel, dtype, of_student, of_teacher):
    is_infinite = {
        "forward_kl": set(of_student) - set(of_teacher),
        "reverse_kl": set(of_teacher) - set(of_student),
    }
    if is_infinite.get(function.name):
        of_student = of_teacher = [4, 5, 6]
    inputs, clear = Inputs("logits", dtype=dtype), Inputs("logits", dtype=dtype)
    inputs.targets = clear.targets = torch.tensor([0, 1, 2, 9, 10, 11, 28])
    for x, logit in ((inputs, -math.inf), (clear, -1e4)):
        x.student.logits[:, of_student] = x.teacher.logits[:, of_teacher] = logit
    value, (gradient,) = inputs.ours(inputs.weighted(function), tile_tokens=3, kernel=kernel)
    expected, (expected_gradient,) = clear.exact(clear.weighted(function))
    tolerance = 2e-6 if dtype == torch.float32 else 1e-11
    assert value.isfinite().all() and gradient.isfinite().all()
    assert norm_error(value, expected) <= tolerance and norm_error(gradient, expected_gradient) <= tolerance
    both = of_student
    if function not in (LOG_PROB, ENTROPY):
        both = [v for v in of_student if v in of_teacher]
    assert (gradient[:, both] == 0).all()


@pairwise(function=KINDS, support=SUPPORTS[1:], top_k=[2, 3, 28], kernel=KERNELS)
def test_head_that_holds_every_possible_id(function, support, top_k, kernel):
    # The tail bucket is empty, or the head has ids of probability 0.
    inputs = Inputs("logits")
    inputs.student.logits[:, 3:] = inputs.teacher.logits[:, 3:] = -math.inf
    inputs.targets %= 3
    full, (full_gradient,) = inputs.ours(inputs.weighted(function), kernel=kernel)
    value, (gradient,) = inputs.ours(inputs.weighted(function.on(support, top_k)), kernel=kernel)
    torch.testing.assert_close([value, gradient], [full, full_gradient], rtol=1e-11, atol=1e-13)
    assert (gradient[:, 3:] == 0).all()
