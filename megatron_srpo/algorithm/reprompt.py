"""The teacher's prompt: the original question with a correct sibling's solution (docs/method.md, section 2).

The teacher re-scores the student's own response ids after this prompt; it never generates.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

FINAL_SENTENCE = "Correctly solve the original question."
_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)

Message = dict[str, str]


class TeacherPrompt(NamedTuple):
    """The teacher's prompt; `ids` is None if there is no demonstration or feedback, or if neither fits."""

    ids: list[int] | None
    shows_solution: bool  # it contains at least the beginning of the demonstration
    demonstration_cut: bool  # the demonstration was shortened or left out


NOTHING_SHOWN = TeacherPrompt(None, False, False)


def clean_demonstration(text: str) -> str:
    """Remove the thinking from a sibling's decoded response, an unopened or unclosed block included."""
    text = _THINK.sub("", text)
    text = text.rsplit("</think>", 1)[-1]  # the chat template may have opened the block in the prompt
    return text.split("<think>", 1)[0].strip()  # the response may end inside the block


def teacher_messages(
    messages: Sequence[Message], demonstration: str, feedback: str | None = None
) -> list[Message]:
    """Return the system messages and one user message: question, solution, feedback, final sentence.

    Raises:
        ValueError: If the prompt does not end with a user message, or has assistant turns.
    """
    *system, user = messages
    roles = [message["role"] for message in messages]
    if roles != ["system"] * len(system) + ["user"]:
        raise ValueError(f"a teacher needs system messages and one final user message, not {roles}")
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
    """Build the longest teacher prompt of at most `max_tokens` tokens; only the demonstration is shortened.

    `encode` renders chat messages to token ids, generation header included.
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
