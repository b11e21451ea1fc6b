"""The outline of a sample, which every rank has of all samples: lengths and route, no tokens, no text.

It is enough to compute the step's plan, its denominators and its metrics on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from os.path import commonprefix
from typing import Literal

from megatron_srpo.data.records import Group, Route, Sample, SampleKey, Verdict


@dataclass(frozen=True, slots=True)
class Outline:
    """A routed sample without its tokens."""

    prompt_id: str
    task: str
    index: int  # position in its group
    prompt_tokens: int
    segments: tuple[tuple[Literal["policy", "environment"], int], ...]  # (author, number of tokens)
    routed: Route  # without `teacher_ids`
    teacher_tokens: int  # of the teacher's prompt, 0 without one
    teacher_of: int  # index in the group of the first sample that has the same teacher's prompt
    teacher_shared: int  # number of first tokens that all teacher's prompts of the group have in common
    judged: Verdict  # without `feedback`
    finish_reason: Literal["stop", "length", "abort"]
    versions: tuple[str, ...]  # weight versions of its spans of tokens, in order

    @classmethod
    def of(cls, sample: Sample, teacher_of: int, teacher_shared: int) -> Outline:
        """Return the outline of a routed sample."""
        route = sample.routed
        return cls(
            prompt_id=sample.prompt.id,
            task=sample.prompt.task,
            index=sample.index,
            prompt_tokens=len(sample.prompt.ids),
            segments=tuple((segment.author, len(segment.ids)) for segment in sample.segments),
            routed=route.model_copy(update={"teacher_ids": None}),
            teacher_tokens=len(route.teacher_ids or ()),
            teacher_of=teacher_of,
            teacher_shared=teacher_shared,
            judged=sample.judged.model_copy(update={"feedback": None}),
            finish_reason=sample.finish_reason,
            versions=tuple(version for version, _, _ in sample.versions),
        )

    @property
    def key(self) -> SampleKey:
        """The sample's key in its run: prompt id and index."""
        return self.prompt_id, self.index

    @property
    def response_inputs(self) -> int:
        """Number of the response's tokens that are model inputs: those before the last policy token."""
        end = total = 0
        for author, count in self.segments:
            total += count
            end = total if author == "policy" else end
        return end - 1

    @property
    def policy_tokens(self) -> int:
        """Number of tokens that the policy wrote."""
        return sum(count for author, count in self.segments if author == "policy")


OutlineGroup = tuple[Outline, ...]  # the samples of one prompt, by index


def outline(group: Group) -> OutlineGroup:
    """Return the outlines of a routed group."""
    prompts = [sample.routed.teacher_ids for sample in group]
    shared = len(commonprefix([ids for ids in prompts if ids is not None]))
    outlines: list[Outline] = []
    for sample, ids in zip(group, prompts, strict=True):
        outlines.append(Outline.of(sample, prompts.index(ids), shared))
    return tuple(outlines)
