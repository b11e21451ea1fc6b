"""Each function of the family against float64 autograd over whole logits, for logits and for projections,
with both kernels.
"""

import itertools
import math
from typing import NamedTuple

import exact
import pytest
import torch
from exact import WIDE
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_srpo.vocab_parallel import functional, fused
from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.fused import IGNORED, fused_objective
from megatron_srpo.vocab_parallel.kernels.reference import ReferenceKernel
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Logits, Projection
from megatron_srpo.vocab_parallel.shard import VocabShard, accumulation_dtype

FORMS = ("logits", "projection")
BOTH_FORMS = pytest.mark.parametrize("form", FORMS)


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


class Member(NamedTuple):
    """One function of the family with its options, and the same by autograd."""

    name: str
    kind: Divergence = Divergence()

    def ours(self, student, teacher, targets, shard, **options):
        """[T] or [D] of the package."""
        if self.name == "log_prob":
            return functional.log_prob(student, targets, shard, **options)
        if self.kind.support == "sampled" or (targets == IGNORED).any():
            options["targets"] = targets
        if self.name == "entropy":
            return functional.entropy(student, shard, **options)
        if self.kind.name == "jsd":
            options["alpha"] = self.kind.alpha
        return getattr(functional, self.name)(
            student, teacher, shard, support=self.kind.support, top_k=self.kind.top_k, **options
        )

    def exact(self, logp, logq, targets):
        """The same from whole log-probabilities."""
        if self.name == "log_prob":
            return logp.gather(1, targets[:, None])[:, 0]
        if self.name == "entropy":
            return exact.entropy(logp)
        return exact.divergence(logp[: len(logq)], logq, self.kind, targets[: len(logq)])

    def on(self, support, top_k):
        """The same divergence on another support."""
        return self._replace(kind=self.kind._replace(support=support, top_k=top_k))

    def __str__(self):
        kind = self.kind
        return (
            self.name
            if self.name in ("log_prob", "entropy")
            else f"{self.name}-{kind.alpha}-{kind.support}-{kind.top_k}"
        )


def _members(*top_ks):
    kinds = [Member("jsd", Divergence("jsd", alpha)) for alpha in (0.2, 0.5, 0.9)]
    kinds += [Member("forward_kl", Divergence("forward")), Member("reverse_kl", Divergence("reverse"))]
    supports = list(itertools.product(("student_topk", "teacher_topk"), top_ks))
    kinds += [x.on(support, k) for x in kinds for support, k in supports]
    return [*kinds, Member("reverse_kl", Divergence("reverse", support="sampled"))]


DIVERGENCES = _members(6)
STATISTICS = [Member("log_prob"), Member("entropy")]
ALL = STATISTICS + DIVERGENCES
HALF = Member("jsd")


def each(members):
    """A test of every one of these, in both forms."""
    return lambda test: BOTH_FORMS(pytest.mark.parametrize("member", members, ids=str)(test))


class Inputs:
    """T tokens' student and teacher in one form, huge, infinite and NaN where columns are padded."""

    def __init__(
        self,
        form,
        tokens=7,
        vocab_size=29,
        padded=32,
        width=6,
        dtype=WIDE,
        scale=0.6,
        distilled=None,
        share=None,
    ):
        generator, padding = (
            torch.Generator().manual_seed(0),
            torch.tensor([1e30, math.inf, math.nan] * padded)[: padded - vocab_size],
        )
        self.form, self.vocab_size, self.shard = form, vocab_size, VocabShard(0, vocab_size, vocab_size)
        distilled = tokens if distilled is None else distilled

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=WIDE)

        def source(tokens):
            if form == "logits":
                logits = 2 * draw(tokens, padded)
                logits[:, vocab_size:] = padding
                return Logits(logits.to(dtype))
            hidden, weight = draw(tokens, width), scale * draw(padded, width)
            weight[vocab_size:] = padding[:, None]
            return Projection(hidden.to(dtype), weight.to(dtype))

        self.student, self.teacher = source(tokens), source(distilled)
        if share is not None:
            self.teacher = InterpolatedLogits(self.teacher, source(distilled), share)
        self.targets, self.upstream = torch.randint(vocab_size, (tokens,), generator=generator), draw(tokens)

    @property
    def teacher_tensors(self):
        """All tensors of the teacher's."""
        return [
            x
            for source in (
                self.teacher[:2] if isinstance(self.teacher, InterpolatedLogits) else [self.teacher]
            )
            for x in source
        ]

    def leaves(self, dtype=None):
        """The student as new leaves that want gradients."""
        return type(self.student)(
            *(x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in self.student)
        )

    def ours(self, loss, **options):
        """loss(f) where f(member) is that member's values, and the gradients to the student's tensors."""
        student = self.leaves()
        value = loss(lambda member: member.ours(student, self.teacher, self.targets, self.shard, **options))
        value.sum().backward()
        return value.detach(), [x.grad for x in student]

    def exact(self, loss, temperature=1.0):
        """The same in float64."""
        student = self.leaves(WIDE)
        logp, logq = (
            torch.log_softmax(whole(x, self.vocab_size) / temperature, -1) for x in (student, self.teacher)
        )
        value = loss(lambda member: member.exact(logp, logq.detach(), self.targets))
        value.sum().backward()
        return value.detach(), [x.grad for x in student]

    def weighted(self, member):
        """A loss of this member alone, each token with its own upstream gradient."""
        return lambda f: (values := f(member)) * self.upstream[: len(values)].to(values.dtype)


def whole(source, vocab_size):
    """[T, V] float64 logits without the padded columns."""
    if isinstance(source, InterpolatedLogits):
        return (1 - source.share) * whole(source.reference, vocab_size) + source.share * whole(
            source.policy, vocab_size
        )
    if isinstance(source, Logits):
        return source.logits[:, :vocab_size].to(WIDE)
    return source.hidden.to(WIDE) @ source.weight[:vocab_size].to(WIDE).t()


def error(found, expected):
    """Norm of the difference, relative to the expected norm."""
    assert found.shape == expected.shape
    return (
        ((found.to(WIDE) - expected).norm() / expected.norm().clamp(min=1e-300)).item()
        if expected.numel()
        else 0.0
    )


def check(inputs, loss, tolerance, gradient_tolerance=None, temperature=1.0, **options):
    """Our loss(f), a vector, and its gradients against float64, and exactly no gradient where columns are
    padded.
    """
    value, gradients = inputs.ours(loss, temperature=temperature, **options)
    exact_value, exact_gradients = inputs.exact(loss, temperature)
    assert (
        value.dtype == accumulation_dtype(inputs.student.tensor.dtype)
        and error(value, exact_value) <= tolerance
    )
    for ours, theirs, tensor in zip(gradients, exact_gradients, inputs.student, strict=True):
        assert ours.dtype == tensor.dtype
        assert error(ours, theirs) <= (gradient_tolerance or tolerance)
    padded = (
        gradients[0][:, inputs.vocab_size :] if inputs.form == "logits" else gradients[1][inputs.vocab_size :]
    )
    assert (padded == 0).all()


@each(STATISTICS + _members(1, 6, 28))
def test_value_and_gradient(member, form):
    for temperature, tile_tokens, share in (
        (1.0, None, None),
        (0.7, 3, 0.3),
        (1.0, 1, 0.3),
        (0.7, 1, None),
        (1.0, 3, None),
    ):
        inputs = Inputs(form, share=share)
        check(inputs, inputs.weighted(member), 1e-11, temperature=temperature, tile_tokens=tile_tokens)
    check(inputs := Inputs(form, tokens=0), inputs.weighted(member), 0)


@each(DIVERGENCES)
def test_teacher_of_the_first_tokens_only(member, form):
    for distilled, tile_tokens in itertools.product((0, 1, 4), (1, 3, None)):
        inputs = Inputs(form, distilled=distilled, share=0.4)
        check(inputs, inputs.weighted(member), 1e-11, tile_tokens=tile_tokens)


EXPRESSIONS = {
    "log_prob.exp * jsd": lambda f: f(STATISTICS[0]).exp() * f(HALF),
    "clipped": lambda f: (
        torch.minimum(r := (f(STATISTICS[0]) + 3.3).exp(), r.clamp(0.8, 1.2)) - 0.1 * f(STATISTICS[1])
    ),
    "gated": lambda f: (
        f(DIVERGENCES[3]) * torch.sigmoid(f(DIVERGENCES[4]) - 1) + f(DIVERGENCES[1]).sqrt() / f(STATISTICS[1])
    ),
    "one twice": lambda f: f(HALF) * f(HALF) - f(HALF).log(),
}


@BOTH_FORMS
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_inside_expressions(expression, form):
    check(Inputs(form), EXPRESSIONS[expression], 1e-11, temperature=0.7, tile_tokens=3)


@each(DIVERGENCES[:5])
def test_all_of_the_vocabulary_is_the_full_support(member, form):
    inputs = Inputs(form)
    full = inputs.ours(inputs.weighted(member))
    for support, top_k in itertools.product(("student_topk", "teacher_topk"), (29, 30, 1000)):
        found = inputs.ours(inputs.weighted(member.on(support, top_k)))
        torch.testing.assert_close(found, full, rtol=1e-12, atol=1e-13)


@BOTH_FORMS
def test_samples_are_unbiased(form):
    """Over all y, each with its probability, value and gradient of one sample are those of the exact reverse
    KL.
    """
    sampled, inputs = DIVERGENCES[-1], Inputs(form)
    logp, logq = (torch.log_softmax(whole(x, 29), -1) for x in (inputs.student, inputs.teacher))
    value, total = torch.zeros(7, dtype=WIDE), [torch.zeros_like(x) for x in inputs.student]
    for y in range(29):
        inputs.targets = torch.full((7,), y)
        found, gradients = inputs.ours(lambda f, y=y: f(sampled) * logp[:, y].exp())
        value += found
        total = [a + b for a, b in zip(total, gradients, strict=True)]
        if form == "logits":
            closed = (logp.exp() * (logp - logq))[:, y, None] * (1.0 * (torch.arange(29) == y) - logp.exp())
            assert error(gradients[0][:, :29], closed) < 1e-12
    expected, gradients = inputs.exact(lambda f: f(DIVERGENCES[4]))
    assert error(value, expected) < 1e-11
    assert all(error(ours, theirs) < 1e-11 for ours, theirs in zip(total, gradients, strict=True))


@each(STATISTICS + _members(100))
def test_fp32(member, form):
    inputs = Inputs(form, 12, 5000, 5056, width=32, dtype=torch.float32, scale=0.35, share=0.25)
    check(inputs, inputs.weighted(member), 2e-6, tile_tokens=5)


@each(STATISTICS + _members(20))
def test_bf16(member, form):
    """Products in fp32; 8300 columns are more than are upcast at a time."""
    inputs = Inputs(form, 6, 8300, 8320, width=32, dtype=torch.bfloat16, scale=0.35, share=0.25)
    if form == "logits":  # no ties among the top K: which of those that tie would be anyone's guess
        for start, tensor in zip((0, 15, 15), (*inputs.student, *inputs.teacher_tensors), strict=True):
            tensor[:, :8300].clamp_(max=7)
            tensor[:, start : start + 40] = 8 + torch.arange(40) / 16
    check(inputs, inputs.weighted(member), 1e-5, 1e-2, tile_tokens=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_and_dtypes_of_student_and_teacher_may_differ(dtype):
    logits, projection = (Inputs(form, 7, 60, 64, dtype=dtype) for form in FORMS)
    projection.teacher = InterpolatedLogits(logits.teacher, Logits(logits.student.logits), 0.5)
    check(projection, projection.weighted(HALF), 1e-5, 1e-2)
    logits.teacher = Projection(*(x.float() for x in projection.student))
    check(logits, logits.weighted(HALF), 1e-5, 1e-2)


@BOTH_FORMS
def test_entropy_of_teachers_is_a_constant(form):
    some = torch.tensor([1, IGNORED, 2, 3, 4, 5, IGNORED])
    for share, temperature, tile_tokens in itertools.product((0.0, 0.3, 1.0), (1.0, 0.7), (1, 3, None)):
        inputs, options = Inputs(form, share=share), {"temperature": temperature, "tile_tokens": tile_tokens}
        expected = exact.entropy(torch.log_softmax(whole(inputs.teacher, 29) / temperature, -1))
        for tensor in inputs.teacher_tensors:
            tensor.requires_grad_()
        for targets, is_kept in ((None, 1), (some, some != IGNORED)):
            found = functional.entropy(inputs.teacher, inputs.shard, targets=targets, **options)
            assert error(found, expected * is_kept) < 1e-11 and not found.requires_grad


@each(DIVERGENCES)
def test_shares_of_nothing_and_of_all(member, form):
    inputs = Inputs(form, share=0.0)
    reference, policy, _ = inputs.teacher
    for share, pure, other in ((0.0, reference, policy), (1.0, policy, reference)):
        broken = type(other)(*(x.clone() for x in other))
        broken[-1][:, 1::2] = -math.inf
        inputs.teacher = pure
        expected = inputs.ours(inputs.weighted(member))
        for spare in (other, broken):
            inputs.teacher = (
                InterpolatedLogits(pure, spare, share)
                if share == 0
                else InterpolatedLogits(spare, pure, share)
            )
            torch.testing.assert_close(inputs.ours(inputs.weighted(member)), expected, rtol=0, atol=0)


@each(DIVERGENCES)
def test_nothing_flows_to_a_teacher(member, form):
    for share in (None, 0.3):
        inputs = Inputs(form, share=share)
        for tensor in inputs.teacher_tensors:
            tensor.requires_grad_()
        inputs.ours(inputs.weighted(member))
        assert all(tensor.grad is None for tensor in inputs.teacher_tensors)
    student = inputs.leaves()  # its own teacher: the student's part alone, which is nothing
    member.ours(student, student, inputs.targets, inputs.shard).sum().backward()
    assert all((x.grad == 0).all() for x in student)


def ignoring(form, skipped, distilled, dtype=WIDE):
    """Inputs where these tokens are ignored and everything of theirs is NaN, inputs without them, and the
    other tokens.
    """
    kept, few = [t for t in range(7) if t not in skipped], [t for t in range(distilled) if t not in skipped]
    inputs, rest = (Inputs(form, distilled=distilled, dtype=dtype) for _ in range(2))
    field = rest.student._fields[0]
    rest.student, rest.teacher = (
        x._replace(**{field: x.tensor[rows]}) for x, rows in ((rest.student, kept), (rest.teacher, few))
    )
    rest.targets, rest.upstream = rest.targets[kept], rest.upstream[kept]
    inputs.targets[skipped] = IGNORED
    for tensor in (inputs.student.tensor, inputs.teacher.tensor, inputs.upstream):
        tensor[[t for t in skipped if t < len(tensor)]] = math.nan
    return inputs, rest, kept


SKIPS = [[1, 4], [0, 6], [0, 1, 2, 3], list(range(1, 7)), list(range(7))]


@each(ALL)
@pytest.mark.parametrize("distilled", [7, 4])
def test_ignored_tokens(member, form, distilled):
    for skipped, dtype in itertools.product(SKIPS, (WIDE, torch.bfloat16)):
        inputs, rest, kept = ignoring(form, skipped, distilled, dtype)
        value, _ = inputs.ours(lambda f: f(member), tile_tokens=3)
        weighted, gradients = inputs.ours(inputs.weighted(member), tile_tokens=3)
        expected, expected_gradients = rest.ours(rest.weighted(member), tile_tokens=3)
        is_kept = inputs.targets[: len(value)] != IGNORED
        assert (value[~is_kept] == 0).all() and (gradients[0][skipped] == 0).all()
        torch.testing.assert_close(
            [weighted[is_kept], gradients[0][kept], *gradients[1:]], [expected, *expected_gradients]
        )


@BOTH_FORMS
@pytest.mark.parametrize("kind", [x.kind for x in DIVERGENCES], ids=str)
def test_ignored_tokens_of_an_objective(kind, form):
    def run(inputs):
        seen, c = [], inputs.upstream

        def objective(rows, tile):
            seen.append(rows)
            loss = (c[rows] * tile.logprob.exp() * (1 + tile.entropy)).sum()
            return loss if tile.divergence is None else loss + (c[rows] * tile.divergence).square().sum()

        student = inputs.leaves()
        options = {"teacher": inputs.teacher, "divergence": kind, "tile_tokens": 2}
        loss, statistics = fused_objective(student, inputs.targets, objective, inputs.shard, **options)
        loss.backward()
        return loss.detach(), [x.grad for x in student], statistics, seen

    for skipped in SKIPS:
        inputs, rest, kept = ignoring(form, skipped, 4)
        loss, gradients, statistics, seen = run(inputs)
        expected, expected_gradients, expected_statistics, _ = run(rest)
        assert (
            all(isinstance(rows, torch.Tensor) for rows in seen)
            and sorted(t for rows in seen for t in rows.tolist()) == kept
        )
        assert (gradients[0][skipped] == 0).all()
        torch.testing.assert_close(
            [loss, gradients[0][kept], *gradients[1:]], [expected, *expected_gradients]
        )
        for ours, theirs in zip(statistics, expected_statistics, strict=True):
            is_kept = inputs.targets[: len(ours)] != IGNORED
            assert (ours[~is_kept] == 0).all()
            torch.testing.assert_close(ours[is_kept], theirs)


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
@pytest.mark.parametrize("member", ALL, ids=str)
def test_huge_logits(member, dtype):
    """±10⁴, any mixture of such, and all of it on one id, the same or another than the other side's."""
    generator, ids = torch.Generator().manual_seed(1), torch.arange(20)
    mixed = [
        1e4 * torch.randint(-1, 2, (20, 20), generator=generator) + (ids - offset) / 32 for offset in (0, 7)
    ]
    hot = [torch.where(ids == ids[:, None] % k, 1e4, 0.0) - (ids + 1) / 32 for k in (20, 4)]
    cold = torch.where(ids == ids[:, None], -1e4, ids / 32)
    plain = torch.randint(-40, 40, (20, 20), generator=generator) / 16 + ids / 1024
    for student, teacher in itertools.product((*mixed, *hot, cold, plain), repeat=2):
        inputs = Inputs("logits", 20, 20, 21, dtype=dtype)
        inputs.student.logits[:, :20], inputs.teacher.logits[:, :20] = student, teacher
        (value, (gradient,)), (exact_value, (exact_gradient,)) = (
            how(inputs.weighted(member)) for how in (inputs.ours, inputs.exact)
        )
        assert value.isfinite().all() and gradient.isfinite().all()
        rounding = (
            2e-3 if member.name.endswith("kl") and dtype == torch.float32 else 1e-5
        )  # a unit in the last place of 2·10⁴
        torch.testing.assert_close(
            [value.to(WIDE), gradient.to(WIDE)], [exact_value, exact_gradient], rtol=1e-5, atol=rounding
        )
        if member.name == "jsd":
            alpha = member.kind.alpha
            most = -(alpha * math.log(alpha) + (1 - alpha) * math.log(1 - alpha))
            found = inputs.ours(lambda f: f(member))[0]
            assert (
                (found >= -1e-6).all()
                and (found <= most * (1 + 1e-6)).all()
                and (alpha != 0.5 or most == math.log(2))
            )


@each(_members(1, 6, 28))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, WIDE])
def test_nothing_to_learn_from_oneself(member, dtype, form):
    """Exactly 0, in value and gradient."""
    for scale, tile_tokens in ((0.6, None), (0.6, 3), (6.0, 1), (6.0, 3)):
        inputs = Inputs(form, dtype=dtype, scale=scale)
        inputs.teacher = type(inputs.student)(*(x.clone() for x in inputs.student))
        value, gradients = inputs.ours(inputs.weighted(member), tile_tokens=tile_tokens, temperature=0.7)
        assert (value == 0).all() and all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (WIDE, 1e-11)])
@pytest.mark.parametrize("member", ALL, ids=str)
def test_ids_that_cannot_be_chosen(member, dtype, tolerance):
    """Columns of -inf, for the student, the teacher or both, as long as the divergence is finite."""
    infinite = {"forward_kl": lambda p, q: set(p) - set(q), "reverse_kl": lambda p, q: set(q) - set(p)}.get(
        member.name, lambda p, q: 0
    )
    for of_student, of_teacher in itertools.product(([], [3, 4, 5, 6]), ([], [4, 5, 6, 7, 8])):
        if infinite(of_student, of_teacher):
            of_student = of_teacher = [4, 5, 6]
        inputs, clear = Inputs("logits", dtype=dtype), Inputs("logits", dtype=dtype)
        inputs.targets = clear.targets = torch.tensor([0, 1, 2, 9, 10, 11, 28])
        for x, impossible in ((inputs, -math.inf), (clear, -1e4)):
            x.student.logits[:, of_student] = x.teacher.logits[:, of_teacher] = impossible
        value, (gradient,) = inputs.ours(inputs.weighted(member), tile_tokens=3)
        expected, (expected_gradient,) = clear.exact(clear.weighted(member))
        assert value.isfinite().all() and gradient.isfinite().all()
        assert error(value, expected) <= tolerance and error(gradient, expected_gradient) <= tolerance
        both = of_student if member in STATISTICS else [v for v in of_student if v in of_teacher]
        assert (gradient[:, both] == 0).all()


@pytest.mark.parametrize("support", ["student_topk", "teacher_topk"])
@pytest.mark.parametrize("top_k", [2, 3, 4, 28])
def test_a_head_that_holds_all_that_can_be_chosen(support, top_k):
    """The tail bucket is empty, or the head has ids of probability 0."""
    inputs = Inputs("logits")
    inputs.student.logits[:, 3:] = inputs.teacher.logits[:, 3:] = -math.inf
    inputs.targets %= 3
    for member in DIVERGENCES[:5]:
        full, (full_gradient,) = inputs.ours(inputs.weighted(member))
        value, (gradient,) = inputs.ours(inputs.weighted(member.on(support, top_k)))
        torch.testing.assert_close([value, gradient], [full, full_gradient], rtol=1e-11, atol=1e-13)
        assert (gradient[:, 3:] == 0).all()


@each([x for x in STATISTICS + _members(2) if x.kind.support != "sampled"])
def test_gradcheck(member, form):
    inputs = Inputs(form, 3, 5, 6, width=2, share=0.3)
    source, options = type(inputs.student), {"temperature": 0.8, "tile_tokens": 2}
    tensors = [
        x.nan_to_num(1.0, 1.0, -1.0).clamp(-5, 5) for x in inputs.student
    ]  # finite differences of padded columns too

    def values(*tensors):
        return member.ours(source(*tensors), inputs.teacher, inputs.targets, inputs.shard, **options)

    assert torch.autograd.gradcheck(values, [x.requires_grad_() for x in tensors])


@each(ALL)
def test_one_graph_can_be_differentiated_again_but_not_twice_over(member, form):
    inputs = Inputs(form)
    student = inputs.leaves()
    value = inputs.weighted(member)(
        lambda x: x.ours(student, inputs.teacher, inputs.targets, inputs.shard, tile_tokens=3)
    ).sum()
    once, again = (torch.autograd.grad(value, tuple(student), retain_graph=True) for _ in range(2))
    third = torch.autograd.grad(-2.0 * value, tuple(student), retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
    torch.testing.assert_close([-2.0 * x for x in once], list(third))
    for loss in (value, value.square()):
        with pytest.raises(RuntimeError):
            gradients = torch.autograd.grad(loss, tuple(student), retain_graph=True, create_graph=True)
            sum(x.square().sum() for x in gradients).backward()


@each([*STATISTICS, HALF])
def test_a_penalty_on_gradients_is_not_dropped_in_silence(member, form):
    inputs = Inputs(form)
    student = inputs.leaves()
    value = member.ours(student, inputs.teacher, inputs.targets, inputs.shard).sum()
    with pytest.raises(RuntimeError):
        gradients = torch.autograd.grad(value, tuple(student), create_graph=True)
        (value + sum(x.square().sum() for x in gradients)).backward()


@pytest.mark.parametrize("changed", ["student", "teacher", "targets"])
def test_what_backward_reads_cannot_change_before_it_in_silence(changed):
    """As with torch's own functions: buffers are reused between forward and backward, by mistake."""
    inputs = Inputs("projection")
    student = inputs.leaves()
    value = sum(member.ours(student, inputs.teacher, inputs.targets, inputs.shard).sum() for member in ALL)
    with torch.no_grad():
        {"student": student.hidden, "teacher": inputs.teacher.hidden, "targets": inputs.targets}[
            changed
        ].zero_()
    with pytest.raises(RuntimeError):
        value.backward()


def test_an_objective_cannot_be_differentiated_again_in_silence():
    """Its gradients are made once and given away: what cannot be had is a RuntimeError, never a wrong
    gradient.
    """
    inputs = Inputs("projection")

    def loss_of(student):
        return fused_objective(
            student, inputs.targets, lambda rows, tile: tile.logprob.exp().sum(), inputs.shard
        )[0]

    loss = loss_of(inputs.leaves())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()
    gradients = torch.autograd.grad(
        loss_of(student := inputs.leaves()).square(), tuple(student), create_graph=True
    )
    with pytest.raises(RuntimeError):
        sum(x.square().sum() for x in gradients).backward()


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("member", ALL, ids=str)
def test_nothing_of_tokens_times_vocabulary_is_made(member):
    inputs = Inputs("projection", tokens=250, vocab_size=3000, padded=3008, share=0.3)
    with _Largest() as largest:
        inputs.ours(inputs.weighted(member), tile_tokens=10)
    assert 0 < largest.elements < 250 * 3000 / 1.5


@BOTH_FORMS
def test_strides_do_not_matter_and_inputs_are_left_alone(form):
    inputs = Inputs(form, share=0.3)
    tensors = [*inputs.student, *inputs.teacher_tensors, inputs.targets]
    before = [x.clone() for x in tensors]
    for member in ALL:
        expected = inputs.ours(inputs.weighted(member), tile_tokens=3)
        student = type(inputs.student)(*(x.t().contiguous().t().requires_grad_() for x in inputs.student))
        value = inputs.weighted(member)(
            lambda x, s=student: x.ours(s, inputs.teacher, inputs.targets, inputs.shard, tile_tokens=3)
        )
        value.sum().backward()
        torch.testing.assert_close(
            (value.detach(), [x.grad for x in student]), expected, rtol=1e-11, atol=1e-13
        )
    torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_straight_into_a_buffer(dtype):
    inputs, before = Inputs("projection", dtype=dtype), torch.randn(32, 6)

    def run(**more):
        objective = lambda rows, tile: (
            inputs.upstream[rows].float() * tile.logprob.exp() + tile.divergence
        ).sum()  # noqa: E731
        options = {"teacher": inputs.teacher, "tile_tokens": 3}
        return fused_objective(
            student := inputs.leaves(), inputs.targets, objective, inputs.shard, **options, **more
        )[0], student

    (loss, plain), buffer = run(), before.clone()
    loss.backward()
    for micro_batches in (1, 2):
        same_loss, student = run(weight_grad=buffer)
        same_loss.backward()
        assert (
            student.weight.grad is None
            and torch.equal(student.hidden.grad, plain.hidden.grad)
            and torch.equal(loss, same_loss)
        )
        assert torch.equal(buffer[29:], before[29:])
        expected = micro_batches * plain.weight.grad.to(WIDE)
        assert error(buffer - before, expected) < (1e-5 if dtype == torch.float32 else 5e-3)
    for factor in (0.5, -1.0, 0.0):
        with pytest.raises(RuntimeError):
            (factor * run(weight_grad=before.clone())[0]).backward()


GOOD, SHARD, THREE = Logits(torch.zeros(3, 8)), VocabShard(0, 7, 7), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: functional.log_prob(GOOD, THREE[:2], SHARD), r"targets \[2\].*expected \[3\] int64"),
        (lambda: functional.log_prob(GOOD, THREE + 7, SHARD), "targets: ids from 7 to 7 at 3 places"),
        (lambda: functional.log_prob(GOOD, THREE - 1, SHARD), "targets: ids from -1"),
        (lambda: functional.log_prob(GOOD, None, SHARD), "targets"),
        (lambda: functional.log_prob(GOOD, THREE, VocabShard(0, 6, 7)), "shard: holds 6 of 7"),
        (lambda: functional.entropy(GOOD, SHARD, temperature=-1.0), "temperature -1.0"),
        (
            lambda: functional.entropy(InterpolatedLogits(GOOD, Logits(torch.zeros(2, 8)), 0.5), SHARD),
            "reference and .*policy",
        ),
        (lambda: functional.reverse_kl(GOOD, GOOD, SHARD, support="sampled"), "targets: None"),
        (
            lambda: functional.forward_kl(GOOD, GOOD, SHARD, support="sampled", targets=THREE),
            "forward on sampled",
        ),
        (lambda: functional.jsd(GOOD, GOOD, SHARD, alpha=0.0), "alpha 0.0"),
        (lambda: functional.jsd(GOOD, GOOD, SHARD, support="teacher_topk", top_k=0), "top_k 0"),
        (lambda: functional.jsd(GOOD, Logits(torch.zeros(4, 8)), SHARD), "teacher of 4 tokens.*at most 3"),
        (
            lambda: functional.jsd(GOOD, InterpolatedLogits(GOOD, Logits(torch.zeros(3, 5)), 0.5), SHARD),
            "teacher.policy of 5 columns",
        ),
        (lambda: functional.jsd(GOOD, None, SHARD), "teacher"),
    ],
)
def test_what_does_not_fit_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
