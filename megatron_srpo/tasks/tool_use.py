"""Tool use (ToolAlpaca; docs/method.md, 5): data, the papers' prompt, the parser of calls, two rules."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.records import Verdict
from megatron_srpo.tasks.catalog import Verifier
from megatron_srpo.tasks.extract import verdict_of

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
OPTIONAL = "[Optional]"  # prefix of the name of a gold call that may be left out

_LABEL = re.compile(r"Action(?: Input)?:")
_LINE_LABEL = re.compile(r"^[ \t]*(Action(?: Input)?):", re.MULTILINE)
_NOT_BLANK = re.compile(r"[^ \t\n\r]")  # JSON's white space
_NAME = re.compile(r"(?:(?!Action Input:)[^\n])*")  # one line may hold both labels


class ToolQuestion(NamedTuple):
    """One question to one API; `calls` are [{"Action": name, "Action_Input": JSON text}] as published."""

    id: str
    prompt: str
    calls: list[dict[str, str]]


# ---- the published data


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


# ---- calls in text


class Calls(NamedTuple):
    """A response's calls; `malformed` says what is wrong with its form, or is None."""

    names: list[str]
    inputs: list[dict[str, Any]]
    malformed: str | None


def parse_calls(text: str, strict: bool = False) -> Calls:
    """Parse `Action: NAME` and `Action Input: {JSON object}` (nested, on several lines) in linear time.

    They may be anywhere, as in the papers; labels inside an object are part of it. `strict`: labels begin a
    line, come in pairs, nothing follows the object on its line, and no object repeats a key or holds NaN.
    """
    names: list[str] = []
    inputs: list[dict[str, Any]] = []
    place, label = 0, _LINE_LABEL if strict else _LABEL
    while match := label.search(text, place):
        place = match.end()
        if not match.group().endswith("Input:"):
            if strict and len(names) > len(inputs):
                return Calls(names, inputs, f"call {len(names)} has no Action Input")
            name = _NAME.match(text, place)
            assert name is not None  # it matches nothing, too
            place = name.end()
            names.append(name.group().strip())
            continue
        if strict and len(names) != len(inputs) + 1:
            return Calls(names, inputs, "an Action Input has no Action")
        try:
            value, place = _read_object(text, place, strict)
        except (ValueError, RecursionError):
            return Calls(names, inputs, f"Action Input {len(inputs) + 1} is not a JSON object")
        inputs.append(value)
        if strict and text[place : (text.find("\n", place) + 1 or len(text) + 1) - 1].strip():
            return Calls(names, inputs, f"something follows the JSON object of Action Input {len(inputs)}")
    if not names or not inputs:
        return Calls(names, inputs, "there is no Action with an Action Input")
    if strict and len(names) != len(inputs):
        return Calls(names, inputs, f"call {len(names)} has no Action Input")
    return Calls(names, inputs, None)


def _read_object(text: str, place: int, strict: bool) -> tuple[dict[str, Any], int]:
    """Return the JSON object after `place` and its end; raise ValueError or RecursionError."""
    first = _NOT_BLANK.search(text, place)
    if first is None or first[0] != "{":
        raise ValueError("no object")
    return (_STRICT if strict else _LENIENT).raw_decode(text, first.start())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("repeated key")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_LENIENT = json.JSONDecoder()
_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("Action"), str)


def gold_calls(answer: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, input) of every call of a published answer; raise ValueError if it is not one."""
    calls, found = json.loads(answer), []
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        raise ValueError('expected [{"Action": …, "Action_Input": …}, …]')
    for call in calls:
        value = call.get("Action_Input")
        value = json.loads(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError("Action_Input: expected a JSON object")
        found.append((call["Action"], value))
    return found


# ---- the two rules


def verify(answer: str, text: str) -> Verdict:
    """Apply the papers' rule: equal multisets of names, and equal inputs after merging them into one object.

    Names are compared as written, so "[Optional]x" is a name. Later calls' keys override earlier ones', on
    both sides, and numbers are compared as Python does (1 = 1.0 = true): `verify_strict` loses nothing.
    """
    gold, calls = gold_calls(answer), parse_calls(text)
    if calls.malformed is not None:
        return _verdict(False, calls.malformed)
    if Counter(calls.names) != Counter(name for name, _ in gold):
        return _verdict(False, None)
    return _verdict(_merged(calls.inputs) == _merged([value for _, value in gold]), None)


def verify_strict(answer: str, text: str) -> Verdict:
    """Apply our rule: exactly the gold calls with exactly their inputs, each once, in any order.

    Types count: 1 = 1.0, but "1", true and 1 differ. Gold calls marked [Optional] may be left out.
    """
    calls = parse_calls(text, strict=True)
    wanted, optional = Counter(), Counter()
    for name, value in gold_calls(answer):
        kind = optional if name.startswith(OPTIONAL) else wanted
        kind[_canonical(name.removeprefix(OPTIONAL), value)] += 1
    if calls.malformed is not None:
        return _verdict(False, calls.malformed)
    try:
        made = Counter(_canonical(name, value) for name, value in zip(calls.names, calls.inputs, strict=True))
    except RecursionError:  # a depth that the parser just takes
        return _verdict(False, None)
    return _verdict(not wanted - made and not made - wanted - optional, None)


def _merged(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for value in inputs:
        merged |= value
    return merged


def _canonical(name: str, value: Any) -> tuple[str, str]:
    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [plain(inner) for inner in item]
        return int(item) if isinstance(item, float) and item.is_integer() and abs(item) < 2**53 else item

    return name, json.dumps(plain(value), sort_keys=True)


def _verdict(correct: bool, malformed: str | None) -> Verdict:
    if malformed is not None:
        return verdict_of(False, False, f"Your response could not be read: {malformed}.")
    return verdict_of(correct, True, "Your calls or their inputs are wrong.")


VERIFIER = Verifier("tool_calls", {"paper": verify, "strict": verify_strict}, tasks=("tool_use",))
