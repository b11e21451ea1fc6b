"""Test the addition task: its splits, its determinism, its verifier."""

import re

from tables import each_row
from time_limit import time_limit

from megatron_srpo.tasks.addition import Addition, verify


def questions(seed, split, count):
    return [Addition(seed).prompt(split, index).messages[0]["content"] for index in range(count)]


def test_splits_are_disjoint_whatever_the_seed():
    train = {question for seed in range(4) for question in questions(seed, "train", 500)}
    test = {question for seed in range(4) for question in questions(seed, "test", 500)}
    validation = {question for seed in range(4) for question in questions(seed, "validation", 500)}
    assert min(len(train), len(test), len(validation)) > 1900  # hardly any repeats
    assert not train & (test | validation)
    assert len(test & validation) < 100  # drawn separately from the same tenth of all sums


def test_prompts_belong_to_seed_split_and_index():
    task = Addition(3)
    later = [task.prompt("train", index) for index in (5, 1, 3)]
    assert [later[1], later[2], later[0]] == [Addition(3).prompt("train", index) for index in (1, 3, 5)]
    assert questions(3, "train", 20) != questions(4, "train", 20)
    assert questions(3, "train", 20) != questions(3, "test", 20)


def test_prompt_holds_a_sum_and_its_answer():
    ids = set()
    for split in ("train", "test"):
        for index in range(50):
            prompt = Addition(0).prompt(split, index)
            a, b = map(
                int, re.fullmatch(r"Compute (\d{3}) \+ (\d{3})\.", prompt.messages[0]["content"]).groups()
            )
            assert 100 <= a <= 999 and 100 <= b <= 999 and prompt.answer == str(a + b)
            assert [message["role"] for message in prompt.messages] == ["user"] and prompt.ids == ()
            ids.add(prompt.id)
    assert len(ids) == 100


@each_row(
    "text, correct, format_ok",
    [
        ("<answer>579</answer>", True, True),
        ("Let me see. 123 + 456 = <answer>579</answer> Done.", True, True),
        ("<answer>578</answer>", False, True),
        ("<answer> 579\n</answer>", True, True),
        ("<answer>\n\t579</answer>", True, True),
        ("<answer>578</answer><answer>579</answer>", True, True),  # the last counts
        ("<answer>579</answer><answer>578</answer>", False, True),
        ("<answer>579</answer><answer></answer>", False, True),
        ("<answer>579</answer> or <answer>57", True, True),  # the last complete block
        ("<answer>579", False, False),
        ("579</answer>", False, False),
        ("579", False, False),
        ("", False, False),
        ("<answer></answer>", False, True),
        ("<answer>5 79</answer>", False, True),
        ("<answer>123 + 456</answer>", False, True),  # never evaluated
        ("<answer>579.0</answer>", False, True),
        ("<answer>0579</answer>", False, True),
        ("<answer>５７９</answer>", False, True),
        ("<ANSWER>579</ANSWER>", False, False),
        ("<answer >579</answer>", False, False),
        ("</answer>579<answer>", False, False),
    ],
)
def test_verifier(text, correct, format_ok):
    verdict = verify("579", text)
    assert (verdict.correct, verdict.format_ok, verdict.reward) == (correct, format_ok, float(correct))


def test_a_tag_mentioned_before_the_answer_does_no_harm():
    # METHOD §5: the text between the LAST <answer> and </answer> counts.
    verdict = verify("579", "I put it between <answer> tags: <answer>579</answer>")
    assert verdict.correct and verdict.format_ok


@each_row(
    "text",
    [
        "9" * 2_000_000 + "<answer>579</answer>",
        "<answer>" + "9" * 2_000_000,
        "<answer>" * 20_000 + "579</answer>",
        "<answer>" * 100_000,
        "<answer>" + "\n" * 20_000,
        "<answer>1</answer>" * 50_000,
    ],
)
def test_huge_text_is_judged_at_once(text):
    # Degenerate responses must not cost quadratic time; the limit is far more than a linear scan needs.
    with time_limit(5):
        verdict = verify("579", text)
    assert verdict.correct == (text.endswith("579</answer>"))
