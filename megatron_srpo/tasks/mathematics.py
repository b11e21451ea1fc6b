"""Mathematics: GSM8K, AIME, HMMT, Minerva, OlympiadBench and other short answers, compared by math-verify."""

import json
import re
from functools import lru_cache
from typing import Any

from megatron_srpo.data.records import Verdict
from megatron_srpo.tasks.catalog import Verifier
from megatron_srpo.tasks.extract import last_answer_block, last_boxed, verdict_of

LONGEST_ANSWER = 1_000  # characters; a longer one is no short answer, and costs the parser minutes
QUESTION_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("final_answer", "answer", "expected_answer", "solution")
_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_SPACED_THOUSANDS = re.compile(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))")  # which math-verify adds up: 1\,234 = 235
_DISPLAY = re.compile(r"\\\[(.*)\\\]|\$(.*)(?<!\\)\$", re.DOTALL)
_FULL_STOP = re.compile(r"(?<![.\\])(?<!\\right)\.$")


def phrase(question: str) -> str:
    return f"{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def published_row(row: dict[str, Any]) -> tuple[str, str]:
    """Return (question, short answer) of a row as benchmarks publish it; ValueError names the field.

    GSM8K's answer follows "####", Minerva's is the last \\boxed{} of its solution, OlympiadBench's a list.
    """
    texts = (row.get(field) for field in QUESTION_FIELDS)
    question = next((text for text in texts if isinstance(text, str) and text.strip()), None)
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
        text = _THOUSANDS.sub("", text.rsplit("####", 1)[1].strip())
    elif field == "solution" or "\\boxed" in text:
        text = last_boxed(text)
        if text is None:
            raise ValueError(f"{field}: holds no \\boxed{{…}} answer")
    if not text.strip():
        raise ValueError(f"{field}: is empty")
    return question, text.strip()


def final_answer(text: str) -> str | None:
    """Return a response's last \\boxed{…}, else its last complete <answer> block, else None."""
    boxed = last_boxed(text)
    return last_answer_block(text) if boxed is None else boxed


def verify(answer: str, text: str) -> Verdict:
    """Accept a response whose final answer math-verify finds equal to `answer` (LaTeX or plain numbers).

    Answers are parsed as LaTeX, which evaluates no Python. Hostile input may never end: use killable workers.
    """
    given = final_answer(text)
    if not given or len(given) > LONGEST_ANSWER:
        return verdict_of(False, False, "Your response holds no final answer within \\boxed{}.")
    answer, given = _bare(answer), _bare(given)
    correct = given == answer or _equal(answer, given)
    return verdict_of(correct, True, "Your final answer is wrong.")


def _bare(answer: str) -> str:
    """Remove a formula's delimiters, a full stop and spaces between thousands, which the parser misreads."""
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


VERIFIER = Verifier(
    "math",
    {"paper": verify},
    tasks=("math", "gsm8k", "aime24", "aime25", "hmmt25", "minerva", "olympiadbench"),
    phrase=phrase,
    requires="math_verify",
)
