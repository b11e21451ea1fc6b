"""SciKnowEval L3 multiple choice (docs/method.md, 5): the two rules."""

import re

from megatron_srpo.data.records import Verdict
from megatron_srpo.tasks.catalog import Verifier
from megatron_srpo.tasks.extract import verdict_of
from megatron_srpo.tasks.worker import Verify

_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[:.)][ \t]", re.MULTILINE)
_BLOCK = re.compile(r"<answer>\s*([A-D])\s*</answer>")


def verify(answer: str, text: str) -> Verdict:
    """Apply the papers' rule: the text between the last `<answer>` and `</answer>`, stripped, is the letter.

    Without a tag it extends to the text's end: a bare "B" and an unclosed "<answer>B" are right; "B." and "b"
    are not. `format_ok`: the last `<answer>` block is complete and holds one letter.
    """
    given = text.rsplit("<answer>", 1)[-1].split("</answer>", 1)[0].strip()
    return _verdict(given == answer, _BLOCK.match(text, max(text.rfind("<answer>"), 0)) is not None)


def verify_strict(answer: str, text: str) -> Verdict:
    """Apply our rule: the response has one `<answer>` block, no other such tag, and ends with it."""
    blocks = _BLOCK.findall(text)
    once = text.count("<answer>") == text.count("</answer>") == 1 and text.rstrip().endswith("</answer>")
    return _verdict(once and blocks == [answer], once and len(blocks) == 1)


def _verdict(correct: bool, format_ok: bool) -> Verdict:
    malformed = "Your response has no <answer> block with one letter and nothing else."
    return verdict_of(correct, format_ok, "Your answer is wrong." if format_ok else malformed)


def check_gold(answer: str, question: str, verify: Verify) -> None:
    """Raise ValueError unless the answer is the letter of an option of the question (default: A to D)."""
    options = dict.fromkeys(_OPTION.findall(question)) or dict.fromkeys("ABCD")
    if answer not in options or not verify(answer, f"<answer>{answer}</answer>").correct:
        raise ValueError(f"is {answer[:100]!r}; expected the letter of an option: {', '.join(options)}")


VERIFIER = Verifier(
    "multiple_choice",
    {"paper": verify, "strict": verify_strict},
    tasks=("sciknoweval", "chemistry", "physics", "biology", "materials"),
    check_gold=check_gold,
)
