"""Make inputs for tests of megatron_srpo.vocab_parallel, and their results by float64 autograd."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import exact_vocab
import pytest
import torch
from exact_vocab import WIDE, largest_error, norm_error

from megatron_srpo.vocab_parallel import functional
from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.fused import IGNORED, Statistics, fused_objective
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Logits, Projection
from megatron_srpo.vocab_parallel.shard import VocabShard, accumulation_dtype

FORMS = ("logits", "projection")
KERNELS = ("cpu", "reference")
SUPPORTS = ("full", "student_topk", "teacher_topk")
FULL = [
    Divergence("jsd", 0.5),
    Divergence("jsd", 0.2),
    Divergence("jsd", 0.9),
    Divergence("forward"),
    Divergence("reverse"),
]
SAMPLED = Divergence("reverse", support="sampled")


class FusedCase:
    """Hold T tokens, D of them distilled, and an objective that is not linear in the statistics."""

    def __init__(
        self, tokens=13, distilled=5, vocab_size=29, padded=32, width=8, seed=0, dtype=WIDE, scale=0.6
    ):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype
        self.vocab_size, self.distilled = vocab_size, distilled
        self.hidden, self.weight = self._draw(tokens, width), self._draw(padded, width, factor=scale)
        self.teacher_hidden = self._draw(distilled, width)
        self.teacher_weight = self._draw(padded, width, factor=scale)
        self.weight[vocab_size:] = 50.0  # padded rows would win every softmax
        self.teacher_weight[vocab_size:] = 50.0
        self.targets = torch.randint(vocab_size, (tokens,), generator=self.generator)
        self.a, self.b, self.c = self._draw(tokens), self._draw(tokens), self._draw(tokens).abs()

    def _draw(self, *shape, factor=1.0):
        return (factor * torch.randn(*shape, generator=self.generator, dtype=WIDE)).to(self.dtype)

    def only_divergence(self):
        """Drop all other terms from the objective."""
        self.a.zero_()
        self.b.zero_()

    def objective(self, rows, tile):
        a, b, c = (x[rows].to(tile.logprob.dtype) for x in (self.a, self.b, self.c))
        loss = (a * tile.logprob + b * tile.logprob.exp() + a * b * tile.entropy).sum()
        return loss if tile.divergence is None else loss + (c * tile.divergence * (1 + tile.divergence)).sum()

    def fused(self, divergence=FULL[0], temperature=1.0, factor=1.0, rank=0, ranks=1, group=None, **options):
        """Return ((loss, dHidden, dWeight), statistics) of the package, on one rank's rows of the weights."""
        padded = len(self.weight) // ranks
        own = slice(rank * padded, (rank + 1) * padded)
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight[own].clone().requires_grad_()
        teacher = Projection(self.teacher_hidden, self.teacher_weight[own]) if self.distilled else None
        loss, statistics = fused_objective(
            Projection(hidden, weight),
            self.targets,
            self.objective,
            VocabShard.of_rank(rank, padded, self.vocab_size, group),
            teacher=teacher,
            divergence=divergence,
            temperature=temperature,
            **options,
        )
        (factor * loss).backward()
        return (loss.detach(), hidden.grad, weight.grad), statistics

    def exact(self, divergence=FULL[0], temperature=1.0):
        """Return the same in float64."""
        hidden, weight = (x.detach().to(WIDE).requires_grad_() for x in (self.hidden, self.weight))
        logp = exact_vocab.log_softmax(hidden, weight, self.vocab_size, temperature)
        teacher_hidden, teacher_weight = self.teacher_hidden.to(WIDE), self.teacher_weight.to(WIDE)
        logq = exact_vocab.log_softmax(teacher_hidden, teacher_weight, self.vocab_size, temperature)
        logprob = logp.gather(1, self.targets[:, None])[:, 0]
        h, border = exact_vocab.entropy(logp), self.distilled
        d = exact_vocab.divergence(logp[:border], logq, divergence, self.targets[:border])
        loss = self.objective(slice(0, border), Statistics(logprob[:border], h[:border], d))
        loss = loss + self.objective(slice(border, None), Statistics(logprob[border:], h[border:], None))
        loss.backward()
        return (loss.detach(), hidden.grad, weight.grad), (logprob.detach(), h.detach(), d.detach())


def assert_close(found, expected, tolerance):
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert ours.shape == theirs.shape
        assert largest_error(ours, theirs) < tolerance


class Function(NamedTuple):
    """Call a function of `functional` with its options, and compute the same by autograd."""

    name: str
    divergence: Divergence = Divergence()

    def ours(self, student, teacher, targets, shard, **options):
        """Return [T] or [D] of the package."""
        divergence = self.divergence
        if self.name == "log_prob":
            return functional.log_prob(student, targets, shard, **options)
        if divergence.support == "sampled" or (targets == IGNORED).any():
            options["targets"] = targets
        if self.name == "entropy":
            return functional.entropy(student, shard, **options)
        if divergence.name == "jsd":
            options["alpha"] = divergence.alpha
        options |= {"support": divergence.support, "top_k": divergence.top_k}
        return getattr(functional, self.name)(student, teacher, shard, **options)

    def exact(self, logp, logq, targets):
        """Return the same from complete log-probs."""
        if self.name == "log_prob":
            return logp.gather(1, targets[:, None])[:, 0]
        if self.name == "entropy":
            return exact_vocab.entropy(logp)
        return exact_vocab.divergence(logp[: len(logq)], logq, self.divergence, targets[: len(logq)])

    def on(self, support, top_k=6):
        """Return the same divergence on another support."""
        return self._replace(divergence=self.divergence._replace(support=support, top_k=top_k))

    def __str__(self):
        d = self.divergence
        if self.name in ("log_prob", "entropy"):
            return self.name
        return f"{self.name}-{d.alpha}-{d.support}-{d.top_k}"


def divergence_function(divergence):
    return Function("jsd" if divergence.name == "jsd" else f"{divergence.name}_kl", divergence)


LOG_PROB, ENTROPY = Function("log_prob"), Function("entropy")
DIVERGENCES = [divergence_function(x) for x in FULL]
SAMPLED_KL = divergence_function(SAMPLED)
# one of each sort, for what does not depend on the numbers
SORTS = [
    LOG_PROB,
    ENTROPY,
    DIVERGENCES[1],
    DIVERGENCES[2].on("student_topk"),
    DIVERGENCES[3].on("teacher_topk"),
    SAMPLED_KL,
]


class Inputs:
    """Hold T tokens' student and teacher in one form; padded columns are huge, infinite or NaN."""

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
        interpolation=None,
    ):
        self.generator = torch.Generator().manual_seed(0)
        self.padding = torch.tensor([1e30, math.inf, math.nan] * padded)[: padded - vocab_size]
        self.form, self.vocab_size, self.shard = form, vocab_size, VocabShard(0, vocab_size, vocab_size)
        self.padded, self.width, self.dtype, self.scale = padded, width, dtype, scale
        distilled = tokens if distilled is None else distilled
        self.student, self.teacher = self._source(tokens), self._source(distilled)
        if interpolation is not None:
            self.teacher = InterpolatedLogits(self.teacher, self._source(distilled), interpolation)
        self.targets = torch.randint(vocab_size, (tokens,), generator=self.generator)
        self.upstream = self._draw(tokens)

    def _draw(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=WIDE)

    def _source(self, tokens):
        if self.form == "logits":
            logits = 2 * self._draw(tokens, self.padded)
            logits[:, self.vocab_size :] = self.padding
            return Logits(logits.to(self.dtype))
        hidden, weight = self._draw(tokens, self.width), self.scale * self._draw(self.padded, self.width)
        weight[self.vocab_size :] = self.padding[:, None]
        return Projection(hidden.to(self.dtype), weight.to(self.dtype))

    @property
    def teacher_tensors(self):
        sources = self.teacher[:2] if isinstance(self.teacher, InterpolatedLogits) else [self.teacher]
        return [tensor for source in sources for tensor in source]

    def leaves(self, dtype=None):
        """Return the student as new leaves that require gradients."""
        tensors = (x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in self.student)
        return type(self.student)(*tensors)

    def ours(self, loss, **options):
        """Return loss(f), where f(function) is its values, and the gradients to the student's tensors."""
        student = self.leaves()

        def values(function):
            return function.ours(student, self.teacher, self.targets, self.shard, **options)

        value = loss(values)
        value.sum().backward()
        return value.detach(), [x.grad for x in student]

    def exact(self, loss, temperature=1.0):
        """Return the same in float64."""
        student = self.leaves(WIDE)
        logp, logq = (
            torch.log_softmax(full_logits(x, self.vocab_size) / temperature, -1)
            for x in (student, self.teacher)
        )
        value = loss(lambda function: function.exact(logp, logq.detach(), self.targets))
        value.sum().backward()
        return value.detach(), [x.grad for x in student]

    def weighted(self, function):
        """Return a loss of this function alone, each token with its own upstream gradient."""
        return lambda f: (values := f(function)) * self.upstream[: len(values)].to(values.dtype)


def full_logits(source, vocab_size):
    """Return [T, V] float64 logits without the padded columns."""
    if isinstance(source, InterpolatedLogits):
        reference, policy = (full_logits(part, vocab_size) for part in source[:2])
        return (1 - source.interpolation) * reference + source.interpolation * policy
    if isinstance(source, Logits):
        return source.logits[:, :vocab_size].to(WIDE)
    return source.hidden.to(WIDE) @ source.weight[:vocab_size].to(WIDE).t()


def check(inputs, loss, tolerance, gradient_tolerance=None, temperature=1.0, **options):
    """Compare our loss(f), a vector, and its gradients with float64; padded columns have gradient 0."""
    value, gradients = inputs.ours(loss, temperature=temperature, **options)
    exact_value, exact_gradients = inputs.exact(loss, temperature)
    assert value.dtype == accumulation_dtype(inputs.student.tensor.dtype)
    assert norm_error(value, exact_value) <= tolerance
    for ours, theirs, tensor in zip(gradients, exact_gradients, inputs.student, strict=True):
        assert ours.dtype == tensor.dtype
        assert norm_error(ours, theirs) <= (gradient_tolerance or tolerance)
    is_logits = inputs.form == "logits"
    padded = gradients[0][:, inputs.vocab_size :] if is_logits else gradients[1][inputs.vocab_size :]
    assert (padded == 0).all()


JSD, FORWARD, REVERSE = DIVERGENCES[0], DIVERGENCES[3], DIVERGENCES[4]
KINDS = [DIVERGENCES[1], FORWARD, REVERSE]
# each of SORTS once, form and kernel in turn
each_sort = pytest.mark.parametrize(
    "function, form, kernel",
    list(zip(SORTS, itertools.cycle(FORMS), itertools.cycle([*KERNELS, *KERNELS[::-1]]), strict=False)),
    ids=str,
)
