"""The teacher's prompt: the original question with a correct sibling's solution (METHOD.md §2, "Teacher").

The teacher re-scores the student's own response ids after this prompt; it never generates. When the prompt is
too long the demonstration is shortened, never the chat header or the final sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

FINAL_SENTENCE = "Correctly solve the original question."
_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)

Message = dict[str, str]


class TeacherPrompt(NamedTuple):
    """Token ids of the teacher's prompt, or None when there is nothing to show: no demonstration and no
    feedback, or none fits.

    shows_solution: something of the demonstration is in it. demonstration_cut: not all of it is.
    """

    ids: list[int] | None
    shows_solution: bool
    demonstration_cut: bool


NOTHING_SHOWN = TeacherPrompt(None, False, False)


def clean_demonstration(text: str) -> str:
    """A sibling's decoded response without its thinking.

    Removes every `<think>…</think>`; text up to a lone `</think>` is thinking too (the chat template may have
    opened the block in the prompt), and so is text after a lone `<think>` (the response was cut inside it).
    """
    text = _THINK.sub("", text)
    text = text.rsplit("</think>", 1)[-1]
    text = text.split("<think>", 1)[0]
    return text.strip()


def teacher_messages(
    messages: Sequence[Message], demonstration: str, feedback: str | None = None
) -> list[Message]:
    """System messages unchanged, then one user message: question, solution, optional feedback, final
    sentence.

    An empty demonstration leaves the solution out: the feedback alone teaches.

    Raises ValueError when the prompt does not end with a user message or has assistant turns.
    """
    *system, user = messages
    if user["role"] != "user" or any(message["role"] != "system" for message in system):
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"a prompt must be system messages and one final user message to be shown to the teacher, not {roles}"
        )
    content = f"{user['content']}\n"
    if demonstration.strip():
        content += f"Correct solution:\n\n{demonstration}\n\n"
    if feedback:
        content += f"The following is feedback from your unsuccessful earlier attempt:\n\n{feedback}\n\n"
    return [*system, {"role": "user", "content": content + FINAL_SENTENCE}]


def build_teacher_prompt(
    messages: Sequence[Message],
    demonstration: str,
    encode: Callable[[list[Message]], list[int]],
    max_tokens: int,
    feedback: str | None = None,
) -> TeacherPrompt:
    """Ids of the longest teacher prompt of at most `max_tokens` tokens.

    `encode` renders chat messages to ids with the generation header. A demonstration that does not fit is cut
    at its end, to the longest prefix that fits (bisection over its characters: token counts grow with the
    text), which is none of it where only the feedback fits.
    """

    def ids_for(characters: int) -> list[int]:
        return encode(teacher_messages(messages, demonstration[:characters], feedback))

    if not demonstration.strip() and not feedback:  # a prompt that shows nothing teaches nothing
        return NOTHING_SHOWN
    whole = ids_for(len(demonstration))
    if len(whole) <= max_tokens:
        return TeacherPrompt(whole, bool(demonstration.strip()), False)
    best, characters = None, 0
    low, high = 0, len(demonstration) - 1
    while low <= high:
        middle = (low + high) // 2
        ids = ids_for(middle)
        if len(ids) <= max_tokens:
            best, characters, low = ids, middle, middle + 1
        else:
            high = middle - 1
    shows_solution = bool(demonstration[:characters].strip())
    return (
        TeacherPrompt(best, shows_solution, True)
        if best is not None and (shows_solution or feedback)
        else NOTHING_SHOWN
    )
