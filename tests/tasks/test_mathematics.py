"""Test mathematics: finding the final answer, comparing it, and rows as the benchmarks publish them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from math_cases import CASES, KNOWN_LIMITS
from prepare_math import published_row
from tables import each_row

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.tasks import create_task
from megatron_srpo.tasks.extract import last_answer_block, last_boxed
from megatron_srpo.tasks.mathematics import check_gold, final_answer, verify
from megatron_srpo.tasks.question_index import read_questions

ROOT = Path(__file__).parents[2]


@each_row(
    "text, expected",
    [
        (r"\boxed{5}", "5"),
        (r"so \boxed{1} or \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed{a \boxed{b}}", r"a \boxed{b}"),  # the outermost
        (r"\boxed{1} then \boxed{2", "1"),  # cut off
        (r"I write it in \boxed{. So \boxed{6}.", "6"),  # never closed
        (r"\boxed{\frac{3}{4} or rather \boxed{\frac{3}{5}}", r"\frac{3}{5}"),
        (r"\boxed{a \boxed{b} c \boxed{d}}", r"a \boxed{b} c \boxed{d}"),
        (r"}} \boxed{3} {{", "3"),
        (r"{ \boxed{4} }", "4"),
        (r"\boxed{}", None),
        (r"\boxed{5} so \boxed{}", "5"),  # an empty box after the answer
        (r"\boxed{5} so \boxed{ }", "5"),
        (r"\\boxed{9}", None),  # a line break, then a word
        (r"\boxed 5", "5"),
        (r"so $\boxed 12$.", "12"),
        (r"\boxed 4 or \boxed{5}", "5"),
        (r"boxed{5}", None),
        ("", None),
    ],
)
def test_last_box(text, expected):
    assert last_boxed(text) == expected


@each_row(
    "text, expected",
    [
        (r"\boxed{5} <answer>6</answer>", "5"),
        ("<answer> 6 </answer>", "6"),
        ("<answer>6</answer> <answer>7", "6"),
        ("the answer is 6", None),
        (r"<think>\boxed{5}", None),  # the thinking is not the answer, least of all an unfinished one
        (r"<think>\boxed{5}</think>6", None),
        (r"<think>\boxed{5}</think>\boxed{6}", "6"),
        (r"\boxed{5}</think>\boxed{6}", "6"),  # the prompt has opened the block
        (r"\boxed{5} <think> again", None),
    ],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected
    assert last_answer_block("<answer>6</answer>") == "6"


@each_row(
    "gold, text, right",
    [
        ("933", "<answer>933</answer>", True),  # math-verify alone finds nothing here
        ("933", r"\boxed{933}", True),
        ("933", r"\boxed{0933}", True),
        ("933", r"\boxed{932}", False),
        ("933", "933", False),  # nothing committed to
        ("1/2", r"\boxed{0.5}", True),
        (r"\frac{1}{2}", r"\boxed{\dfrac12}", True),
        (r"$\frac{\sqrt{2}}{2}$", r"\boxed{\frac{1}{\sqrt{2}}}", True),
        (r"\frac{1}{2}", r"\boxed{-\frac{1}{2}}", False),
        ("1,234", r"\boxed{1234}", True),
        ("1234", r"\boxed{1\,234}", True),
        ("235", r"\boxed{1\,234}", False),
        (r"12\,345\,678", r"\boxed{12345678}", True),
        ("18", r"\boxed{18.}", True),
        ("18", "<answer>$18.$</answer>", True),
        ("18", r"<answer>\[18\]</answer>", True),
        ("18", r"\boxed{18\$}", True),
        (r"\$18", r"\boxed{\frac{36}{2}.}", True),
        ("18", r"\boxed{1.8}", False),
        ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
        ("(3, 4)", r"\boxed{(3,4)}", True),
        ("(3, 4)", r"\boxed{(4,3)}", False),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", True),
        (r"2\pi", r"\boxed{6.28}", False),
        ("5", r"\boxed{x = 5}", True),
        ("5", r"\boxed{5\text{ cm}}", True),
        ("5", r"\boxed{5 \text{ or } 6}", False),
        ("5", r"\boxed{4, 5, 6}", False),
        ("5", r"\boxed{" + "5" * 2000 + "}", False),
    ],
)
def test_comparison(gold, text, right):
    pytest.importorskip("math_verify")
    verdict = verify(gold, text)
    assert verdict.correct == right
    assert verdict.correct or gold not in verdict.feedback


def test_hundreds_of_answers_judged_by_hand():
    # E notation, small numbers, units, words, ordered lists, intervals and the forms of published data sets.
    pytest.importorskip("math_verify")
    accepted = {case: verify(case[0], f"\\boxed{{{case[1]}}}").correct for case in CASES}
    assert not [case for case, correct in accepted.items() if correct and not case[2]]  # false "correct"
    refused = {case[:2] for case, correct in accepted.items() if case[2] and not correct}
    assert refused == set(KNOWN_LIMITS)
    assert len(accepted) >= 300 and len(refused) <= 0.01 * len(accepted)


@each_row(
    "gold, said",
    [
        ("18\n#### 18", "is the solution '18\\n#### 18'; expected the short answer (tools/prepare_math.py)"),
        ('["3", "5"]', "is the list"),
        (r"\frac{1}{2", r"which \boxed{} cannot hold"),
        ("9" * 2000, r"which \boxed{} cannot hold"),
        ('{"answer": "3", "tolerance": 0}', "tolerance: is 0; expected a number above 0"),
        ('{"answer": "3"}', 'expected "answer" and "tolerance"'),
    ],
)
def test_golds_that_no_answer_can_match_are_refused(gold, said):
    with pytest.raises(ValueError) as caught:
        check_gold(gold, "Q", verify)
    assert said in str(caught.value)


@each_row("gold", ["18", "[0, 1)", "[1, 2]", r"\{3, 5\}", "1e-05", r"\text{yes}", "70 000", "(1, 2]", "A"])
def test_golds_that_are_accepted(gold):
    check_gold(gold, "Q", verify)


@each_row(
    "row, expected",
    [
        ({"question": "Q", "answer": "She has 2 + 3 = <<2+3=5>>5.\n#### 1,005"}, ("Q", "1005")),  # GSM8K
        ({"problem": "Q", "answer": "204", "solution": "long"}, ("Q", "204")),  # AIME
        ({"problem": "Q", "answer": 204}, ("Q", "204")),
        (
            {"question": "Q", "solution": r"so $\boxed{1.6\times 10^{3}}$ K."},
            ("Q", r"1.6\times 10^{3}"),
        ),  # Minerva
        ({"question": "Q", "final_answer": ["$2$"], "solution": ["long"]}, ("Q", "$2$")),  # OlympiadBench
        ({"problem": "Q", "answer": r"\frac{1}{2}"}, ("Q", r"\frac{1}{2}")),  # HMMT
        (
            {"question": "Q", "final_answer": ["2.5"], "error": "1e-1", "is_multiple_answer": False},
            ("Q", '{"answer": "2.5", "tolerance": "1e-1"}'),
        ),
        ({"question": "Q", "final_answer": ["$1,2$"], "is_multiple_answer": True}, ("Q", r"\{1,2\}")),
        ({"question": "Q", "solution": "no box"}, r"solution: holds no \boxed"),
        ({"question": "Q", "final_answer": ["1", "2"]}, "final_answer: expected one answer, not 2"),
        ({"question": "Q"}, "answer: is missing"),
        ({"answer": "1"}, "question: is missing"),
        ({"question": "Q", "answer": "#### "}, "answer: is empty"),
    ],
)
def test_published_rows(row, expected):
    if isinstance(expected, tuple):
        assert published_row(row) == expected
    else:
        with pytest.raises(ValueError) as caught:
            published_row(row)
        assert expected in str(caught.value)


def test_prepared_file_is_a_task(tmp_path):
    pytest.importorskip("math_verify")
    raw, out = tmp_path / "raw.jsonl", tmp_path / "gsm8k.jsonl"
    raw.write_text(
        json.dumps({"question": "How many?", "answer": "2 + 3\n#### 5"}) + '\n{"question": "Prove it."}\n'
    )
    command = [sys.executable, "tools/prepare_math.py", "--raw", str(raw), "--output", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 questions; left out: 1" in done.stdout and "raw.jsonl:2: answer: is missing" in done.stdout
    assert len(read_questions(out)) == 1
    task = create_task(TaskSource(path=out, test_share=1.0), 1)
    prompt = task.prompt("test", 0)
    assert (task.name, prompt.answer) == ("gsm8k", "5")
    assert (
        prompt.messages[0]["content"]
        == "How many?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


def test_without_math_verify(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"question": "Q", "answer": "1"}\n')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs math-verify; pip install 'megatron_srpo\[tasks\]'"):
        create_task(TaskSource(name="math", path=tmp_path / "x.jsonl"), 1)
