"""Test advantages and routes against METHOD §3's table, written out by hand."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import encode_bytes, make_group
from tables import each_row

from megatron_srpo.algorithm import METHODS
from megatron_srpo.algorithm.methods.grpo import GRPO
from megatron_srpo.algorithm.methods.sdpo import SDPO
from megatron_srpo.algorithm.methods.srpo import SRPO
from megatron_srpo.algorithm.routing import choose_sibling, group_advantages, has_signal, route_groups
from megatron_srpo.data.outline import outline
from megatron_srpo.data.records import Verdict

PLENTY = 10_000


def routes(algorithm, correct, limit=PLENTY, seed="1/1"):
    """Return the routes of one group's samples."""
    (group,) = route_groups([make_group(correct)], algorithm, encode_bytes, limit, seed)
    return [sample.route for sample in group]


# correct -> (branch, z^GRPO, z^SDPO) of every sample
TABLE = {
    "srpo": {
        (1, 0, 0, 1): [("grpo", 1, 0), ("sdpo", 0, 1), ("sdpo", 0, 1), ("grpo", 1, 0)],
        (1, 0, 0, 0): [("grpo", 1, 0), ("sdpo", 0, 1), ("sdpo", 0, 1), ("sdpo", 0, 1)],
        (0, 0, 0, 0): [("grpo", 1, 0)] * 4,
        (1, 1, 1, 1): [("grpo", 1, 0)] * 4,
        (0, 1): [("sdpo", 0, 1), ("grpo", 1, 0)],
    },
    "grpo": {
        (1, 0, 0, 1): [("grpo", 1, 0)] * 4,
        (1, 0, 0, 0): [("grpo", 1, 0)] * 4,
        (0, 0, 0, 0): [("grpo", 1, 0)] * 4,
        (1, 1, 1, 1): [("grpo", 1, 0)] * 4,
    },
    "sdpo": {
        (1, 0, 0, 1): [("sdpo", 0, 1)] * 4,
        (1, 0, 0, 0): [("none", 0, 0), ("sdpo", 0, 1), ("sdpo", 0, 1), ("sdpo", 0, 1)],
        (0, 0, 0, 0): [("none", 0, 0)] * 4,
        (1, 1, 1, 1): [("sdpo", 0, 1)] * 4,
    },
    "advantage_mix": {
        (1, 0, 0, 1): [("mixed", 0.9, 0.1)] * 4,
        (1, 0, 0, 0): [("grpo", 0.9, 0), ("mixed", 0.9, 0.1), ("mixed", 0.9, 0.1), ("mixed", 0.9, 0.1)],
        (0, 0, 0, 0): [("grpo", 0.9, 0)] * 4,
        (1, 1, 1, 1): [("mixed", 0.9, 0.1)] * 4,
    },
}
ALGORITHMS = {name: method() for name, method in METHODS.items()}
CASES = [(name, correct) for name, table in TABLE.items() for correct in table]


@each_row("name, correct", CASES)
def test_routing_table(name, correct):
    found = routes(ALGORITHMS[name], correct)
    for route, (branch, policy, distillation) in zip(found, TABLE[name][correct], strict=True):
        assert (route.branch, route.policy_weight) == (branch, policy)
        assert route.distillation_weight == pytest.approx(distillation)
        assert (route.teacher_ids is not None) == (distillation > 0) == (route.sibling is not None)


def test_advantages_are_of_the_complete_group_whatever_the_route():
    for name, correct in CASES:
        mean = sum(correct) / len(correct)
        assert [route.advantage for route in routes(ALGORITHMS[name], correct)] == [c - mean for c in correct]


def test_uniform_groups_have_advantage_exactly_zero():
    for size in range(2, 20):
        for value in (0, 1, 0.1, 0.2, 0.7):
            for divide in (False, True):
                assert group_advantages([float(value)] * size, divide) == [0.0] * size


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.booleans())
@settings(deadline=None, max_examples=100)
def test_advantages_closed_form(rewards, divide):
    values = np.array(rewards)
    expected = values - values.mean()
    if divide:
        expected = expected / (values.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(group_advantages(rewards, divide), expected, rtol=1e-6, atol=1e-8)


def test_advantage_std_is_a_switch_of_the_algorithm():
    plain, divided = routes(SRPO(), (1, 0, 0, 1)), routes(SRPO(advantage_std=True), (1, 0, 0, 1))
    assert plain[0].advantage == 0.5
    assert divided[0].advantage == pytest.approx(0.5 / (np.std([1, 0, 0, 1], ddof=1) + 1e-6))


@given(st.lists(st.booleans(), min_size=2, max_size=10))
@settings(deadline=None, max_examples=100)
def test_srpo_never_sends_a_negative_advantage_to_grpo(correct):
    for route in routes(SRPO(), correct):
        assert route.policy_weight == 0 or route.advantage >= 0
        assert route.policy_weight + route.distillation_weight == 1


def test_other_algorithms_do_have_negative_advantages():
    # If no algorithm had them, the test above could not fail.
    assert min(route.advantage for route in routes(GRPO(), (1, 0))) < 0


@given(st.lists(st.booleans(), min_size=1, max_size=10), st.integers(0, 10**6))
@settings(deadline=None, max_examples=200)
def test_sibling_is_another_correct_one(correct, seed):
    for index in range(len(correct)):
        sibling = choose_sibling(correct, index, f"{seed}/{index}")
        candidates = [other for other in range(len(correct)) if correct[other] and other != index]
        assert (sibling in candidates) if candidates else sibling is None


def test_sibling_is_uniform_and_deterministic():
    correct = [True, False, True, True, False, True]
    draws = [choose_sibling(correct, 2, f"run/{number}") for number in range(3000)]
    assert draws == [choose_sibling(correct, 2, f"run/{number}") for number in range(3000)]
    counts = Counter(draws)
    assert set(counts) == {0, 3, 5}
    for count in counts.values():  # expected 1000, standard deviation 26
        assert abs(count - 1000) < 130


def test_routing_is_decided_by_the_seed_alone():
    # The same seed gives the same siblings, also when a group is routed alone instead of with others (as
    # ranks do).
    groups = [make_group((1, 0, 1, 0, 1, 1, 0, 0), prompt_id=f"p{number}") for number in range(10)]

    def siblings(groups, seed):
        return [
            [sample.route.sibling for sample in group]
            for group in route_groups(groups, SRPO(), encode_bytes, PLENTY, seed)
        ]

    together = siblings(groups, "1/1")
    assert together == siblings(groups, "1/1")
    assert together == [siblings([group], "1/1")[0] for group in groups]
    assert together != siblings(groups, "1/2")
    assert len({str(row) for row in together}) > 1  # the prompt's id takes part


def test_teacher_sees_the_question_and_the_chosen_siblings_answer():
    for index, route in enumerate(routes(SDPO(), (1, 0, 1, 1))):
        assert route.sibling != index
        shown = f"[user]What is it?\nCorrect solution:\n\nanswer <{route.sibling}>"
        text = bytes(route.teacher_ids).decode()
        assert text == f"{shown}\n\nCorrectly solve the original question."
        assert not route.demonstration_cut


def test_sibling_is_shown_without_its_thoughts():
    right, wrong = make_group((1, 0))
    right = right.model_copy(update={"text": "<think>secret</think>It is 4."})
    ((_, routed),) = route_groups([(right, wrong)], SRPO(), encode_bytes, PLENTY, "s")
    assert b"solution:\n\nIt is 4.\n\nCorrectly" in bytes(routed.route.teacher_ids)


def test_grpo_builds_no_teacher_prompt():
    def refuse(messages):
        raise AssertionError("GRPO has no teacher")

    (routed,) = route_groups([make_group((1, 0, 1))], GRPO(), refuse, PLENTY, "s")
    assert all(sample.route.teacher_ids is None and sample.route.branch == "grpo" for sample in routed)


def test_srpo_builds_teacher_prompts_for_distilled_samples_alone():
    seen = []

    def count(messages):
        seen.append(messages)
        return encode_bytes(messages)

    route_groups(
        [make_group((1, 0, 1)), make_group((1, 1)), make_group((0, 0, 0))], SRPO(), count, PLENTY, "s"
    )
    assert len(seen) == 1


def test_cut_demonstration_is_marked():
    full_length = len(routes(SRPO(), (1, 0))[1].teacher_ids)
    route = routes(SRPO(), (1, 0), limit=full_length - 3)[1]
    assert route.branch == "sdpo" and route.demonstration_cut and len(route.teacher_ids) == full_length - 3


@pytest.mark.parametrize(
    "name, expected",
    [
        ("srpo", ("grpo", 1, 0)),
        ("sdpo", ("none", 0, 0)),
        ("advantage_mix", ("grpo", 0.9, 0)),
        ("grpo", ("grpo", 1, 0)),
    ],
)
def test_no_teacher_without_anything_to_show(name, expected):
    route = routes(ALGORITHMS[name], (1, 0), limit=20)[1]
    assert (route.branch, route.policy_weight, route.distillation_weight) == expected
    assert route.teacher_ids is None and route.sibling is None and not route.demonstration_cut
    assert route.no_teacher == (None if name == "grpo" else "nothing_to_show")


def test_teacherless_samples_are_counted():
    from megatron_srpo.observe.metrics import rollout_metrics

    groups = [make_group((1, 0, 0, 0), "a"), make_group((0, 0, 0, 0), "b"), make_group((1, 1, 1, 1), "c")]
    fits = rollout_metrics(
        [outline(group) for group in route_groups(groups, SRPO(), encode_bytes, PLENTY, "s")]
    )
    assert fits["teacherless_failed_share"] == pytest.approx(4 / 7)  # 3 failed with a sibling, 4 without
    assert fits["teacher_prompts_empty"] == 0
    assert fits["sdpo_sample_share"] == pytest.approx(3 / 12)
    assert fits["zero_advantage_share"] == pytest.approx(2 / 3)
    tight = rollout_metrics([outline(group) for group in route_groups(groups, SRPO(), encode_bytes, 20, "s")])
    assert tight["teacherless_failed_share"] == 1
    assert tight["teacher_prompts_empty"] == 3
    assert tight["sdpo_sample_share"] == 0


# ---- samples without a verdict
# ---------------------------------------------------------------------------------


def without_verdict(group, *indices):
    """Return the group with these samples excluded: reward 0, as the verifier pool gives it."""
    failed = Verdict(reward=0.0, correct=False, format_ok=False, verifier_failed="timeout", excluded=True)
    return tuple(
        sample.model_copy(update={"verdict": failed}) if sample.index in indices else sample
        for sample in group
    )


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "correct, excluded, divide",
    [
        ((1, 0, 0, 1, 0), (1,), False),
        ((1, 0, 0, 1, 0), (0, 4), True),
        ((1, 0, 0, 0), (1, 2, 3), True),
        ((1, 0), (0, 1), False),
    ],
)
def test_excluded_samples_take_no_part(name, divide, correct, excluded):
    # The other samples get the routes of a group without the excluded ones; these learn nothing and are never
    # shown.
    algorithm = ALGORITHMS[name].model_copy(update={"advantage_std": divide})
    (group,) = route_groups(
        [without_verdict(make_group(correct), *excluded)], algorithm, encode_bytes, PLENTY, "s"
    )
    judged = [index for index in range(len(correct)) if index not in excluded]
    rewards = np.array([correct[index] for index in judged], dtype=float)
    for index in excluded:
        route = group[index].route
        assert (route.branch, route.policy_weight, route.distillation_weight, route.advantage) == (
            "none",
            0,
            0,
            0,
        )
        assert route.teacher_ids is None and route.no_teacher is None
    for index in judged:
        route, expected = group[index].route, correct[index] - rewards.mean()
        if divide:
            expected /= (rewards.std(ddof=1) if len(judged) > 1 else 0.0) + 1e-6
        assert route.advantage == pytest.approx(expected)
        siblings = [other for other in judged if correct[other] and other != index]
        assert route.sibling is None or route.sibling in siblings
        weights = algorithm.branch_weights(bool(correct[index]), bool(siblings))
        assert (route.policy_weight, route.distillation_weight) == weights


def test_a_sample_scored_zero_instead_counts():
    # `verifier_failed: zero` gives an ordinary failed sample.
    zero = Verdict(reward=0.0, correct=False, format_ok=False, verifier_failed="timeout", excluded=False)
    right, wrong = make_group((1, 0))
    (group,) = route_groups(
        [(right, wrong.model_copy(update={"verdict": zero}))], SRPO(), encode_bytes, PLENTY, "s"
    )
    assert [sample.route.advantage for sample in group] == [0.5, -0.5] and group[1].route.branch == "sdpo"


def test_metrics_leave_excluded_samples_out():
    from megatron_srpo.observe.metrics import rollout_metrics

    unjudged = without_verdict(make_group((0, 0), "r"), 0, 1)
    groups = [without_verdict(make_group((1, 0, 0, 1)), 1), make_group((0, 0, 0, 0), "q"), unjudged]
    metrics = rollout_metrics(
        [outline(group) for group in route_groups(groups, SRPO(), encode_bytes, PLENTY, "s")]
    )
    assert metrics["pass_rate"] == metrics["reward_mean"] == pytest.approx(2 / 7)
    assert metrics["sdpo_sample_share"] == metrics["sdpo_token_share"] == pytest.approx(1 / 7)
    assert metrics["zero_advantage_share"] == 1 / 2
    assert metrics["verifier_failed_share"] == pytest.approx(3 / 10)
    assert metrics["format_rate"] == 1
    assert not any("/" in key for key in metrics)  # one task: no numbers by task


# ---- environment feedback
# --------------------------------------------------------------------------------------------


def with_feedback(group, feedback="it broke"):
    """Return the group with feedback on every sample, the correct ones too."""
    return tuple(
        sample.model_copy(update={"verdict": sample.verdict.model_copy(update={"feedback": feedback})})
        for sample in group
    )


def teacher_texts(algorithm, correct, mode, limit=PLENTY):
    (group,) = route_groups([with_feedback(make_group(correct))], algorithm, encode_bytes, limit, "s", mode)
    return [
        None if sample.route.teacher_ids is None else bytes(sample.route.teacher_ids).decode()
        for sample in group
    ]


ALONE = (
    "[user]What is it?\nThe following is feedback from your unsuccessful earlier attempt:\n\nit broke\n\n"
    "Correctly solve the original question."
)


def test_feedback_is_off_by_default():
    assert all(text is None for text in teacher_texts(SRPO(), (0, 0), "off"))
    assert "it broke" not in teacher_texts(SRPO(), (1, 0), "off")[1]
    (group,) = route_groups([with_feedback(make_group((0, 0)))], SRPO(), encode_bytes, PLENTY, "s")
    assert all(sample.route.no_teacher == "no_correct_sibling" for sample in group)


@pytest.mark.parametrize("algorithm", [SRPO(), SDPO()], ids=lambda algorithm: algorithm.name)
def test_feedback_alone_teaches_where_there_is_no_solution(algorithm):
    for mode in ("without_solution", "always"):
        assert teacher_texts(algorithm, (0, 0), mode) == [ALONE, ALONE]
    assert "it broke" not in teacher_texts(algorithm, (1, 0), "without_solution")[1]
    both = teacher_texts(algorithm, (1, 0), "always")[1]
    assert both == (
        "[user]What is it?\nCorrect solution:\n\nanswer <0>\n\n"
        "The following is feedback from your unsuccessful earlier attempt:\n\n"
        "it broke\n\nCorrectly solve the original question."
    )


def test_feedback_routes_like_a_teacher():
    (group,) = route_groups(
        [with_feedback(make_group((0, 0)))], SRPO(), encode_bytes, PLENTY, "s", "without_solution"
    )
    for sample in group:
        assert (sample.route.branch, sample.route.sibling, sample.route.no_teacher) == ("sdpo", None, None)
    (silent,) = route_groups([make_group((0, 0))], SRPO(), encode_bytes, PLENTY, "s", "always")
    assert all(
        sample.route.branch == "grpo" and sample.route.no_teacher == "no_correct_sibling" for sample in silent
    )


def test_right_samples_get_no_feedback():
    texts = teacher_texts(SDPO(), (1, 1), "always")
    assert all("it broke" not in text for text in texts)
    assert teacher_texts(SDPO(), (1, 0), "always")[0] is None  # a lone right one has no teacher


def test_feedback_that_does_not_fit_is_no_teacher():
    assert teacher_texts(SRPO(), (0, 0), "always", limit=len(ALONE)) == [ALONE, ALONE]
    assert teacher_texts(SRPO(), (0, 0), "always", limit=len(ALONE) - 1) == [None, None]


def test_a_solution_that_is_all_thought_leaves_the_feedback():
    right, wrong = with_feedback(make_group((1, 0)))
    right = right.model_copy(update={"text": "<think>only thoughts"})
    ((_, routed),) = route_groups([(right, wrong)], SRPO(), encode_bytes, PLENTY, "s", "without_solution")
    assert bytes(routed.route.teacher_ids).decode() == ALONE


@pytest.mark.parametrize("mode", ["off", "without_solution", "always"])
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_signal_is_what_the_routes_make_of_a_group(algorithm, mode):
    # A group has a signal if and only if one of its routes changes the weights.
    for correct in ((1, 1), (0, 0), (1, 0), (1, 0, 0)):
        for has_feedback in (False, True):
            for excluded in ((), (0,), (1,), (0, 1)):
                group = without_verdict(
                    with_feedback(make_group(correct)) if has_feedback else make_group(correct), *excluded
                )
                (routed,) = route_groups([group], algorithm, encode_bytes, PLENTY, "s", mode)
                moves = [
                    sample.route.distillation_weight or sample.route.policy_weight * sample.route.advantage
                    for sample in routed
                ]
                assert has_signal(group, algorithm, mode) == any(moves), (correct, has_feedback, excluded)


def test_a_solution_that_does_not_fit_leaves_the_feedback_that_does():
    right, wrong = with_feedback(make_group((1, 0)))
    ((_, routed),) = route_groups([(right, wrong)], SRPO(), encode_bytes, len(ALONE), "s", "always")
    assert bytes(routed.route.teacher_ids).decode() == ALONE
    assert routed.route.sibling is None and routed.route.demonstration_cut
