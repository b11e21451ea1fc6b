"""Find the final answer in a response, in time linear in its length, and build its verdict."""

import re

from megatron_srpo.data.records import Verdict

DEEPEST = 1_000  # braces within braces; deeper text is not mathematics

_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{|\\[{}\\]|[{}]")
_BARE_BOX = re.compile(r"(?<!\\)\\boxed\s{1,4}([^\s{}$][^\s$]*)")


def verdict_of(correct: bool, format_ok: bool, feedback: str | None = None) -> Verdict:
    """Build a verdict of reward 1 or 0; only a wrong response gets the feedback."""
    feedback = None if correct else feedback
    return Verdict(reward=float(correct), correct=correct, format_ok=format_ok, feedback=feedback)


def after_thinking(text: str) -> str:
    """Return what follows the thinking: nothing if a `<think>` is not closed."""
    rest = text.rsplit("</think>", 1)[-1]
    return "" if "<think>" in rest else rest


def last_answer_block(text: str) -> str | None:
    """Return the stripped content of the last complete `<answer>…</answer>`; None if there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def last_boxed(text: str) -> str | None:
    r"""Return the stripped content of the last complete \boxed{…} or \fbox{…}, braces balanced, or None.

    Of nested boxes, the outermost closed one counts; a box that is never closed, or empty, hides no other.
    Without such a box, the word after the last `\boxed` counts.
    """
    open_braces: list[tuple[int, bool]] = []  # (place after the brace, True for a box's)
    found = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if open_braces:
                start, is_box = open_braces.pop()
                if is_box and not text[start : match.start()].isspace() and start < match.start():
                    found = (start, match.start())
        elif token[-1] == "{" and token != "\\{":
            open_braces.append((match.end(), len(token) > 1))
            if len(open_braces) > DEEPEST:
                break
    if found is not None:
        return text[found[0] : found[1]].strip()
    bare = _BARE_BOX.findall(text)
    return bare[-1].rstrip(".,;") or None if bare else None
