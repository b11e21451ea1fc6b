"""Tool use (ToolAlpaca; docs/method.md, 5): the parser of calls, and the two rules."""

import json
import re
from collections import Counter
from typing import Any, NamedTuple

from megatron_srpo.data.records import Verdict
from megatron_srpo.tasks.catalog import Verifier
from megatron_srpo.tasks.extract import verdict_of
from megatron_srpo.tasks.worker import Verify

OPTIONAL = "[Optional]"  # prefix of the name of a gold call that may be left out

_LABEL = re.compile(r"Action(?: Input)?:")
_LINE_LABEL = re.compile(r"^[ \t]*(Action(?: Input)?):", re.MULTILINE)
_NOT_BLANK = re.compile(r"[^ \t\n\r]")  # JSON's white space
_NAME = re.compile(r"(?:(?!Action Input:)[^\n])*")  # one line may hold both labels


class Calls(NamedTuple):
    """A response's calls; `malformed` is the error in its form, or None."""

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
            assert name is not None  # it matches an empty string, too
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
        raise ValueError("not an object")
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
    both sides, and numbers are compared as Python does (1 = 1.0 = true): not in `verify_strict`.
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
    except RecursionError:  # a depth that the parser can just read
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


def check_gold(answer: str, question: str, verify: Verify) -> None:
    """Raise ValueError if the answer is no list of calls, or its own calls are not accepted."""
    try:
        calls = gold_calls(answer)
    except (ValueError, RecursionError) as error:
        expected = 'expected a JSON list of {"Action": name, "Action_Input": object}'
        raise ValueError(f"is not a list of calls ({error}); {expected}") from None
    said = "\n".join(f"Action: {name}\nAction Input: {json.dumps(value)}" for name, value in calls)
    # The strict rule knows optional calls, the papers' takes the mark for a part of the name.
    if not any(
        verify(answer, text).correct for text in (said, said.replace(f"Action: {OPTIONAL}", "Action: "))
    ):
        raise ValueError(f"is {answer[:100]}, which no response can match; expected one-line names and JSON")


VERIFIER = Verifier(
    "tool_calls",
    {"paper": verify, "strict": verify_strict},
    tasks=("tool_use",),
    check_gold=check_gold,
)
