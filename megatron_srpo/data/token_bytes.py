"""The tokens of samples as bytes, for ranks that know the samples' outlines. Numbers are little-endian.

    int32     for each sample: the prompt, the teacher's prompt, the segments' ids in order; a prompt that an
              earlier sample of the message has is left out
    float64   for each sample: the engine's log-probs of the policy's tokens, with every bit

The outlines determine the size of a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from megatron_srpo.data.outline import Outline
from megatron_srpo.data.records import Prompt, Sample, Segment


def message_bytes(outlines: Sequence[Outline]) -> int:
    """Return the size of the message with the tokens of these samples."""
    ids = sum(sum(lengths) for lengths in _sent_lengths(outlines))
    return 4 * ids + 8 * sum(one.policy_tokens for one in outlines)


def _sent_lengths(outlines: Sequence[Outline]) -> Iterator[tuple[int, int, int]]:
    """Yield the numbers of ids sent for each sample: prompt, teacher's prompt, response."""
    seen: set[tuple[str, int | None]] = set()
    for one in outlines:
        prompt, teacher = (one.prompt_id, None), (one.prompt_id, one.teacher_of)
        response = sum(count for _, count in one.segments)
        yield (
            0 if prompt in seen else one.prompt_tokens,
            0 if teacher in seen else one.teacher_tokens,
            response,
        )
        seen |= {prompt, teacher}


def encode_tokens(samples: Sequence[Sample], outlines: Sequence[Outline]) -> bytes:
    """Return the tokens of routed samples, whose outlines these are."""
    ids: list[int] = []
    logprobs: list[float] = []
    for sample, (prompt, teacher, _) in zip(samples, _sent_lengths(outlines), strict=True):
        ids.extend(sample.prompt.ids[:prompt])
        ids.extend((sample.routed.teacher_ids or ())[:teacher])
        ids.extend(sample.response_ids)
        logprobs.extend(sample.logprobs)
    message = np.array(ids, "<i4").tobytes() + np.array(logprobs, "<f8").tobytes()
    assert len(message) == message_bytes(outlines)
    return message


def decode_tokens(data: bytes, outlines: Sequence[Outline]) -> list[Sample]:
    """Return the samples of a message with all that training needs: no text, messages, answer or feedback."""
    lengths = list(_sent_lengths(outlines))
    count = sum(map(sum, lengths))
    ids = iter(np.frombuffer(data, "<i4", count).tolist())
    logprobs = iter(np.frombuffer(data, "<f8", offset=4 * count).tolist())
    prompts: dict[str, Prompt] = {}
    teachers: dict[tuple[str, int], tuple[int, ...]] = {}
    samples: list[Sample] = []
    for one, (prompt, teacher, _) in zip(outlines, lengths, strict=True):
        if one.prompt_id not in prompts:
            found = tuple(islice(ids, prompt))
            prompts[one.prompt_id] = Prompt(
                id=one.prompt_id, task=one.task, messages=(), answer="", ids=found
            )
        if teacher:
            teachers[one.prompt_id, one.teacher_of] = tuple(islice(ids, teacher))
        teacher_ids = teachers.get((one.prompt_id, one.teacher_of))
        segments = []
        for author, size in one.segments:
            own = tuple(islice(ids, size))
            values = tuple(islice(logprobs, size if author == "policy" else 0))
            segments.append(Segment(author=author, ids=own, logprobs=values))
        samples.append(
            Sample(
                prompt=prompts[one.prompt_id],
                index=one.index,
                segments=tuple(segments),
                finish_reason=one.finish_reason,
                verdict=one.judged,
                route=one.routed.model_copy(update={"teacher_ids": teacher_ids}),
            )
        )
    return samples
