"""The teacher's prompt: the original question with a correct sibling's solution (docs/method.md, section 2).

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
    """The teacher's prompt; `ids` is None without a demonstration or feedback, or if neither fits."""

    ids: list[int] | None
    shows_solution: bool  # some of the demonstration is in it
    demonstration_cut: bool  # not all of it is


NOTHING_SHOWN = TeacherPrompt(None, False, False)


def clean_demonstration(text: str) -> str:
    """Return a sibling's decoded response without its thinking.

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
    """Return the system messages, and one user message: question, solution, feedback, final sentence.

    An empty demonstration leaves the solution out: the feedback alone teaches. ValueError if the prompt
    does not end with a user message or has assistant turns.
    """
    *system, user = messages
    if user["role"] != "user" or any(message["role"] != "system" for message in system):
        roles = [message["role"] for message in messages]
        raise ValueError(
            "a prompt must be system messages and one final user message to be shown to the teacher, not"
            f" {roles}"
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
    """Return the longest teacher prompt of at most `max_tokens` tokens.

    `encode` renders chat messages to ids with the generation header. A demonstration that does not fit is cut
    to its longest prefix that fits, found by bisection over characters; to nothing if only the feedback fits.
    """

    def ids_for(characters: int) -> list[int]:
        return encode(teacher_messages(messages, demonstration[:characters], feedback))

    if not demonstration.strip() and not feedback:
        return NOTHING_SHOWN
    full = ids_for(len(demonstration))
    if len(full) <= max_tokens:
        return TeacherPrompt(full, bool(demonstration.strip()), False)
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
    if best is None or not (shows_solution or feedback):
        return NOTHING_SHOWN
    return TeacherPrompt(best, shows_solution, True)
