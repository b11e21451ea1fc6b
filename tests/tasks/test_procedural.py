"""Test reasoning-gym's tasks, where it is installed."""

from __future__ import annotations

import json

import pytest
from tables import each_row

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.task_section import TaskSection, TaskSource
from megatron_srpo.data.records import Verdict
from megatron_srpo.tasks import create_task
from megatron_srpo.tasks.pool import Job, Pool
from megatron_srpo.tasks.procedural import _entry, verify

pytest.importorskip("reasoning_gym")


def make(name="basic_arithmetic", seed=1, **options):
    return create_task(TaskSource(name=f"reasoning_gym/{name}", options=options), seed)


def test_prompts_belong_to_seed_split_and_index():
    task, again, other = make(min_terms=2, max_terms=2), make(min_terms=2, max_terms=2), make(seed=2)
    first = [task.prompt("train", index) for index in range(20)]
    assert [again.prompt("train", index) for index in reversed(range(20))] == first[::-1]
    assert len({prompt.id for prompt in first}) == 20 and task.size("train") is None
    assert [task.prompt("test", index).messages for index in range(20)] != [
        prompt.messages for prompt in first
    ]
    assert task.prompt("train", 5_000).messages not in [prompt.messages for prompt in first]
    assert other.prompt("train", 0).messages != first[0].messages


@each_row("name", ["basic_arithmetic", "spell_backward"])
def test_only_the_full_score_of_the_extracted_answer_counts(name):
    prompt = make(name).prompt("train", 3)
    right = _entry(prompt.answer)["answer"]
    assert verify(prompt.answer, f"Let me think. <answer> {right} </answer>").correct
    assert not verify(prompt.answer, f"The answer is {right}").correct  # partial score in reasoning-gym
    assert not verify(prompt.answer, f"<answer>The answer is {right}</answer>").correct
    assert not verify(prompt.answer, "<answer>wrong</answer>").correct


def test_partial_scores_above_one_are_not_full():
    # reasoning-gym adds up 1 / length for each letter, also when more text follows.
    task = make("spell_backward")
    for prompt in (task.prompt("train", index) for index in range(30)):
        assert not verify(
            prompt.answer, f"<answer>{_entry(prompt.answer)['answer']} and more</answer>"
        ).correct


def test_an_answer_without_form_is_wrong_not_a_failure():
    # reasoning-gym raises ValueError here.
    prompt = make("prime_factorization").prompt("train", 0)
    assert not verify(prompt.answer, "<answer>zzz</answer>").correct


# one of each kind: tuples in the entry, our own scorers, arithmetic read by sympy, parts, no answer of its
# own
SAMPLE = {
    "rearc": {},
    "bitwise_arithmetic": {},
    "game_of_life_halting": {},
    "intermediate_integration": {},
    "number_sorting": {},
    "polynomial_multiplication": {},
    "composite": {"datasets": [{"name": "simple_integration", "weight": 1, "config": {"max_terms": 3}}]},
    "graph_color": {},
}


@pytest.mark.parametrize("name", SAMPLE)
def test_right_and_wrong_answers_by_a_worker(name):
    # The dataset's own answers (a colouring, where it has none) are right; those with text after them, and
    # other texts, are wrong.
    task = make(name, **SAMPLE[name])
    prompts = [task.prompt("train", index) for index in range(6)]
    entries = [_entry(prompt.answer) for prompt in prompts]
    own = [entry["answer"] or json.dumps(entry["metadata"]["possible_answer"]) for entry in entries]
    pool = Pool({"t": task.verifier}, TaskSection(verifier_workers=1))
    for right, texts in (
        (True, own),
        (False, [f"{answer} 1" for answer in own]),
        (False, ["[]"] * 6),
        (False, ["x"] * 6),
    ):
        jobs = [
            Job("t", prompt.answer, f"<answer>{text}</answer>")
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        verdicts = pool.verify(jobs)
        expected = [right and "Integral(" not in text for text in texts]  # which is the question again
        assert [(verdict.correct, verdict.verifier_failed) for verdict in verdicts] == [
            (one, None) for one in expected
        ]
    pool.close()


@each_row("name, constant", [("complex_arithmetic", "nan"), ("puzzle24", "8*4*1 - 8"), ("coin_flip", "0")])
def test_a_dataset_that_accepts_a_constant_is_refused(name, constant):
    with pytest.raises(ConfigError) as caught:
        make(name)
    assert f"accepts the constant {constant!r} where the answer is " in str(caught.value)


def test_a_dataset_whose_scorer_finds_a_number_in_a_constant_is_admitted():
    # It takes the last number of an answer, which in 8*4*1 - 8 is right for some questions of this seed.
    assert make("gsm_symbolic", seed=1).prompt("train", 0)


@each_row(
    "name, options, said",
    [
        ("sudokuu", {}, "no dataset 'sudokuu'; known: "),
        ("basic_arithmetic", {"terms": 3}, "task.options: basic_arith"),
        ("composite", {}, "Must specify at least one dataset"),
    ],
)
def test_refusals(name, options, said):
    with pytest.raises(ConfigError, match=said):
        make(name, **options)


@pytest.mark.parametrize(
    "correct, said",
    [
        (True, "accepts wrong answers"),
        (False, "does not accept its own answers, or would evaluate them as code"),
    ],
)
def test_a_dataset_that_cannot_be_judged_is_refused(correct, said, monkeypatch):
    # Its verifier would accept everything, or nothing.
    verdict = Verdict(reward=float(correct), correct=correct, format_ok=True)
    monkeypatch.setattr(Pool, "verify", lambda pool, jobs: [verdict] * len(jobs))
    with pytest.raises(ConfigError, match=said):
        make()
