"""reasoning-gym's tasks, where it is installed."""

from __future__ import annotations

import json

import pytest

from megatron_srpo.config import ConfigError, TaskSource
from megatron_srpo.tasks import create_task
from megatron_srpo.tasks.procedural import verify

pytest.importorskip("reasoning_gym")


def make(name="basic_arithmetic", seed=1, **options):
    return create_task(TaskSource(name=f"reasoning_gym/{name}", options=options), seed)


def test_prompts_belong_to_seed_split_and_index():
    task, again, other = make(min_terms=2, max_terms=2), make(min_terms=2, max_terms=2), make(seed=2)
    first = [task.prompt("train", index) for index in range(20)]
    assert [again.prompt("train", index) for index in reversed(range(20))] == first[::-1]
    assert len({prompt.id for prompt in first}) == 20 and task.size("train") is None
    assert [task.prompt("test", index).messages for index in range(20)] != [prompt.messages for prompt in first]
    assert task.prompt("train", 5_000).messages not in [prompt.messages for prompt in first]
    assert other.prompt("train", 0).messages != first[0].messages


@pytest.mark.parametrize("name", ["basic_arithmetic", "spell_backward"])
def test_only_the_full_score_of_the_extracted_answer_counts(name):
    prompt = make(name).prompt("train", 3)
    right = json.loads(prompt.answer)["entry"]["answer"]
    assert verify(prompt.answer, f"Let me think. <answer> {right} </answer>").correct
    assert not verify(prompt.answer, f"The answer is {right}").correct  # partial score in reasoning-gym
    assert not verify(prompt.answer, f"<answer>The answer is {right}</answer>").correct
    assert not verify(prompt.answer, "<answer>wrong</answer>").correct


def test_an_answer_without_form_is_wrong_not_a_failure():
    """reasoning-gym raises ValueError here."""
    prompt = make("prime_factorization").prompt("train", 0)
    assert not verify(prompt.answer, "<answer>zzz</answer>").correct


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("sudokuu", {}, "no dataset 'sudokuu'; known: "),
        ("basic_arithmetic", {"terms": 3}, "task.options: basic_arith"),
        ("game_of_life_halting", {}, "cannot be verified: reasoning-gym takes nonsense for right, or cannot judge it"),
        ("rearc", {}, "cannot be verified: reasoning-gym does not accept its own answers"),
        ("number_sorting", {}, "cannot be verified"),  # evaluates answers
    ],
)
def test_refusals(name, options, said):
    with pytest.raises(ConfigError, match=said):
        make(name, **options)
