"""The outline of a sample, which every rank has of all samples: lengths and route, no tokens, no text.

It is enough to compute the step's plan, its denominators and its metrics on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_srpo.data.records import Group, Route, Sample


@dataclass(frozen=True, slots=True)
class Outline:
    """A routed sample without its tokens."""

    prompt_tokens: int
    segments: tuple[tuple[Literal["policy", "environment"], int], ...]  # (author, number of tokens)
    routed: Route  # without `teacher_ids`
    teacher_tokens: int  # of the teacher's prompt, 0 without one
    teacher_of: int  # index in the group of the first sample that has the same teacher's prompt

    @classmethod
    def of(cls, sample: Sample, teacher_of: int) -> Outline:
        """Return the outline of a routed sample."""
        route = sample.routed
        return cls(
            prompt_tokens=len(sample.prompt.ids),
            segments=tuple((segment.author, len(segment.ids)) for segment in sample.segments),
            routed=route.model_copy(update={"teacher_ids": None}),
            teacher_tokens=len(route.teacher_ids or ()),
            teacher_of=teacher_of,
        )

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
    first: dict[tuple[int, ...] | None, int] = {}
    outlines: list[Outline] = []
    for position, sample in enumerate(group):
        teacher_of = first.setdefault(sample.routed.teacher_ids, position)
        outlines.append(Outline.of(sample, teacher_of))
    return tuple(outlines)
