"""Group advantages and sample routing: which loss each sample gets (docs/method.md, sections 1 and 3)."""

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
    """Return A_i = r_i - mean(r) of one prompt's rewards, optionally divided by std + 1e-6 (ddof 1)."""
    mean = statistics.mean(rewards)  # exact: equal rewards have advantage 0, whatever their value
    centred = [reward - mean for reward in rewards]
    if not divide_by_std:
        return centred
    std = (sum(value * value for value in centred) / max(len(rewards) - 1, 1)) ** 0.5
    return [value / (std + 1e-6) for value in centred]


def choose_sibling(correct: Sequence[bool], index: int, seed: str) -> int | None:
    """Return the index of a correct rollout other than `index`, drawn uniformly with `seed`, or None."""
    others = [other for other, is_correct in enumerate(correct) if is_correct and other != index]
    return random.Random(seed).choice(others) if others else None


def has_signal(group: Group, algorithm: Algorithm, feedback: Feedback = "off") -> bool:
    """Return True if the group yields a gradient: a distilled sample, or a trained non-zero advantage."""
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

    Excluded samples do not count in their group's mean, are never shown as a sibling, and get weight 0.

    Args:
        groups: The verified samples of each prompt.
        algorithm: Defines the branch weights.
        encode: Renders chat messages to token ids (see `build_teacher_prompt`).
        max_teacher_prompt_tokens: Limit of a teacher's prompt, in tokens.
        seed: Names run and step. It decides which sibling is shown, so that a replay routes identically.
        feedback: When a teacher sees a failed sample's feedback; without_solution: if no sibling is correct.

    Returns:
        Copies of the samples with `route` set, in the same groups and order.
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
