"""Test the binary forms in which ranks exchange outlines and tokens."""

from __future__ import annotations

from itertools import chain

import pytest
from random_groups import random_groups, trained

from megatron_srpo.data.outline import outline
from megatron_srpo.data.outline_bytes import decode_outlines, encode_outlines
from megatron_srpo.data.token_bytes import decode_tokens, encode_tokens, message_bytes


@pytest.mark.parametrize("count, size", [(0, 4), (1, 1), (30, 5)])
def test_outlines_are_the_same_after_a_round_trip(count, size):
    outlines = [outline(group) for group in random_groups(count, 1, size=size)]
    assert decode_outlines(encode_outlines(outlines)) == outlines


def test_an_outline_holds_what_the_records_say():
    (group,) = random_groups(1, 2, size=40)
    for sample, one in zip(group, outline(group), strict=True):
        assert one.judged.model_copy(update={"feedback": sample.judged.feedback}) == sample.judged
        assert one.policy_tokens == len(sample.policy_ids) == len(sample.logprobs)
        first = group[one.teacher_of]
        assert first.routed.teacher_ids == sample.routed.teacher_ids and one.teacher_of <= sample.index
        assert one.versions == tuple(version for version, _, _ in sample.versions)


def test_long_strings_are_sent_once():
    groups = random_groups(20, 3)
    outlines = [outline(group) for group in groups]
    text = encode_outlines(outlines)
    assert all(text.count(f'/3/{number}"'.encode()) == 1 for number in range(20))
    assert len(text) < 150 * 80


@pytest.mark.parametrize("cut", [1, 4, 100])
def test_outlines_of_another_size_are_refused(cut):
    data = encode_outlines([outline(group) for group in random_groups(3, 4)])
    with pytest.raises(ValueError):
        decode_outlines(data[:-cut])
    with pytest.raises(ValueError, match="expected"):
        decode_outlines(data + b"\0" * cut)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_tokens_are_the_same_bits_after_a_round_trip(keep):
    # Every keep-th sample only: a prompt is sent with the first sample that needs it.
    groups = random_groups(12, 5)
    samples = list(chain.from_iterable(groups))[::keep]
    outlines = list(chain.from_iterable(map(outline, groups)))[::keep]
    samples.reverse()
    outlines.reverse()
    message = encode_tokens(samples, outlines)
    assert len(message) == message_bytes(outlines)
    found = decode_tokens(message, outlines)
    assert list(map(trained, found)) == list(map(trained, samples))
    assert encode_tokens(found, outlines) == message


def test_shared_prompts_are_sent_once():
    (group,) = random_groups(1, 6, size=1)
    one = group[0]
    copies = tuple(one.model_copy(update={"index": index}) for index in range(5))
    prompts = 4 * (len(one.prompt.ids) + len(one.routed.teacher_ids or ()))
    sizes = [len(encode_tokens(copies[:n], outline(copies)[:n])) - prompts for n in (1, 5)]
    assert sizes[1] == 5 * sizes[0] > 0
