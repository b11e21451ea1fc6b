"""Mathematics: GSM8K, AIME, HMMT, Minerva, OlympiadBench and any question with a short answer, compared by
math-verify.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from megatron_srpo.data.records import Verdict
from megatron_srpo.tasks.extract import last_answer_block, last_boxed

LONGEST_ANSWER = 1_000  # characters; a longer one is no short answer, and costs the parser minutes
QUESTION_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("final_answer", "answer", "expected_answer", "solution")
_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_SPACED_THOUSANDS = re.compile(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))")  # which math-verify adds up: 1\,234 = 235
_DISPLAY = re.compile(r"\\\[(.*)\\\]|\$(.*)(?<!\\)\$", re.DOTALL)
_FULL_STOP = re.compile(r"(?<![.\\])(?<!\\right)\.$")


def phrase(question: str) -> str:
    """The user's message."""
    return f"{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def published_row(row: dict[str, Any]) -> tuple[str, str]:
    """(question, short answer) of a row as the benchmarks publish it.

    GSM8K's answer stands after "####", Minerva's in the last \\boxed{} of its solution, OlympiadBench's in a
    list of one. Raises ValueError naming the field.
    """
    question = next(
        (row[field] for field in QUESTION_FIELDS if isinstance(row.get(field), str) and row[field].strip()),
        None,
    )
    if question is None:
        raise ValueError(f"question: is missing; expected one of {', '.join(QUESTION_FIELDS)}")
    field = next((field for field in ANSWER_FIELDS if row.get(field) not in (None, "", [])), None)
    if field is None:
        raise ValueError(f"answer: is missing; expected one of {', '.join(ANSWER_FIELDS)}")
    answer = row[field]
    if isinstance(answer, list):
        if len(answer) != 1:
            raise ValueError(f"{field}: expected one answer, not {len(answer)}")
        answer = answer[0]
    text = answer if isinstance(answer, str) else json.dumps(answer)
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
        text = _THOUSANDS.sub("", text)
    elif field == "solution" or "\\boxed" in text:
        boxed = last_boxed(text)
        if boxed is None:
            raise ValueError(f"{field}: holds no \\boxed{{…}} answer")
        text = boxed
    if not text.strip():
        raise ValueError(f"{field}: is empty")
    return question, text.strip()


def final_answer(text: str) -> str | None:
    """The answer a response commits itself to: its last \\boxed{…}, else its last complete <answer> block;
    None without either.
    """
    boxed = last_boxed(text)
    return last_answer_block(text) if boxed is None else boxed


def verify(answer: str, text: str) -> Verdict:
    """Right when math-verify finds the response's final answer equal to `answer` (LaTeX or plain numbers).

    Parsed as LaTeX alone, which needs no Python evaluation. May run for ever on hostile input: for workers
    that can be killed.
    """
    given = final_answer(text)
    if not given or len(given) > LONGEST_ANSWER:
        return Verdict(
            reward=0.0,
            correct=False,
            format_ok=False,
            feedback="Your response holds no final answer within \\boxed{}.",
        )
    answer, given = _bare(answer), _bare(given)
    correct = given == answer or _equal(answer, given)
    return Verdict(
        reward=float(correct),
        correct=correct,
        format_ok=True,
        feedback=None if correct else "Your final answer is wrong.",
    )


def _bare(answer: str) -> str:
    """Without what stands around a formula or ends a sentence, and without spaces between thousands: the
    parser trips over them.
    """
    answer = _FULL_STOP.sub("", answer.strip())
    if around := _DISPLAY.fullmatch(answer):
        answer = _FULL_STOP.sub("", (around[1] or around[2] or "").strip())
    return _SPACED_THOUSANDS.sub("", answer)


def _equal(answer: str, given: str) -> bool:
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(given):  # most answers; parsing takes milliseconds
        return int(answer) == int(given)
    from math_verify import verify as equal

    return equal(list(_parsed(answer)), list(_parsed(given)), timeout_seconds=None)


@lru_cache(maxsize=4096)  # every gold answer is compared with a whole group
def _parsed(answer: str) -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig, parse

    extraction = [LatexExtractionConfig()]
    no_limit: Any = None  # the pool limits the time; the library's own limit needs the main thread's signals
    return tuple(parse(f"${answer}$", extraction_config=extraction, parsing_timeout=no_limit))
