"""Mathematics: GSM8K, AIME, HMMT, Minerva, OlympiadBench and other short answers (see `math_equal`)."""

import json
import re
from fractions import Fraction

from megatron_srpo.data.records import Verdict
from megatron_srpo.tasks.catalog import Verifier
from megatron_srpo.tasks.extract import after_thinking, last_answer_block, last_boxed, verdict_of
from megatron_srpo.tasks.math_equal import equal, number_of
from megatron_srpo.tasks.worker import Verify

LONGEST_ANSWER = 1_000  # characters; a longer one is not a short answer, and takes the parser minutes
# Raised by the parser and by sympy for formulas without meaning, or too deep.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")


def phrase(question: str) -> str:
    r"""Ask for step-by-step reasoning and a final answer within \boxed{}."""
    return f"{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def final_answer(text: str) -> str | None:
    r"""Return a response's last \boxed{…} with content, else its last complete <answer> block, else None."""
    text = after_thinking(text)
    boxed = last_boxed(text)
    return last_answer_block(text) if boxed is None else boxed


def prepare() -> None:
    """Import what comparisons need (a worker calls it before the time of its first job begins)."""
    equal(r"\sqrt{2}x + 1", "x + 2")


def verify(answer: str, text: str) -> Verdict:
    """Accept a response whose final answer equals `answer` (LaTeX or plain numbers, or see `gold_of`).

    Answers are parsed as LaTeX, which evaluates no Python. Hostile input may never end: use killable workers.
    """
    given = final_answer(text)
    if not given or len(given) > LONGEST_ANSWER:
        return verdict_of(False, False, "Your response holds no final answer within \\boxed{}.")
    gold, tolerance = gold_of(answer)
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(given) and tolerance is None:  # most answers
        correct = int(gold) == int(given)
    else:
        try:
            correct = equal(gold, given, tolerance)
        except MALFORMED:
            correct = False
    return verdict_of(correct, True, "Your final answer is wrong.")


def gold_of(answer: str) -> tuple[str, Fraction | None]:
    """Return (gold, tolerance) of `answer`, or of {"answer": …, "tolerance": absolute}; raise ValueError."""
    if not answer.startswith("{") or not answer.endswith("}") or '"answer"' not in answer:
        return answer, None
    row = json.loads(answer)
    if set(row) != {"answer", "tolerance"} or not isinstance(row["answer"], str | int | float):
        raise ValueError(f'has keys {sorted(row)}; expected "answer" and "tolerance"')
    tolerance = number_of(str(row["tolerance"]))
    if tolerance is None or tolerance.value <= 0:
        raise ValueError(f"tolerance: is {row['tolerance']!r}; expected a number above 0")
    return str(row["answer"]).strip(), tolerance.value


def check_gold(answer: str, question: str, verify: Verify) -> None:
    """Raise ValueError for a list, a complete solution, or what no box can hold."""
    gold, _ = gold_of(answer)
    shown = repr(gold[:100])
    if gold.startswith("[") and _is_json(gold) and '"' in gold:
        raise ValueError(
            f"is the list {shown}; expected one answer: 3, 5 in order, or \\\\{{3, 5\\\\}} in any"
        )
    if "####" in gold:
        raise ValueError(f"is the solution {shown}; expected the short answer (tools/prepare_math.py)")
    if len(gold) > LONGEST_ANSWER or final_answer(f"\\boxed{{{gold}}}") != gold:
        raise ValueError(f"is {shown}, which \\boxed{{}} cannot hold; expected a short answer in LaTeX")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


VERIFIER = Verifier(
    "math",
    {"paper": verify},
    tasks=("math", "gsm8k", "aime24", "aime25", "hmmt25", "minerva", "olympiadbench"),
    phrase=phrase,
    requires="math_verify",
    check_gold=check_gold,
)
