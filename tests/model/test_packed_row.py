"""Test attention in packed rows against a complete mask and plain softmax in float64."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_srpo.distributed.context_parallel import ContextParallel, gathered_positions
from megatron_srpo.model.layers import PackedAttention, PackedRow
from megatron_srpo.model.packed_row import Documents, attention_batches

HEADS, KEY_HEADS, DIM = 4, 2, 8


class Rotary:
    """Frequencies as Megatron's rotary embedding gives them: [n, 1, 1, d]."""

    def get_emb(self, count):
        angles = torch.outer(torch.arange(count).double(), 1e4 ** -(torch.arange(0, DIM, 2).double() / DIM))
        return torch.cat([angles, angles], dim=1)[:, None, None]


@st.composite
def rows(draw):
    """Draw (documents, context-parallel size); a family is a prefix and documents that continue it."""
    size = draw(st.sampled_from([1, 1, 2, 3]))
    multiple = 2 * size if size > 1 else 1
    lengths, prefixes = [], []
    families = st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    for shared, own in draw(families.filter(len)):
        prefix = -1
        if shared:
            prefix = len(prefixes)
            lengths.append(shared * multiple)
            prefixes.append(-1)
        lengths += [length * multiple for length in own]
        prefixes += [prefix] * len(own)
    return Documents(tuple(itertools.accumulate(lengths, initial=0)), tuple(prefixes)), size


def visible(documents):
    """Return which tokens of the row see which, [T, T], and each token's position in its sequence."""
    total = documents.bounds[-1]
    seen, positions = torch.zeros(total, total, dtype=torch.bool), torch.zeros(total, dtype=torch.long)
    for number, prefix in enumerate(documents.prefixes):
        start, end = documents.bounds[number : number + 2]
        before = documents.range(prefix)
        for place in range(start, end):
            seen[place, start : place + 1] = True
            seen[place, before.start : before.stop] = True
            positions[place] = len(before) + place - start
    return seen, positions


def rotated(tensor, positions):
    angles = Rotary().get_emb(int(positions.max()) + 1)[positions][:, 0]
    first, second = tensor.chunk(2, dim=-1)
    return tensor * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def plain(query, key, value, seen, positions):
    query, key = rotated(query, positions), rotated(key, positions).repeat_interleave(HEADS // KEY_HEADS, 1)
    value = value.repeat_interleave(HEADS // KEY_HEADS, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / DIM**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@given(rows())
@settings(deadline=None, max_examples=150)
def test_outputs_and_gradients_are_those_of_a_complete_mask(drawn):
    documents, size = drawn
    generator = torch.Generator().manual_seed(0)
    total = documents.bounds[-1]
    inputs = [
        torch.randn(total, heads, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    seen, positions = visible(documents)
    expected = plain(*inputs, seen, positions)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    attention = PackedAttention(SimpleNamespace(attention_dropout=0.0), 1, None, None)
    local_places = [torch.arange(total)]
    if size > 1:
        local_places = gathered_positions(torch.tensor(documents.bounds), size).argsort().view(size, -1)
    grads = [torch.zeros_like(tensor) for tensor in inputs]
    for rank, places in enumerate(local_places):
        context = ContextParallel(rank, size)
        row = PackedRow.of(documents, context, positions[places], Rotary(), torch.float64)
        query, key, value = inputs
        if size > 1:  # keys of all ranks, without a process group: they are rotated before they are gathered
            row = dataclasses.replace(row, gathered=None)
            key = rotated(key, positions)
            query = rotated(query[places], positions[places])
            output = torch.cat([attention._attend(batch, query, key, value) for batch in row.batches])
            output = (output if row.order is None else output[row.order]).flatten(1)
        else:
            output = attention(query[places], key, value, None, packed_seq_params=row)
        torch.testing.assert_close(output, expected[places], rtol=1e-10, atol=1e-10)
        of_rank = torch.autograd.grad(output, inputs, upstream[places])
        grads = [total + grad for total, grad in zip(grads, of_rank, strict=True)]
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def batches_of(documents, size=1, device="cpu"):
    return attention_batches(documents, ContextParallel(0, size), torch.device(device), torch.float32)


def test_similar_documents_are_one_batch():
    alike = Documents((0, 8, 15, 24), (-1, -1, -1))
    (batch,) = batches_of(alike)
    assert batch.mask is None and (batch.queries.count, batch.queries.length) == (3, 9)
    assert len(batches_of(Documents((0, 8, 108), (-1, -1)))) == 2  # 100 rows of padding, otherwise
    shared = Documents((0, 20, 25, 29, 44, 49, 53), (-1, 0, 0, -1, 3, 3))
    prompts, responses = sorted(batches_of(shared), key=lambda batch: batch.prefixes is not None)
    assert (prompts.queries.count, prompts.queries.length) == (2, 20)
    assert (responses.queries.count, responses.queries.length) == (4, 5)
    assert (responses.prefixes.count, responses.prefixes.length) == (2, 20)


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_documents_are_batched(size):
    # Two chunks each of sixteen documents of one length: not thirty-two calls.
    documents = Documents(tuple(range(0, 17 * 24, 24)), (-1,) * 16)
    assert len(batches_of(documents, size)) <= 2


def test_a_complete_row_is_not_copied():
    (batch,) = batches_of(Documents((0, 8, 16), (-1, -1)))
    assert batch.queries.places is None and batch.queries.rows == slice(0, 16)
    tensor = torch.randn(16, 2, 4)
    assert batch.queries.pad(tensor).data_ptr() == tensor.data_ptr()
