"""Test autograd through the functional form: graphs, strides, buffers, and invalid arguments."""

import pytest
import torch
from exact_vocab import WIDE, norm_error
from pairwise import pairwise
from tables import each_row
from torch.utils._python_dispatch import TorchDispatchMode
from vocab_inputs import (
    DIVERGENCES,
    FORMS,
    FORWARD,
    KERNELS,
    REVERSE,
    SORTS,
    Inputs,
    each_sort,
)

from megatron_srpo.vocab_parallel import functional
from megatron_srpo.vocab_parallel.fused import fused_objective
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Logits
from megatron_srpo.vocab_parallel.shard import VocabShard


@pairwise(
    function=[*SORTS[:3], FORWARD, REVERSE, *(x.on("student_topk", 2) for x in DIVERGENCES[1:5:2])],
    form=FORMS,
    kernel=KERNELS,
)
def test_gradcheck(function, form, kernel):
    inputs = Inputs(form, 3, 5, 6, width=2, interpolation=0.3)
    options = {"temperature": 0.8, "tile_tokens": 2, "kernel": kernel}
    # finite differences of padded columns too
    tensors = [x.nan_to_num(1.0, 1.0, -1.0).clamp(-5, 5).requires_grad_() for x in inputs.student]

    def values(*tensors):
        student = type(inputs.student)(*tensors)
        return function.ours(student, inputs.teacher, inputs.targets, inputs.shard, **options)

    assert torch.autograd.gradcheck(values, tensors)


@each_sort
def test_a_graph_can_be_differentiated_again_but_not_twice_over(function, form, kernel):
    inputs = Inputs(form)
    student, options = inputs.leaves(), {"tile_tokens": 3, "kernel": kernel}
    values = function.ours(student, inputs.teacher, inputs.targets, inputs.shard, **options)
    value = (values * inputs.upstream[: len(values)]).sum()
    once, again = (torch.autograd.grad(value, tuple(student), retain_graph=True) for _ in range(2))
    third = torch.autograd.grad(-2.0 * value, tuple(student), retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
    torch.testing.assert_close([-2.0 * x for x in once], list(third))
    for loss in (value, value.square()):
        with pytest.raises(RuntimeError):
            gradients = torch.autograd.grad(loss, tuple(student), retain_graph=True, create_graph=True)
            (loss + sum(x.square().sum() for x in gradients)).backward()


@pytest.mark.parametrize("changed", ["student", "teacher", "targets"])
def test_a_change_in_place_before_backward_is_an_error(changed):
    inputs = Inputs("projection")
    student = inputs.leaves()
    value = sum(x.ours(student, inputs.teacher, inputs.targets, inputs.shard).sum() for x in SORTS)
    tensors = {"student": student.hidden, "teacher": inputs.teacher.hidden, "targets": inputs.targets}
    with torch.no_grad():
        tensors[changed].zero_()
    with pytest.raises(RuntimeError):
        value.backward()


def _loss_of(student, inputs):
    return fused_objective(
        student, inputs.targets, lambda rows, tile: tile.logprob.exp().sum(), inputs.shard
    )[0]


def test_an_objective_cannot_be_differentiated_again():
    # Its gradients exist once: a second backward is a RuntimeError, never a wrong gradient.
    inputs = Inputs("projection")
    loss = _loss_of(inputs.leaves(), inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()
    student = inputs.leaves()
    gradients = torch.autograd.grad(_loss_of(student, inputs).square(), tuple(student), create_graph=True)
    with pytest.raises(RuntimeError):
        sum(x.square().sum() for x in gradients).backward()


class _Largest(TorchDispatchMode):
    """Record the elements of the largest tensor that any operation creates."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pairwise(function=SORTS, kernel=KERNELS)
def test_nothing_of_size_tokens_times_vocabulary_is_created(function, kernel):
    inputs = Inputs("projection", tokens=250, vocab_size=3000, padded=3008, interpolation=0.3)
    with _Largest() as largest:
        inputs.ours(inputs.weighted(function), tile_tokens=10, kernel=kernel)
    assert 0 < largest.elements < 250 * 3000 / 1.5


@each_sort
def test_strides_do_not_matter_and_inputs_are_not_changed(function, form, kernel):
    inputs, options = Inputs(form, interpolation=0.3), {"tile_tokens": 3, "kernel": kernel}
    tensors = [*inputs.student, *inputs.teacher_tensors, inputs.targets]
    before = [x.clone() for x in tensors]
    expected = inputs.ours(inputs.weighted(function), **options)
    inputs.student = type(inputs.student)(*(x.t().contiguous().t() for x in inputs.student))
    found = inputs.ours(inputs.weighted(function), **options)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_into_a_buffer(dtype):
    inputs, before = Inputs("projection", dtype=dtype), torch.randn(32, 6)

    def objective(rows, tile):
        return (inputs.upstream[rows].float() * tile.logprob.exp() + tile.divergence).sum()

    def run(**more):
        student, options = inputs.leaves(), {"teacher": inputs.teacher, "tile_tokens": 3}
        return student, fused_objective(student, inputs.targets, objective, inputs.shard, **options, **more)[
            0
        ]

    (plain, loss), buffer = run(), before.clone()
    loss.backward()
    for micro_batches in (1, 2):
        student, same_loss = run(weight_grad=buffer)
        same_loss.backward()
        assert student.weight.grad is None and torch.equal(loss, same_loss)
        assert torch.equal(student.hidden.grad, plain.hidden.grad)
        assert torch.equal(buffer[29:], before[29:])
        expected = micro_batches * plain.weight.grad.to(WIDE)
        assert norm_error(buffer - before, expected) < (1e-5 if dtype == torch.float32 else 5e-3)
    for factor in (0.5, -1.0, 0.0):
        with pytest.raises(RuntimeError):
            (factor * run(weight_grad=before.clone())[1]).backward()


GOOD, SHARD, IDS = Logits(torch.zeros(3, 8)), VocabShard(0, 7, 7), torch.zeros(3, dtype=torch.int64)


@each_row(
    "function, arguments, options, message",
    [
        ("log_prob", (GOOD, IDS + 7, SHARD), {}, "targets: ids from 7 to 7 at 3 positions"),
        ("log_prob", (GOOD, None, SHARD), {}, r"targets: None; expected \[T\] int64"),
        ("entropy", (GOOD, SHARD), {"temperature": -1.0}, "temperature -1.0"),
        (
            "entropy",
            (InterpolatedLogits(GOOD, Logits(torch.zeros(2, 8)), 0.5), SHARD),
            {},
            "reference and .*policy",
        ),
        ("reverse_kl", (GOOD, GOOD, SHARD), {"support": "sampled"}, "targets: None"),
        ("forward_kl", (GOOD, GOOD, SHARD), {"support": "sampled", "targets": IDS}, "forward on sampled"),
        ("jsd", (GOOD, GOOD, SHARD), {"alpha": 0.0}, "alpha 0.0"),
        ("jsd", (GOOD, GOOD, SHARD), {"support": "teacher_topk", "top_k": 0}, "top_k 0"),
        ("jsd", (GOOD, None, SHARD), {}, "teacher: None; expected Logits"),
    ],
)
def test_invalid_arguments_are_named(function, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(functional, function)(*arguments, **options)
