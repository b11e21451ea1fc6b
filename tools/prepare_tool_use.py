"""Convert ToolAlpaca as published to questions with gold calls.

    python tools/prepare_tool_use.py --train train_data.json --test eval_simulated.json --output DIR

Either file alone will do. Then `task: {name: tool_use, path: DIR}`. From eval_simulated.json come the papers'
68 test questions; how the papers chose their 4046 training questions is not published: here every instance is
used whose calls are complete, are to the API's own tools, and did not fail. Arguments taken from an earlier
call's result are not marked in that file, so some of these questions cannot be answered.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from _prepare import print_report, write_questions

from megatron_srpo.config.base import ConfigError
from megatron_srpo.tasks.tool_use import gold_calls

PROMPT = """\
Your task is to answer the user's question using available tools. \n\
You have access to the following tools:
Name: {name}
Description: {description}
Documentation:
{documentation}
Use the following format:
Thought: you should always think about what to do
Action: the action to take, should be one of the tool names.
Action Input: the input to the action, must be in JSON format. All of the action input must be realistic \
and from the user.

Begin!
Question: {question}"""


class ToolQuestion(NamedTuple):
    """One question to one API; `calls` are [{"Action": name, "Action_Input": JSON text}] as published."""

    id: str
    prompt: str
    calls: list[dict[str, str]]


def read_toolalpaca(path: Path) -> Iterator[tuple[ToolQuestion | None, str]]:
    """Yield (question or None, why it is left out) for every instruction of a published file, in order.

    Evaluation files have Golden_Answers beside Instructions; training files have Instances, whose
    intermediate_steps are [[tool, input, log], observation]. Left out are questions without calls, with an
    input that is no JSON object, or a call that needs an earlier one's result (`$`; as in the papers, 68 of
    100 remain); in training files also those with a failed call, or one to no tool of the API (`getDetails`
    asks the user back). Raises ConfigError naming the field.
    """
    try:
        apis = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not a UTF-8 JSON file: {error}") from None
    if not isinstance(apis, list) or not apis:
        raise ConfigError(f"{path}: expected a list of APIs as ToolAlpaca publishes it")
    for place, api in enumerate(apis):
        yield from _questions_of(api, place, f"{path}: API {place}")


def _questions_of(api: Any, place: int, where: str) -> Iterator[tuple[ToolQuestion | None, str]]:
    if not isinstance(api, dict):
        raise ConfigError(f"{where}: expected an object")
    if api.get("Instances") == [] and "Golden_Answers" not in api:
        return  # the simulation never came to this API, which may have no documentation, either
    for field in ("Name", "Description", "NLDocumentation"):
        if not isinstance(api.get(field), str):
            raise ConfigError(f"{where}: {field}: expected a string")
    where = f"{where} ({api['Name']})"
    if "Golden_Answers" in api:
        questions, answers = api.get("Instructions"), api["Golden_Answers"]
        if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
            raise ConfigError(f"{where}: expected one answer for each instruction")
        needed = "a call needs an earlier call's result"
        problems = [needed if "$" in json.dumps(calls) else "" for calls in answers]
        rows = list(zip(questions, answers, problems, strict=True))
    elif isinstance(api.get("Instances"), list):
        rows = [_instance(instance, api, f"{where}: Instances") for instance in api["Instances"]]
    else:
        raise ConfigError(f"{where}: has neither Golden_Answers nor Instances")
    about = {"name": api["Name"], "description": api["Description"], "documentation": api["NLDocumentation"]}
    for number, (question, calls, problem) in enumerate(rows):
        reason = problem or _why_left_out(question, calls)
        prompt = PROMPT.format(**about, question=question)
        yield (None if reason else ToolQuestion(f"{place}-{number}", prompt, calls)), reason


def _instance(instance: Any, api: dict[str, Any], where: str) -> tuple[str, list[dict[str, str]], str]:
    """Return (question, calls, why it is left out) of a training file's instance."""
    # A failed simulation is published as {"error": …} or text.
    if isinstance(instance, str) or (isinstance(instance, dict) and "intermediate_steps" not in instance):
        return "", [], "the simulation failed"
    try:
        question = str(instance.get("input", "")).rsplit("\nHint: ", 1)[0]
        steps = [(step[0][0], step[0][1], str(step[1])) for step in instance["intermediate_steps"]]
        calls = [{"Action": name, "Action_Input": _object_in(text)} for name, text, _ in steps]
    except (AttributeError, IndexError, KeyError, TypeError):
        expected = "expected [[tool, input, log], observation] each"
        raise ConfigError(f"{where}: intermediate_steps: {expected}") from None
    names, tools = {name for name, _, _ in steps}, api.get("Function_Projection")
    if "getDetails" in names:
        return question, calls, "a call asks the user back"
    if tools and not names <= set(tools):
        return question, calls, "a call is to no tool of the API"
    if any(not observation.startswith("Status Code: 2") for _, _, observation in steps):
        return question, calls, "a call failed"
    return question, calls, ""


def _object_in(text: str) -> str:
    """Return the text from the first brace to the last, as ToolAlpaca reads inputs; without braces, all."""
    return text[text.find("{") : text.rfind("}") + 1] or text


def _why_left_out(question: Any, calls: Any) -> str:
    if not isinstance(question, str) or not question.strip():
        return "no question"
    if not calls:
        return "no calls"
    try:
        gold_calls(json.dumps(calls))
    except ValueError:
        return "a call's input is no JSON object"
    return ""


def prepare(file: Path, output: Path) -> str:
    """Write one file's questions; return the line to print.

    Raises ConfigError for data that is not as published.
    """
    rows, left_out = [], Counter()
    for question, reason in read_toolalpaca(file):
        if question is None:
            left_out[reason] += 1
        else:
            rows.append(
                {
                    "id": question.id,
                    "messages": [{"role": "user", "content": question.prompt}],
                    "answer": question.calls,
                }
            )
    if not rows:
        raise ConfigError(f"{file}: holds no usable question ({dict(left_out)})")
    write_questions(rows, output)
    reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.most_common())
    return f"{output}: {len(rows)} questions" + (f"; left out: {reasons}" if reasons else "")


def main() -> int:
    """Prepare the files named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="ToolAlpaca as published → training and test questions.")
    parser.add_argument("--train", type=Path, help="train_data.json")
    parser.add_argument("--test", type=Path, help="eval_simulated.json or eval_real.json")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write train.jsonl and test.jsonl into"
    )
    options = parser.parse_args()
    if options.train is None and options.test is None:
        parser.error("--train or --test: name at least one file")
    files = {"train": options.train, "test": options.test}
    return print_report(
        prepare(file, options.output / f"{name}.jsonl") for name, file in files.items() if file is not None
    )


if __name__ == "__main__":
    sys.exit(main())
