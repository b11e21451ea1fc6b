"""Test tool use: the published data, the parser, the two rules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paper_cases import NESTED, NONE, ONE, OPTIONAL, SAME, TOOL_CASES, TWO, said
from prepare_tool_use import read_toolalpaca
from real_data import real_data
from tables import each_row

from megatron_srpo.config.base import ConfigError
from megatron_srpo.tasks.question_index import read_questions
from megatron_srpo.tasks.tool_use import parse_calls, verify, verify_strict

ROOT = Path(__file__).parents[2]

API = {
    "Name": "Cats",
    "Description": "All about cats",
    "NLDocumentation": "getCat: One cat.\nParameters: {}\n",
    "Instructions": ["Show me a cat.", "Show me that cat again.", "Nothing to do."],
    "Golden_Answers": [
        [{"Action": "getCat", "Action_Input": "{}"}],
        [{"Action": "getCat", "Action_Input": '{"id": ${id from getCat}}'}],
        [],
    ],
}
FINE = "Status Code: 200. Response: {}"


def step(tool, text, observation=FINE):
    return [[tool, text, f" I need {tool}.\nAction: {tool}\nAction Input: {text}"], observation]


# Every shape that ToolAlpaca's own programs write (instance_generation/generation.py, agent/tools.py); the
# words are ours.
TRAINING = {
    **{key: API[key] for key in ("Name", "Description", "NLDocumentation", "Instructions")},
    "Function_Description": {"getCat": "…", "components": ""},
    "Function_Projection": {"getCat": ["/cat", "get"]},
    "Instances": [
        {
            "input": "Show me a cat.\nHint: use getCat",
            "intermediate_steps": [
                step("getCat", 'Well: {"size": {"min": 1}}\n')
            ],  # it read from brace to brace
            "output": "Here it is.",
            "Final Thought": "I can respond now.",
        },
        {
            "input": "A cat for $5.",
            "intermediate_steps": [step("getCat", '{"price": "$5"}'), step("getCat", "{}")],
            "output": "…",
        },
        {"input": "Broken.", "intermediate_steps": [step("getCat", "{size: 1}")], "output": "…"},
        {
            "input": "Which one?",
            "intermediate_steps": [
                step("getDetails", '{"Question": "Which?"}', "Any."),
                step("getCat", "{}"),
            ],
        },
        {
            "input": "A dog?",
            "intermediate_steps": [
                step("getDog", "{}", "`getDog` is not a valid action. The action must be one of ['getCat'].")
            ],
        },
        {
            "input": "Twice.",
            "intermediate_steps": [
                step("getCat", "{}", "Status Code: 400. Response: …"),
                step("getCat", "{}"),
            ],
        },
        {"input": "Nothing to do.", "intermediate_steps": [], "output": "…"},
        {"error": "the simulation failed"},
        "{'input': 'not even JSON'}",
    ],
}
UNTOUCHED = {"Name": "No documentation", "Description": "", "Instances": []}
PROMPT = (
    "Your task is to answer the user's question using available tools. \nYou have access to the following"
    " tools:\nName: Cats\n"
    "Description: All about cats\nDocumentation:\ngetCat: One cat.\nParameters: {}\n\nUse the following"
    " format:\n"
    "Thought: you should always think about what to do\nAction: the action to take, should be one of the"
    " tool names.\n"
    "Action Input: the input to the action, must be in JSON format. All of the action input must be"
    " realistic and from the user.\n\n"
    "Begin!\nQuestion: Show me a cat."
)


@each_row("gold, text, right", TOOL_CASES)
def test_paper_rule_agrees_with_the_table(gold, text, right):
    verdict = verify(gold, text)
    assert (verdict.correct, verdict.reward) == (right, float(right))
    assert (verdict.feedback is None) == right


@each_row(
    "gold, text, right",
    [
        (TWO, said(("login", '{"user": "ann"}'), ("list", '{"limit": 5}')), True),
        (TWO, said(("list", '{"limit": 5}'), ("login", '{"user": "ann"}')), True),
        (
            TWO,
            said(("login", '{"limit": 5}'), ("list", '{"user": "ann"}')),
            False,
        ),  # what merging does not see
        (
            SAME,
            said(("search", '{"size": "large", "page": 1}'), ("search", '{"size": "large", "page": 1}')),
            False,
        ),
        (
            SAME,
            said(("search", '{"size": "large", "page": 1}'), ("search", '{"size": "small", "page": 1}')),
            True,
        ),
        (NESTED, said(("update", '{"data": {"tags": ["a", "b"], "url": "http://x/y.jpg"}, "id": 7}')), True),
        (NESTED, said(("update", '{"data": {"tags": ["b", "a"], "url": "http://x/y.jpg"}, "id": 7}')), False),
        (ONE, said(("search", '{"q": "cat", "page": 1.0}')), True),
        (ONE, said(("search", '{"q": "cat", "page": true}')), False),
        (ONE, said(("search", '{"q": "cat", "page": "1"}')), False),
        (ONE, said(("search", '{"q": "dog", "q": "cat", "page": 1}')), False),
        (ONE, said(("search", '{"q": "cat", "page": 1} // done')), False),
        (
            ONE,
            'So Action: search\nAction Input: {}\nAction: search\nAction Input: {"q": "cat", "page": 1}',
            False,
        ),
        (ONE, 'Action Input: {"q": "cat", "page": 1}\nAction: search', False),
        (NONE, "Action: getAll\nAction: getAll\nAction Input: {}\nAction Input: {}", False),
        (OPTIONAL, said(("getUser", '{"id": "u1"}')), True),
        (OPTIONAL, said(("getUser", '{"id": "u1"}'), ("update", '{"id": "u1", "on": true}')), True),
        (OPTIONAL, said(("getUser", '{"id": "u1"}'), ("update", '{"id": "u1", "on": false}')), False),
        (OPTIONAL, said(("update", '{"id": "u1", "on": true}')), False),
    ],
)
def test_strict_rule(gold, text, right):
    assert verify_strict(gold, text).correct == right


def test_parser():
    calls = parse_calls('Action: a\nAction Input: {"x": {"y": [1, {"z": "}"}]}}\nAction: b Action Input: {}')
    assert calls == (["a", "b"], [{"x": {"y": [1, {"z": "}"}]}}, {}], None)
    assert parse_calls("Action: a\nAction Input: {oops}").malformed == "Action Input 1 is not a JSON object"
    assert parse_calls("hello").malformed and not verify(ONE, "hello").format_ok


@each_row("rule", [verify, verify_strict])
@each_row("depth", [100, 400, 600, 800, 950, 5_000])
def test_inputs_of_any_depth_are_judged(rule, depth):
    # An exception would exclude the sample from its group instead of counting it as wrong.
    assert not rule(ONE, said(("search", '{"q": ' * depth + "1" + "}" * depth))).correct


@each_row("rule", [verify, verify_strict])
def test_feedback_never_holds_the_answer(rule):
    for text in ("", said(("search", '{"q": "dog"}')), "Action: search\nAction Input: {"):
        feedback = rule(ONE, text).feedback
        assert feedback and "cat" not in feedback and "search" not in feedback


def test_prepare_evaluation_and_training_files(tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps([API]))
    (tmp_path / "train.json").write_text(json.dumps([UNTOUCHED, TRAINING]))
    files = ["--train", str(tmp_path / "train.json"), "--test", str(tmp_path / "eval.json")]
    command = [sys.executable, "tools/prepare_tool_use.py", *files, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    train, test = done.stdout.splitlines()
    assert test.endswith("1 questions; left out: a call needs an earlier call's result 1, no calls 1")
    assert train.endswith(
        "2 questions; left out: the simulation failed 2, a call's input is no JSON object 1, a call asks the"
        " user back 1,"
        " a call is to no tool of the API 1, a call failed 1, no calls 1"
    )
    for name, gold in (
        ("test", ["{}"]),
        ("train", ['{"size": {"min": 1}}']),
        ("train", ['{"price": "$5"}', "{}"]),
    ):
        question = read_questions(tmp_path / f"out/{name}.jsonl")[len(gold) - 1]
        asked = "A cat for $5." if len(gold) == 2 else "Show me a cat."
        assert question.messages == ({"role": "user", "content": PROMPT.replace("Show me a cat.", asked)},)
        text = said(*(("getCat", value) for value in gold))
        assert verify(question.answer, text).correct and verify_strict(question.answer, text).correct


@each_row(
    "content, said_",
    [
        ("{", "is not a UTF-8 JSON file"),
        ("[]", "expected a list of APIs"),
        ('[{"Name": "x", "Description": 1}]', "API 0: Description: expected a string"),
        ('[{"Name": "x", "Description": "", "NLDocumentation": ""}]', "neither Golden_Answers nor Instances"),
        ("[1]", "API 0: expected an object"),
        (
            '[{"Name": "x", "Description": "", "NLDocumentation": "", "Golden_Answers": [[]],'
            ' "Instructions": []}]',
            "expected one answer for each instruction",
        ),
        (
            '[{"Name": "x", "Description": "", "NLDocumentation": "", "Instances": [{"intermediate_steps":'
            " [1]}]}]",
            r"Instances: intermediate_steps: expected \[\[tool, input, log\], observation\]",
        ),
    ],
)
def test_files_that_are_not_as_published(tmp_path, content, said_):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said_):
        list(read_toolalpaca(file))


def test_published_data():
    # The papers' 68 questions load unchanged, and equal what the published evaluation file gives; its gold
    # answers are right.
    folder = real_data("toolalpaca")
    papers = read_questions(folder / "sdpo_tooluse_test.jsonl")
    ours = [question for question, _ in read_toolalpaca(folder / "eval_simulated.json") if question]
    assert len(papers) == 68
    assert [question.messages[0]["content"] for question in papers] == [question.prompt for question in ours]
    assert [json.loads(question.answer) for question in papers] == [question.calls for question in ours]
    for question in papers:
        text = said(*((call["Action"], call["Action_Input"]) for call in json.loads(question.answer)))
        assert verify(question.answer, text).correct
        assert verify_strict(question.answer, text.replace("[Optional]", "")).correct
