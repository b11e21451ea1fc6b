"""Group advantages and sample routing: from verified groups to what each sample learns (METHOD.md §1 and
§3).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from megatron_srpo.algorithm.reprompt import (
    NOTHING_SHOWN,
    TeacherPrompt,
    build_teacher_prompt,
    clean_demonstration,
)
from megatron_srpo.algorithm.settings import Algorithm
from megatron_srpo.data.records import Group, Route, Sample


def group_advantages(rewards: Sequence[float], divide_by_std: bool = False) -> list[float]:
    """A_i = r_i - mean(r) over the G rewards of one prompt, whatever their route; optionally / (std + 1e-6),
    ddof 1.
    """
    mean = statistics.mean(
        rewards
    )  # exact, so that rewards all alike have advantage 0 also where they are no 0 or 1
    centred = [reward - mean for reward in rewards]
    if not divide_by_std:
        return centred
    std = (sum(value * value for value in centred) / max(len(rewards) - 1, 1)) ** 0.5
    return [value / (std + 1e-6) for value in centred]


def choose_sibling(correct: Sequence[bool], index: int, seed: str) -> int | None:
    """A correct rollout other than `index`, uniformly at random by `seed`; None when there is none."""
    others = [other for other, is_correct in enumerate(correct) if is_correct and other != index]
    return random.Random(seed).choice(others) if others else None


def has_signal(
    group: Group, algorithm: Algorithm, feedback: Literal["off", "without_solution", "always"] = "off"
) -> bool:
    """Whether any sample of the group would teach the policy something: by an advantage other than 0, or by
    a teacher.
    """
    judged = [sample for sample in group if not sample.verdict.excluded]
    differ = len({sample.verdict.reward for sample in judged}) > 1
    right = sum(sample.verdict.correct for sample in judged)
    for verdict in (sample.verdict for sample in judged):
        is_told = feedback != "off" and not verdict.correct and bool(verdict.feedback)
        policy_weight, distillation_weight = algorithm.branch_weights(
            verdict.correct, right > verdict.correct or is_told
        )
        if distillation_weight > 0 or differ and policy_weight > 0:
            return True
    return False


def route_groups(
    groups: Sequence[Group],
    algorithm: Algorithm,
    encode: Callable[[list[dict[str, str]]], list[int]],
    max_teacher_prompt_tokens: int,
    seed: str,
    feedback: Literal["off", "without_solution", "always"] = "off",
) -> list[Group]:
    """Each sample with its advantage, branch weights and, where it is distilled, its teacher's prompt.

    `encode` renders chat messages to ids (see `build_teacher_prompt`); `seed` names the run and step, and
    with the prompt's id and the sample's index decides which sibling is shown, so a replay routes exactly
    alike. `feedback`: whether a failed sample's environment feedback is shown to its teacher where there is
    no solution to show, or always. An excluded sample takes no part: neither in its group's mean nor as a
    sibling, and it learns nothing.
    """

    def teacher_prompt(sample: Sample, sibling: Sample | None) -> TeacherPrompt:
        demonstration = clean_demonstration(sibling.text) if sibling else ""
        tells = feedback == "always" or (feedback == "without_solution" and not demonstration)
        told = sample.verdict.feedback if tells and not sample.verdict.correct else None
        return build_teacher_prompt(
            sample.prompt.messages, demonstration, encode, max_teacher_prompt_tokens, told
        )

    return [_route_group(group, algorithm, teacher_prompt, seed) for group in groups]


def _route_group(group: Group, algorithm: Algorithm, teacher_prompt: Callable, seed: str) -> Group:
    judged = [sample for sample in group if not sample.verdict.excluded]
    advantages = iter(
        group_advantages([sample.verdict.reward for sample in judged], algorithm.advantage_std)
        if judged
        else []
    )
    correct = [sample.verdict.correct and not sample.verdict.excluded for sample in group]
    routes = [
        Route(branch="none", policy_weight=0.0, distillation_weight=0.0, advantage=0.0)
        if sample.verdict.excluded
        else _route(sample, group, correct, next(advantages), algorithm, teacher_prompt, seed)
        for sample in group
    ]
    return tuple(
        sample.model_copy(update={"route": route}) for sample, route in zip(group, routes, strict=True)
    )


def _route(
    sample: Sample,
    group: Group,
    correct: Sequence[bool],
    advantage: float,
    algorithm: Algorithm,
    teacher_prompt: Callable,
    seed: str,
) -> Route:
    sibling = choose_sibling(correct, sample.index, f"{seed}/{sample.prompt.id}/{sample.index}")
    shown, missing = NOTHING_SHOWN, None if sibling is not None else "no_correct_sibling"
    if algorithm.branch_weights(sample.verdict.correct, True)[1] > 0:  # it would learn from a teacher
        shown = teacher_prompt(sample, None if sibling is None else group[sibling])
        if shown.ids is not None:
            missing = None
        elif sibling is not None:
            missing = "nothing_to_show"
    policy_weight, distillation_weight = algorithm.branch_weights(
        sample.verdict.correct, shown.ids is not None
    )
    distilled = distillation_weight > 0
    return Route(
        branch=("mixed" if distilled else "grpo") if policy_weight > 0 else ("sdpo" if distilled else "none"),
        policy_weight=policy_weight,
        distillation_weight=distillation_weight,
        advantage=advantage,
        sibling=sibling if distilled and shown.shows_solution else None,
        teacher_ids=shown.ids if distilled else None,
        no_teacher=missing,
        demonstration_cut=shown.demonstration_cut,
    )
