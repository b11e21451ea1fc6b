"""Make random routed groups with every kind of sample that ranks exchange."""

from __future__ import annotations

import random
import struct
from typing import Any

from megatron_srpo.data.records import Group, Prompt, Route, Sample, Segment, Verdict


def random_groups(count: int, seed: int, longest: int = 40, size: int = 4) -> list[Group]:
    """Return `count` groups of `size` samples; prompt ids and failures have characters of many bytes."""
    rng = random.Random(seed)
    return [_group(rng, f"tâche/{seed}/{number}", longest, size) for number in range(count)]


def trained(sample: Sample) -> tuple[Any, ...]:
    """Return what training reads of a sample, with the bits of its log-probs."""
    values = [struct.pack(f"{len(s.logprobs)}d", *s.logprobs) for s in sample.segments]
    segments = [(s.author, s.ids) for s in sample.segments]
    return sample.prompt.id, sample.prompt.ids, sample.index, segments, values, sample.route


def _ids(rng: random.Random, least: int, longest: int) -> tuple[int, ...]:
    return tuple(rng.choice((0, 1, rng.randrange(2**31))) for _ in range(rng.randint(least, longest)))


def _group(rng: random.Random, name: str, longest: int, size: int) -> Group:
    messages = ({"role": "user", "content": "Où ?"},)
    prompt = Prompt(
        id=name,
        task=rng.choice(("sums", "数学")),
        messages=messages,
        answer="7",
        ids=_ids(rng, 1, longest),
    )
    teachers = [None, _ids(rng, 1, longest), _ids(rng, 1, longest)]
    return tuple(_sample(rng, prompt, index, rng.choice(teachers), longest) for index in range(size))


def _sample(
    rng: random.Random, prompt: Prompt, index: int, teacher: tuple[int, ...] | None, longest: int
) -> Sample:
    segments = [
        _segment(rng, rng.choice(("policy", "environment")), longest) for _ in range(rng.choice((0, 3)))
    ]
    segments.insert(rng.randint(0, len(segments)), _segment(rng, "policy", longest))
    reward = rng.choice((0.0, 1.0, 0.1 + 0.2))
    failed = rng.choice((None, None, "timeout", "error: « 7 »\u2028\n"))
    return Sample(
        prompt=prompt,
        index=index,
        segments=tuple(segments),
        finish_reason=rng.choice(("stop", "length")),
        text="sept",
        verdict=Verdict(
            reward=reward,
            correct=reward >= 0.5,
            format_ok=rng.random() < 0.5,
            feedback=rng.choice((None, "Non.")),
            verifier_failed=failed,
            excluded=failed is not None and rng.random() < 0.5,
        ),
        route=Route(
            branch=rng.choice(("grpo", "sdpo", "mixed", "none")),
            policy_weight=rng.random(),
            distillation_weight=rng.random() if teacher else 0.0,
            advantage=rng.gauss(0, 1),
            sibling=rng.randrange(8) if teacher else None,
            teacher_ids=teacher,
            no_teacher=None if teacher else rng.choice((None, "no_correct_sibling", "nothing_to_show")),
            demonstration_cut=rng.random() < 0.5,
        ),
    )


def _segment(rng: random.Random, author: str, longest: int) -> Segment:
    ids = _ids(rng, 1, longest)
    if author == "environment":
        return Segment(author="environment", ids=ids)
    # Values of every size, and both zeros: all bits must arrive.
    logprobs = tuple(-rng.choice((0.0, 5e-324, rng.random(), 1e3 * rng.random())) for _ in ids)
    cut = rng.randint(0, len(ids))
    versions = tuple(span for span in (("9", 0, cut), ("10", cut, len(ids))) if span[1] < span[2])
    return Segment(ids=ids, logprobs=logprobs, versions=versions)
