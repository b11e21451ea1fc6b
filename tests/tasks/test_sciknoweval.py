"""Test SciKnowEval: the published rows, the papers' split and prompt, the two rules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paper_cases import CHOICE_CASES
from prepare_sciknoweval import Choice, read_domain, split
from real_data import real_data
from tables import each_row

from megatron_srpo.config.base import ConfigError
from megatron_srpo.tasks.question_index import read_questions
from megatron_srpo.tasks.sciknoweval import verify, verify_strict

ROOT = Path(__file__).parents[2]


def row(number: int, options: int = 4, **changes) -> dict:
    """Return a row as published."""
    return {
        "question": f"Which is {number}?",
        "choices": {"text": [f"it is {place}" for place in range(options)], "label": list("ABCD"[:options])},
        "answerKey": "B",
        "type": f"mcq-{options}-choices",
        "domain": "Biology",
        "details": {"level": "L3", "task": "t", "subtask": "s", "source": "x"},
        "prompt": {"default": "…"},
        **changes,
    }


def write(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


# What datasets 5.2.0 gives for Dataset.from_dict({"i": range(n)}).train_test_split(test_size=0.1, seed=42)
@each_row(
    "rows, train, test, first_test, first_train",
    [
        (10, 9, 1, [5], [6, 0, 7]),
        (25, 22, 3, [15, 16, 19], [20, 9, 7]),
        (500, 450, 50, [473, 132, 472, 46, 40], [489, 454, 164]),
        (800, 720, 80, [96, 796, 587, 400, 447], [115, 610, 514]),
        (935, 841, 94, [273, 829, 2, 881, 740], [707, 147, 594]),
        (2100, 1890, 210, [1522, 1033, 1476, 837, 1966], [743, 608, 2026]),
    ],
)
def test_split_is_hugging_faces(rows, train, test, first_test, first_train):
    choices = [Choice(str(number), "q", ("x",) * 4, "A") for number in range(rows)]
    trained, tested = split(choices)
    assert (len(trained), len(tested)) == (train, test)
    assert [int(choice.id) for choice in tested[:5]] == first_test
    assert [int(choice.id) for choice in trained[:3]] == first_train
    assert sorted(trained + tested, key=lambda choice: int(choice.id)) == choices


def test_prompt_word_for_word():
    system, user = Choice("0", "What is H2O?", ("water", "gold\n", "air", "fire"), "A").messages
    assert system["role"] == "system" and user["role"] == "user"
    assert system["content"] == (
        "\nGiven a question and four options, please select the right answer. Respond in the following"
        " format:\n<reasoning>\n...\n"
        "</reasoning>\n<answer>\n...\n</answer>\n\nFor the answer, only output the letter corresponding to"
        " the correct option (A, B, C, "
        'or D), and nothing else. Do not restate the answer text. For example, if the answer is "A", just'
        " output:\n<answer>\nA\n</answer>\n"
    )
    assert (
        user["content"] == "What is H2O?\n\nA: water\nB: gold\n\nC: air\nD: fire\nPlease reason step by step."
    )
    two = Choice("0", "Is it?", ("yes", "no"), "B").messages[1]["content"]
    assert two == "Is it?\n\nA: yes\nB: no\nPlease reason step by step."


def test_prepare_an_unseen_domain(tmp_path):
    # Biology as DATA.md describes it: 300 four-option and 200 two-option questions, and rows of other kinds
    # between them.
    write(
        tmp_path / "raw/Biology/a.jsonl",
        [row(n) for n in range(300)] + [row(900, type="filling", answerKey="")],
    )
    others = [row(901, details={"level": "L2"}), row(902, type="open-ended-qa")]
    write(
        tmp_path / "raw/Biology/b.jsonl",
        others + [row(n, options=2) for n in range(300, 499)] + [row(3, options=2)],
    )
    command = [
        sys.executable,
        "tools/prepare_sciknoweval.py",
        "--raw",
        str(tmp_path / "raw"),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "biology: 450 training and 50 test questions"
    parts = [read_questions(tmp_path / f"out/biology/{name}.jsonl") for name in ("train", "test")]
    assert [len(part) for part in parts] == [450, 50]
    assert sorted(int(question.id) for part in parts for question in part) == list(range(500))
    # question 3 was asked twice, as ids 3 and 499: a leak where one of them is in the test
    in_test = {question.id for question in parts[1]} & {"3", "499"}
    assert (len(in_test) == 1) == (len(lines) == 2)
    assert {question.answer for part in parts for question in part} == {"B"}


@each_row(
    "broken, said",
    [
        ({"answerKey": "E"}, r"a\.jsonl:2: answerKey: is 'E'; expected one of A, B, C, D"),
        ({"question": None}, r"a\.jsonl:2: question: expected a string"),
        (
            {"choices": {"text": ["x"], "label": ["A", "B", "C", "D"]}},
            r"a\.jsonl:2: choices: expected the labels A, B, C, D",
        ),
        ({"details": None}, r"a\.jsonl:2: details.level: is missing"),
    ],
)
def test_rows_that_are_not_as_published(tmp_path, broken, said):
    write(tmp_path / "a.jsonl", [row(0), row(1, **broken)])
    with pytest.raises(ConfigError, match=said):
        read_domain(tmp_path)


def test_an_extra_text_is_ignored(tmp_path):
    # One published row of Material has five texts and four labels; the papers pair the first four.
    write(
        tmp_path / "a.jsonl", [row(0, choices={"text": ["note", "x", "y", "z", "w"], "label": list("ABCD")})]
    )
    (choice,) = read_domain(tmp_path)
    assert choice.options == ("note", "x", "y", "z")


@each_row("gold, text, right", CHOICE_CASES)
def test_paper_rule_agrees_with_the_table(gold, text, right):
    verdict = verify(gold, text)
    assert (verdict.correct, verdict.reward) == (right, float(right))
    assert (verdict.feedback is None) == right


@each_row(
    "text, right",
    [
        ("<reasoning>x</reasoning>\n<answer>\nB\n</answer>\n", True),
        ("<answer>B</answer>", True),
        ("B", False),
        ("<answer>B", False),
        ("<answer>A</answer><answer>B</answer>", False),  # hedging
        ("I write <answer> tags. <answer>B</answer>", False),
        ("<answer>B</answer> I think.", False),
        ("<answer>C</answer>", False),
        ("<answer>B.</answer>", False),
    ],
)
def test_strict_rule(text, right):
    assert verify_strict("B", text).correct == right


@each_row(
    "text, ok",
    [
        ("<answer>A</answer>", True),
        ("<answer>E</answer>", False),
        ("B", False),
        ("<answer>B", False),
        ("<answer>B</answer><answer>B", False),
    ],
)
def test_format(text, ok):
    assert verify("B", text).format_ok == ok


@each_row("rule", [verify, verify_strict])
def test_feedback_never_holds_the_answer(rule):
    for text in ("", "<answer>A</answer>", "<answer>", "nothing"):
        assert not {"A", "B", "C", "D"} & set(rule("B", text).feedback.split())


def test_published_data():
    # The papers' counts, and the irregularities that DATA.md reports.
    raw = real_data("sciknoweval") / "raw"
    counts, texts = {}, {}
    for domain in ("Chemistry", "Physics", "Material"):
        train, test = split(read_domain(raw / domain))
        counts[domain] = (len(train), len(test))
        seen = {choice.question for choice in train}
        texts[domain] = len({choice.question for choice in test if choice.question in seen})
    assert counts == {"Chemistry": (1890, 210), "Physics": (720, 80), "Material": (841, 94)}
    assert (texts["Physics"], texts["Material"]) == (6, 1)
