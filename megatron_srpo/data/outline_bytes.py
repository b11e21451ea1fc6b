"""Outlines as bytes, for the other ranks of a run. Numbers are little-endian.

6 × uint32          number of groups, samples, segments, versions; bytes of the strings; bytes of a sample
uint32 [groups]     number of samples of each group
_SAMPLE [samples]   the fields of every sample; a string is given by its number
int32 [segments]    number of tokens of each segment, negative if the environment wrote it
uint32 [versions]   strings
UTF-8               all strings, each once, as a JSON list
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, get_args

import numpy as np

from megatron_srpo.data.outline import Outline, OutlineGroup
from megatron_srpo.data.records import Route, Sample, Verdict

_NONE = -1  # of an optional string, number or choice

_SAMPLE = np.dtype(
    [
        ("prompt_id", "<i4"),  # strings
        ("task", "<i4"),
        ("verifier_failed", "<i4"),
        ("index", "<i4"),
        ("prompt_tokens", "<i4"),
        ("teacher_tokens", "<i4"),
        ("teacher_of", "<i4"),
        ("teacher_shared", "<i4"),
        ("sibling", "<i4"),
        ("segments", "<i4"),  # how many
        ("versions", "<i4"),
        ("reward", "<f8"),
        ("policy_weight", "<f8"),
        ("distillation_weight", "<f8"),
        ("advantage", "<f8"),
        ("branch", "i1"),  # numbers of the annotated choices
        ("no_teacher", "i1"),
        ("finish_reason", "i1"),
        ("correct", "?"),
        ("format_ok", "?"),
        ("excluded", "?"),
        ("demonstration_cut", "?"),
    ]
)
_BRANCHES = get_args(Route.model_fields["branch"].annotation)
_NO_TEACHER = get_args(get_args(Route.model_fields["no_teacher"].annotation)[0])
_FINISH = get_args(Sample.model_fields["finish_reason"].annotation)


class _Strings:
    """Numbers of strings, each listed once."""

    def __init__(self) -> None:
        self.number_of: dict[str, int] = {}

    def number(self, text: str | None) -> int:
        return _NONE if text is None else self.number_of.setdefault(text, len(self.number_of))


def encode_outlines(groups: Sequence[OutlineGroup]) -> bytes:
    """Return the outlines of groups as bytes."""
    outlines = [one for group in groups for one in group]
    strings = _Strings()
    samples = np.array([_row(one, strings) for one in outlines], dtype=_SAMPLE)
    segments = [count if author == "policy" else -count for one in outlines for author, count in one.segments]
    versions = [strings.number(version) for one in outlines for version in one.versions]
    text = json.dumps(list(strings.number_of)).encode()
    counts = [len(groups), len(outlines), len(segments), len(versions), len(text), _SAMPLE.itemsize]
    parts = [np.array(counts, "<u4"), np.array([len(group) for group in groups], "<u4"), samples]
    parts += [np.array(segments, "<i4"), np.array(versions, "<u4")]
    return b"".join(part.tobytes() for part in parts) + text


def _row(one: Outline, strings: _Strings) -> tuple[Any, ...]:
    """Return the fields of `_SAMPLE`."""
    route, verdict = one.routed, one.judged
    return (
        strings.number(one.prompt_id),
        strings.number(one.task),
        strings.number(verdict.verifier_failed),
        one.index,
        one.prompt_tokens,
        one.teacher_tokens,
        one.teacher_of,
        one.teacher_shared,
        _NONE if route.sibling is None else route.sibling,
        len(one.segments),
        len(one.versions),
        verdict.reward,
        route.policy_weight,
        route.distillation_weight,
        route.advantage,
        _BRANCHES.index(route.branch),
        _NONE if route.no_teacher is None else _NO_TEACHER.index(route.no_teacher),
        _FINISH.index(one.finish_reason),
        verdict.correct,
        verdict.format_ok,
        verdict.excluded,
        route.demonstration_cut,
    )


def decode_outlines(data: bytes) -> list[OutlineGroup]:
    """Return the groups that `encode_outlines` wrote. Raises ValueError if their sizes do not fit."""
    place = 0

    def read(dtype: Any, count: int) -> np.ndarray:
        nonlocal place
        found = np.frombuffer(data, dtype, count, place)
        place += found.nbytes
        return found

    group_count, sample_count, segment_count, version_count, text_bytes, row_bytes = read("<u4", 6).tolist()
    if row_bytes != _SAMPLE.itemsize:
        raise ValueError(f"outlines: {row_bytes} bytes for each sample, expected {_SAMPLE.itemsize}")
    sizes = read("<u4", group_count).tolist()
    rows = read(_SAMPLE, sample_count).tolist()
    segments = iter(read("<i4", segment_count).tolist())
    versions = iter(read("<u4", version_count).tolist())
    if place + text_bytes != len(data):
        raise ValueError(f"outlines: {len(data)} bytes, expected {place + text_bytes}")
    strings = json.loads(data[place:])
    outlines = (_outline(row, segments, versions, strings) for row in rows)
    return [tuple(islice(outlines, size)) for size in sizes]


def _outline(
    row: tuple[Any, ...], segments: Iterator[int], versions: Iterator[int], strings: list[str]
) -> Outline:
    """Return the outline of a row of `_SAMPLE`, with its next segments and versions."""
    field = dict(zip(_SAMPLE.names or (), row, strict=True))

    def optional(values: Sequence[Any], name: str) -> Any:
        return None if field[name] == _NONE else values[field[name]]

    route = Route(
        branch=_BRANCHES[field["branch"]],
        policy_weight=field["policy_weight"],
        distillation_weight=field["distillation_weight"],
        advantage=field["advantage"],
        sibling=None if field["sibling"] == _NONE else field["sibling"],
        no_teacher=optional(_NO_TEACHER, "no_teacher"),
        demonstration_cut=field["demonstration_cut"],
    )
    verdict = Verdict(
        reward=field["reward"],
        correct=field["correct"],
        format_ok=field["format_ok"],
        verifier_failed=optional(strings, "verifier_failed"),
        excluded=field["excluded"],
    )
    lengths = islice(segments, field["segments"])
    return Outline(
        prompt_id=strings[field["prompt_id"]],
        task=strings[field["task"]],
        index=field["index"],
        prompt_tokens=field["prompt_tokens"],
        segments=tuple(("policy", n) if n > 0 else ("environment", -n) for n in lengths),
        routed=route,
        teacher_tokens=field["teacher_tokens"],
        teacher_of=field["teacher_of"],
        teacher_shared=field["teacher_shared"],
        judged=verdict,
        finish_reason=_FINISH[field["finish_reason"]],
        versions=tuple(strings[number] for number in islice(versions, field["versions"])),
    )
