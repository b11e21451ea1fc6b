"""The fused pass against whole-matrix float64 autograd: values, statistics and both gradients."""

import math

import pytest
import torch
from exact import WIDE, divergence, entropy, log_softmax, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_srpo.vocab_parallel import fused
from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.fused import Statistics, fused_objective, score
from megatron_srpo.vocab_parallel.kernels.reference import ReferenceKernel
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Logits, Projection
from megatron_srpo.vocab_parallel.shard import VocabShard

KINDS = [
    Divergence("jsd", 0.5),
    Divergence("jsd", 0.2),
    Divergence("jsd", 0.9),
    Divergence("forward"),
    Divergence("reverse"),
]
KINDS += [
    kind._replace(support=support, top_k=6) for kind in KINDS for support in ("student_topk", "teacher_topk")
]
KINDS += [Divergence("reverse", support="sampled")]
JSD = Divergence()


@pytest.fixture(scope="module", params=["fastest", "reference"], autouse=True)
def kernel(request):
    """Every test runs with the kernel that is chosen for its inputs, and with the plain one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(
                fused,
                "_kernel",
                lambda tile_tokens, shard, divergence, own: ReferenceKernel(shard, divergence),
            )
        yield


class Problem:
    """T tokens, D of them distilled, and an objective that is not linear in what it is given."""

    def __init__(
        self, tokens=13, distilled=5, vocab_size=29, padded=32, width=8, seed=0, dtype=WIDE, scale=0.6
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, factor=1.0):
            return (factor * torch.randn(*shape, generator=generator, dtype=WIDE)).to(dtype)

        self.vocab_size, self.distilled = vocab_size, distilled
        self.hidden, self.weight = draw(tokens, width), draw(padded, width, factor=scale)
        self.teacher_hidden, self.teacher_weight = draw(distilled, width), draw(padded, width, factor=scale)
        self.weight[vocab_size:] = 50.0  # padded rows would win every softmax
        self.teacher_weight[vocab_size:] = 50.0
        self.targets = torch.randint(vocab_size, (tokens,), generator=generator)
        self.a, self.b, self.c = draw(tokens), draw(tokens), draw(tokens).abs()

    def objective(self, rows, tile):
        a, b, c = (x[rows].to(tile.logprob.dtype) for x in (self.a, self.b, self.c))
        loss = (a * tile.logprob + b * tile.logprob.exp() + a * b * tile.entropy).sum()
        return loss if tile.divergence is None else loss + (c * tile.divergence * (1 + tile.divergence)).sum()

    def fused(self, kind=JSD, temperature=1.0, tile_tokens=None, factor=1.0):
        """((loss, dHidden, dWeight), statistics) of the package."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        shard = VocabShard.of_rank(0, weight.shape[0], self.vocab_size, None)
        loss, statistics = fused_objective(
            Projection(hidden, weight),
            self.targets,
            self.objective,
            shard,
            teacher=Projection(self.teacher_hidden, self.teacher_weight) if self.distilled else None,
            divergence=kind,
            temperature=temperature,
            tile_tokens=tile_tokens,
        )
        (factor * loss).backward()
        return (loss.detach(), hidden.grad, weight.grad), statistics

    def exact(self, kind=JSD, temperature=1.0):
        """The same from float64 autograd."""
        hidden, weight = self.hidden.to(WIDE).requires_grad_(), self.weight.to(WIDE).requires_grad_()
        logp = log_softmax(hidden, weight, self.vocab_size, temperature)
        logq = log_softmax(
            self.teacher_hidden.to(WIDE), self.teacher_weight.to(WIDE), self.vocab_size, temperature
        )
        logprob = logp.gather(1, self.targets[:, None])[:, 0]
        h, border = entropy(logp), self.distilled
        d = divergence(logp[:border], logq, kind, self.targets[:border])
        loss = self.objective(slice(0, border), Statistics(logprob[:border], h[:border], d))
        loss = loss + self.objective(slice(border, None), Statistics(logprob[border:], h[border:], None))
        loss.backward()
        return (loss.detach(), hidden.grad, weight.grad), (logprob.detach(), h.detach(), d.detach())


def assert_close(found, expected, tolerance):
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_divergence(kind, temperature):
    problem = Problem()
    assert_close(problem.fused(kind, temperature, tile_tokens=4), problem.exact(kind, temperature), 1e-11)


@pytest.mark.parametrize("tokens, distilled", [(13, 0), (13, 13), (1, 0), (1, 1), (7, 1), (7, 6)])
@pytest.mark.parametrize("tile_tokens", [1, 3, 4, 100, None])
def test_tiles_and_shares_of_distilled_tokens(tokens, distilled, tile_tokens):
    problem = Problem(tokens, distilled)
    assert_close(problem.fused(tile_tokens=tile_tokens), problem.exact(), 1e-11)


def test_no_tokens_at_all():
    (loss, hidden_grad, weight_grad), statistics = Problem(0, 0).fused()
    assert loss.item() == 0 and hidden_grad.shape == (0, 8)
    assert weight_grad.shape == (32, 8) and weight_grad.abs().max() == 0
    assert [len(vector) for vector in statistics] == [0, 0, 0]


def test_teacher_of_no_tokens_is_no_teacher():
    """D = 0 may also come as tensors with no rows."""
    problem = Problem(5, 0)
    shard = VocabShard(0, 29, 29)
    empty = problem.hidden[:0]
    loss, statistics = fused_objective(
        Projection(problem.hidden, problem.weight),
        problem.targets,
        problem.objective,
        shard,
        teacher=Projection(empty, problem.weight),
    )
    assert loss.item() == pytest.approx(problem.exact()[0][0].item()) and statistics.divergence.shape == (0,)


@pytest.mark.parametrize("kind", [Divergence(), Divergence(support="student_topk", top_k=6)], ids=str)
def test_padded_rows_take_no_part(kind):
    problem = Problem()
    padded = problem.fused(kind)
    assert padded[0][2][problem.vocab_size :].abs().max() == 0
    problem.weight[problem.vocab_size :] = -7.0
    problem.teacher_weight[problem.vocab_size :] = 0.0
    for ours, theirs in zip(
        (*padded[0], *padded[1]), (lambda f: (*f[0], *f[1]))(problem.fused(kind)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_vocabulary_without_padding():
    problem = Problem(vocab_size=29, padded=29)
    assert_close(problem.fused(), problem.exact(), 1e-11)


@given(
    st.integers(0, 10**6),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(2, 12),
    st.integers(0, 3),
    st.integers(1, 5),
    st.sampled_from(KINDS),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.1, 1.0, 4.0]),
)
@settings(deadline=None, max_examples=60)
def test_any_shape(seed, tokens, distilled, vocab_size, padding, tile_tokens, kind, temperature, scale):
    problem = Problem(
        tokens, min(tokens, distilled), vocab_size, vocab_size + padding, seed=seed, scale=scale
    )
    found, expected = problem.fused(kind, temperature, tile_tokens), problem.exact(kind, temperature)
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_fp32_is_close_to_float64(kind):
    problem = Problem(64, 32, 500, 512, width=16, dtype=torch.float32)
    assert_close(problem.fused(kind, 1.0, tile_tokens=24), problem.exact(kind), 1e-5)


def test_statistics_of_fp32_are_close_to_float64_token_by_token():
    problem = Problem(64, 64, 500, 512, width=16, dtype=torch.float32)
    for ours, theirs in zip(problem.fused()[1], problem.exact()[1], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.to(WIDE), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind", [Divergence(), Divergence("reverse"), Divergence(support="student_topk", top_k=6)], ids=str
)
def test_bf16_inputs(kind):
    """Products in bf16, everything after them in fp32: close to float64 on the same rounded inputs."""
    problem = Problem(24, 12, 100, 112, width=16, dtype=torch.bfloat16)
    found, expected = problem.fused(kind), problem.exact(kind)
    assert [x.dtype for x in found[0]] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert all(x.dtype == torch.float32 for x in found[1])
    assert_close(found, expected, 0.03)


def test_gradient_follows_the_upstream_factor():
    problem = Problem()
    once, scaled = problem.fused()[0], problem.fused(factor=-2.5)[0]
    torch.testing.assert_close(scaled[1], -2.5 * once[1])
    torch.testing.assert_close(scaled[2], -2.5 * once[2])


def test_nothing_flows_to_the_teacher_or_out_of_the_statistics():
    problem = Problem()
    problem.teacher_hidden.requires_grad_()
    problem.teacher_weight.requires_grad_()
    _, statistics = problem.fused()
    assert problem.teacher_hidden.grad is None and problem.teacher_weight.grad is None
    assert not any(vector.requires_grad for vector in statistics)


def test_only_what_needs_a_gradient_gets_one():
    problem = Problem()
    hidden = problem.hidden.clone().requires_grad_()
    shard, summed = VocabShard(0, 29, 29), lambda rows, tile: tile.logprob.sum()
    loss, _ = fused_objective(Projection(hidden, problem.weight), problem.targets, summed, shard)
    loss.backward()
    logp = log_softmax(exact_hidden := problem.hidden.clone().requires_grad_(), problem.weight, 29)
    logp.gather(1, problem.targets[:, None]).sum().backward()
    torch.testing.assert_close(hidden.grad, exact_hidden.grad)
    with torch.no_grad():
        loss, _ = fused_objective(Projection(problem.hidden, problem.weight), problem.targets, summed, shard)
    assert not loss.requires_grad


def test_inputs_are_not_changed():
    problem = Problem()
    before = [
        x.clone()
        for x in (
            problem.hidden,
            problem.weight,
            problem.teacher_hidden,
            problem.teacher_weight,
            problem.targets,
        )
    ]
    problem.fused(temperature=0.5)
    after = (problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight, problem.targets)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [WIDE, torch.float32, torch.bfloat16])
def test_student_equal_to_teacher_has_nothing_to_learn(kind, dtype):
    """Exactly nothing, not a rounding's worth."""
    problem = Problem(9, 9, dtype=dtype)
    problem.teacher_hidden, problem.teacher_weight = problem.hidden.clone(), problem.weight.clone()
    problem.a.zero_()
    problem.b.zero_()
    (loss, hidden_grad, weight_grad), statistics = problem.fused(kind)
    for found in (loss, hidden_grad, weight_grad, statistics.divergence):
        assert found.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_extreme_logits_in_fp32(kind):
    """Logits of ±10⁴: finite, and the values of float64, within the rounding of the terms that cancel in
    each sum.
    """
    generator = torch.Generator().manual_seed(3)
    problem = Problem(12, 12, 20, 24, width=4, dtype=torch.float32)
    problem.weight[:20] = torch.randint(-3, 4, (20, 4), generator=generator).float()
    problem.teacher_weight[:20] = torch.randint(-3, 4, (20, 4), generator=generator).float()
    problem.hidden, problem.teacher_hidden = (
        1500 * problem.hidden.sign(),
        1500 * problem.teacher_hidden.sign(),
    )
    problem.weight[:20, 0] += torch.arange(20) / 64  # no ties among the top K
    problem.a.zero_()
    problem.b.zero_()
    assert (problem.hidden @ problem.weight[:20].t()).abs().max() > 1e4
    found, expected = problem.fused(kind), problem.exact(kind)
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert ours.isfinite().all()
        assert (ours.to(WIDE) - theirs).abs().max() <= 1e-6 * theirs.abs().max() + 1e-6


@pytest.mark.parametrize("dtype, tolerance", [(WIDE, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_score_agrees(dtype, tolerance, temperature):
    problem = Problem(dtype=dtype)
    shard = VocabShard.of_rank(0, 32, 29, None)
    found = score(
        Projection(problem.hidden.clone().requires_grad_(), problem.weight),
        problem.targets,
        shard,
        temperature=temperature,
    )
    (_, (logprob, entropies, _)) = problem.exact(temperature=temperature)
    assert (
        relative_error(found.logprob, logprob) < tolerance
        and relative_error(found.entropy, entropies) < tolerance
    )
    assert (
        found.divergence.shape == (0,) and not found.logprob.requires_grad and not found.entropy.requires_grad
    )
    if dtype == WIDE:
        fused = problem.fused(temperature=temperature)[1]
        torch.testing.assert_close(found.logprob, fused.logprob)
        torch.testing.assert_close(found.entropy, fused.entropy)


def test_score_of_several_tiles():
    problem, shard = Problem(50, 0), VocabShard(0, 29, 29)
    whole = score(Projection(problem.hidden, problem.weight), problem.targets, shard)
    tiled = score(
        Projection(problem.hidden, problem.weight), problem.targets, shard, memory=1
    )  # tiles of 16, the smallest
    for ours, theirs in zip(tiled, whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_score_of_nothing():
    problem = Problem(0, 0)
    assert [
        len(x)
        for x in score(Projection(problem.hidden, problem.weight), problem.targets, VocabShard(0, 29, 29))
    ] == [0, 0, 0]


def test_score_without_targets():
    """Its docstring: log-probabilities are zeros then; entropies are as ever."""
    problem, shard = Problem(), VocabShard(0, 29, 29)
    found = score(Projection(problem.hidden, problem.weight), None, shard)
    torch.testing.assert_close(
        found.entropy, score(Projection(problem.hidden, problem.weight), problem.targets, shard).entropy
    )
    assert found.logprob.tolist() == [0.0] * 13


def test_teacher_entropy_is_of_the_full_vocabulary():
    """Uniform teacher: H = log V, whatever the padding."""
    zeros = torch.zeros(3, 8)
    found = score(Projection(zeros, torch.ones(32, 8)), None, VocabShard(0, 29, 29))
    assert found.entropy.tolist() == pytest.approx([math.log(29)] * 3)


@pytest.mark.parametrize(
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


def arguments(**changes):
    """Arguments of `fused_objective` that fit, but for `changes`."""
    problem = Problem()
    given = {
        name: changes.pop(name, getattr(problem, name))
        for name in ("hidden", "weight", "teacher_hidden", "teacher_weight")
    }
    student, teacher = (
        Projection(given["hidden"], given["weight"]),
        Projection(given["teacher_hidden"], given["teacher_weight"]),
    )
    shard = VocabShard.of_rank(0, 32, 29, None)
    return {
        "student": student,
        "targets": problem.targets,
        "objective": problem.objective,
        "shard": shard,
        "teacher": teacher,
    } | changes


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden": torch.zeros(13, 7, dtype=WIDE)}, r"hidden \[13, 7\] and weight \[32, 8\]"),
        ({"hidden": torch.zeros(13, 1, 8, dtype=WIDE)}, r"hidden \[13, 1, 8\]"),
        ({"hidden": torch.zeros(13, 8)}, r"hidden \(torch.float32, cpu\) and weight \(torch.float64, cpu\)"),
        ({"weight": torch.zeros(32, 8, dtype=WIDE, device="meta")}, "weight .torch.float64, meta."),
        ({"targets": torch.zeros(12, dtype=torch.int64)}, r"targets \[12\].*expected \[13\] int64"),
        ({"targets": torch.zeros(13, dtype=torch.int32)}, r"torch.int32.*expected \[13\] int64"),
        ({"targets": torch.full((13,), 29)}, "ids from 29 to 29 at 13 places; the vocabulary has 29"),
        ({"targets": torch.full((13,), -1)}, "ids from -1 to -1"),
        ({"targets": None, "divergence": Divergence("reverse", support="sampled")}, "targets: None"),
        ({"divergence": Divergence("jsd", support="sampled")}, "jsd on sampled tokens"),
        ({"divergence": Divergence("jsd", 1.0)}, "alpha 1.0: expected"),
        ({"divergence": Divergence("kl")}, "'kl' on 'full': expected jsd"),
        ({"divergence": Divergence(support="student_topk", top_k=0)}, "top_k 0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"shard": VocabShard(0, 33, 40)}, "does not fit weight of 32 rows"),
        ({"shard": VocabShard(0, 20, 29)}, "holds 20 of 29 ids, but there is no process group"),
        ({"weight_grad": torch.zeros(31, 8, dtype=WIDE)}, r"weight_grad \[31, 8\].*expected \[32, 8\]"),
        ({"weight_grad": torch.zeros(32, 8)}, r"weight_grad \[32, 8\] \(torch.float32"),
        ({"student": Logits(torch.zeros(13, 28, dtype=WIDE))}, "does not fit logits of 28 columns"),
        ({"student": Logits(torch.zeros(13, 32, dtype=torch.int64))}, "floating-point"),
        (
            {"teacher": InterpolatedLogits(Logits(torch.zeros(5, 32)), Logits(torch.zeros(6, 32)), 0.5)},
            "5 tokens .* and 6 tokens",
        ),
        (
            {"teacher": InterpolatedLogits(Logits(torch.zeros(5, 32)), Logits(torch.zeros(5, 32)), 1.5)},
            "teacher.share 1.5",
        ),
        ({"teacher": Logits(torch.zeros(5, 32))}, "teacher of 5 tokens .torch.float32"),
        ({"shard": VocabShard(20, 10, 29)}, "or its own vocabulary"),
        ({"teacher_hidden": torch.zeros(14, 8, dtype=WIDE)}, "teacher of 14 tokens.*at most 13"),
        (
            {"teacher_weight": torch.zeros(28, 7, dtype=WIDE)},
            r"teacher.hidden \[5, 8\] and teacher.weight \[28, 7\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        fused_objective(**arguments(**changes))
