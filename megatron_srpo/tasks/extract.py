"""Finding the final answer in a response, in time linear in its length."""

from __future__ import annotations

import re

DEEPEST = 1_000  # braces within braces; beyond that it is no mathematics

_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{|\\[{}\\]|[{}]")


def last_answer_block(text: str) -> str | None:
    """What stands in the last complete `<answer>…</answer>`, stripped; None when there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def last_boxed(text: str) -> str | None:
    """What stands in the last complete \\boxed{…} or \\fbox{…}, braces balanced, stripped; None when there is
    none.

    Of boxes within boxes the outermost that is closed: one that is never closed hides none.
    """
    open_braces: list[tuple[int, bool]] = []  # (place after the brace, whether it is a box's)
    found = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if open_braces:
                start, is_box = open_braces.pop()
                if is_box:
                    found = (start, match.start())
        elif token[-1] == "{" and token != "\\{":
            open_braces.append((match.end(), len(token) > 1))
            if len(open_braces) > DEEPEST:
                break
    return None if found is None else text[found[0] : found[1]].strip()
