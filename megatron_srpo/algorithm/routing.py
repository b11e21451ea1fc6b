"""Group advantages and sample routing: from verified groups to what each sample learns (METHOD.md §1 and §3)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from megatron_srpo.algorithm.reprompt import TeacherPrompt, build_teacher_prompt, clean_demonstration
from megatron_srpo.algorithm.settings import Algorithm
from megatron_srpo.records import Group, Route, Sample


def group_advantages(rewards: Sequence[float], divide_by_std: bool = False) -> list[float]:
    """A_i = r_i - mean(r) over the G rewards of one prompt, whatever their route; optionally / (std + 1e-6), ddof 1."""
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not divide_by_std:
        return centred
    std = (sum(value * value for value in centred) / (len(rewards) - 1)) ** 0.5
    return [value / (std + 1e-6) for value in centred]


def choose_sibling(correct: Sequence[bool], index: int, seed: str) -> int | None:
    """A correct rollout other than `index`, uniformly at random by `seed`; None when there is none."""
    others = [other for other, is_correct in enumerate(correct) if is_correct and other != index]
    return random.Random(seed).choice(others) if others else None


def route_groups(
    groups: Sequence[Group],
    algorithm: Algorithm,
    encode: Callable[[list[dict[str, str]]], list[int]],
    max_teacher_prompt_tokens: int,
    seed: str,
) -> list[Group]:
    """Each sample with its advantage, branch weights and, where it is distilled, its teacher's prompt.

    `encode` renders chat messages to ids (see `build_teacher_prompt`); `seed` names the run and step, and with the
    prompt's id and the sample's index decides which sibling is shown, so a replay routes exactly alike.
    """

    def teacher_prompt(sample: Sample, sibling: Sample) -> TeacherPrompt:
        return build_teacher_prompt(sample.prompt.messages, clean_demonstration(sibling.text), encode, max_teacher_prompt_tokens)

    return [_route_group(group, algorithm, teacher_prompt, seed) for group in groups]


def _route_group(group: Group, algorithm: Algorithm, teacher_prompt: Callable, seed: str) -> Group:
    advantages = group_advantages([sample.verdict.reward for sample in group], algorithm.advantage_std)
    correct = [sample.verdict.correct for sample in group]
    routed = []
    for sample, advantage in zip(group, advantages, strict=True):
        sibling = choose_sibling(correct, sample.index, f"{seed}/{sample.prompt.id}/{sample.index}")
        shown, missing = TeacherPrompt(None, False), None if sibling is not None else "no_correct_sibling"
        wants_teacher = sibling is not None and algorithm.branch_weights(sample.verdict.correct, True)[1] > 0
        if wants_teacher:
            shown = teacher_prompt(sample, group[sibling])
            missing = "nothing_to_show" if shown.ids is None else None
        policy_weight, distillation_weight = algorithm.branch_weights(sample.verdict.correct, shown.ids is not None)
        distilled = distillation_weight > 0
        branch = ("mixed" if distilled else "grpo") if policy_weight > 0 else ("sdpo" if distilled else "none")
        route = Route(
            branch=branch,
            policy_weight=policy_weight,
            distillation_weight=distillation_weight,
            advantage=advantage,
            sibling=sibling if distilled else None,
            teacher_ids=shown.ids if distilled else None,
            no_teacher=missing,
            demonstration_cut=shown.demonstration_cut,
        )
        routed.append(sample.model_copy(update={"route": route}))
    return tuple(routed)
