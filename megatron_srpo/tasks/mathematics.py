"""Mathematics: GSM8K, AIME, HMMT, Minerva, OlympiadBench and other short answers, compared by math-verify."""

import re
from functools import lru_cache
from typing import Any

from megatron_srpo.data.records import Verdict
from megatron_srpo.tasks.catalog import Verifier
from megatron_srpo.tasks.extract import last_answer_block, last_boxed, verdict_of

LONGEST_ANSWER = 1_000  # characters; a longer one is not a short answer, and takes the parser minutes
_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_SPACED_THOUSANDS = re.compile(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))")  # which math-verify adds up: 1\,234 = 235
_DISPLAY = re.compile(r"\\\[(.*)\\\]|\$(.*)(?<!\\)\$", re.DOTALL)
_FULL_STOP = re.compile(r"(?<![.\\])(?<!\\right)\.$")


def phrase(question: str) -> str:
    r"""Ask for step-by-step reasoning and a final answer within \boxed{}."""
    return f"{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def final_answer(text: str) -> str | None:
    r"""Return a response's last \boxed{…}, else its last complete <answer> block, else None."""
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


@lru_cache(maxsize=4096)  # every gold answer is compared with all samples of a group
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
