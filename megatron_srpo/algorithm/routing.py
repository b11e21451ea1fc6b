"""Group advantages and sample routing: what each sample learns (docs/method.md, sections 1 and 3)."""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from megatron_srpo.algorithm import reprompt
from megatron_srpo.algorithm.reprompt import NOTHING_SHOWN, TeacherPrompt
from megatron_srpo.algorithm.settings import Algorithm
from megatron_srpo.data.records import Group, Route, Sample

Encode = Callable[[list[dict[str, str]]], list[int]]
Feedback = Literal["off", "without_solution", "always"]
ShowTeacher = Callable[[Sample, Sample | None], TeacherPrompt]


def group_advantages(rewards: Sequence[float], divide_by_std: bool = False) -> list[float]:
    """Return A_i = r_i - mean(r) of one prompt's rewards; optionally / (std + 1e-6), ddof 1."""
    mean = statistics.mean(rewards)  # exact: equal rewards have advantage 0, also if they are neither 0 nor 1
    centred = [reward - mean for reward in rewards]
    if not divide_by_std:
        return centred
    std = (sum(value * value for value in centred) / max(len(rewards) - 1, 1)) ** 0.5
    return [value / (std + 1e-6) for value in centred]


def choose_sibling(correct: Sequence[bool], index: int, seed: str) -> int | None:
    """Choose a correct rollout other than `index`, uniformly by `seed`; None if there is none."""
    others = [other for other, is_correct in enumerate(correct) if is_correct and other != index]
    return random.Random(seed).choice(others) if others else None


def has_signal(group: Group, algorithm: Algorithm, feedback: Feedback = "off") -> bool:
    """Return True if a sample of the group has a non-zero advantage that is trained, or a teacher."""
    verdicts = [sample.judged for sample in group if not sample.judged.excluded]
    differ = len({verdict.reward for verdict in verdicts}) > 1
    right = sum(verdict.correct for verdict in verdicts)
    for verdict in verdicts:
        has_feedback = feedback != "off" and not verdict.correct and bool(verdict.feedback)
        has_teacher = right > verdict.correct or has_feedback
        policy_weight, distillation_weight = algorithm.branch_weights(verdict.correct, has_teacher)
        if distillation_weight > 0 or differ and policy_weight > 0:
            return True
    return False


def route_groups(
    groups: Sequence[Group],
    algorithm: Algorithm,
    encode: Encode,
    max_teacher_prompt_tokens: int,
    seed: str,
    feedback: Feedback = "off",
) -> list[Group]:
    """Give each sample its advantage, branch weights and, if it is distilled, its teacher's prompt.

    An excluded sample takes no part: neither in its group's mean nor as a sibling, and it learns nothing.

    Args:
        encode: Renders chat messages to ids (see `build_teacher_prompt`).
        seed: Names run and step, and so decides which sibling is shown: a replay routes exactly alike.
        feedback: When a teacher sees a failed sample's feedback; `without_solution`: if no sibling is right.
    """

    def teacher_prompt(sample: Sample, sibling: Sample | None) -> TeacherPrompt:
        demonstration = reprompt.clean_demonstration(sibling.text) if sibling else ""
        shows_feedback = feedback == "always" or (feedback == "without_solution" and not demonstration)
        shown = sample.judged.feedback if shows_feedback and not sample.judged.correct else None
        messages, limit = sample.prompt.messages, max_teacher_prompt_tokens
        return reprompt.build_teacher_prompt(messages, demonstration, encode, limit, shown)

    return [_route_group(group, algorithm, teacher_prompt, seed) for group in groups]


def _route_group(group: Group, algorithm: Algorithm, teacher_prompt: ShowTeacher, seed: str) -> Group:
    rewards = [sample.judged.reward for sample in group if not sample.judged.excluded]
    advantages = iter(group_advantages(rewards, algorithm.advantage_std) if rewards else [])
    correct = [sample.judged.correct and not sample.judged.excluded for sample in group]
    routed: list[Sample] = []
    for sample in group:
        if sample.judged.excluded:
            route = Route(branch="none", policy_weight=0.0, distillation_weight=0.0, advantage=0.0)
        else:
            route = _route(sample, group, correct, next(advantages), algorithm, teacher_prompt, seed)
        routed.append(sample.model_copy(update={"route": route}))
    return tuple(routed)


def _route(
    sample: Sample,
    group: Group,
    correct: Sequence[bool],
    advantage: float,
    algorithm: Algorithm,
    teacher_prompt: ShowTeacher,
    seed: str,
) -> Route:
    sibling = choose_sibling(correct, sample.index, f"{seed}/{sample.prompt.id}/{sample.index}")
    shown, missing = NOTHING_SHOWN, None if sibling is not None else "no_correct_sibling"
    if algorithm.branch_weights(sample.judged.correct, True)[1] > 0:
        shown = teacher_prompt(sample, None if sibling is None else group[sibling])
        if shown.ids is not None:
            missing = None
        elif sibling is not None:
            missing = "nothing_to_show"
    has_teacher = shown.ids is not None
    policy_weight, distillation_weight = algorithm.branch_weights(sample.judged.correct, has_teacher)
    distilled = distillation_weight > 0
    branch = "grpo" if policy_weight > 0 else "none"
    if distilled:
        branch = "mixed" if policy_weight > 0 else "sdpo"
    return Route(
        branch=branch,
        policy_weight=policy_weight,
        distillation_weight=distillation_weight,
        advantage=advantage,
        sibling=sibling if distilled and shown.shows_solution else None,
        teacher_ids=tuple(shown.ids) if distilled and shown.ids is not None else None,
        no_teacher=missing,
        demonstration_cut=shown.demonstration_cut,
    )
