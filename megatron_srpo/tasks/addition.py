"""`addition`: three-digit sums, the task of the quick start.

Endless, verifiable, learnt by a tiny model in a minute.
"""

from __future__ import annotations

import random
import zlib

from megatron_srpo.data.records import Prompt, Verdict
from megatron_srpo.tasks.extract import last_answer_block

DIGITS = 3
TEST_SHARE = 10  # one sum in ten belongs to the test split and is never trained on


def question(a: int, b: int) -> str:
    """The user's message."""
    return f"Compute {a} + {b}."


def verify(answer: str, text: str) -> Verdict:
    """The verifier `exact`: reward 1 when the last complete `<answer>` block of `text`, stripped, equals
    `answer`, else 0.
    """
    given = last_answer_block(text)
    correct = given == answer
    return Verdict(reward=float(correct), correct=correct, format_ok=given is not None)


class Addition:
    """Prompts by (seed, split, index); a response is right when its last `<answer>` block holds the sum."""

    name = "addition"
    verifier = "megatron_srpo.tasks.addition:verify"

    def __init__(self, seed: int):
        self.seed = seed

    def size(self, split: str) -> None:
        """Endless."""

    def prompt(self, split: str, index: int) -> Prompt:
        """A sum drawn uniformly among those of `split`; nothing that is trained on is tested or validated,
        whatever the seed.

        Validation and test draw from the same tenth of all sums, so one sum in some hundreds stands in both.
        """
        rng = random.Random(f"addition/{self.seed}/{split}/{index}")
        low, high = 10 ** (DIGITS - 1), 10**DIGITS
        while True:
            text = question(a := rng.randrange(low, high), b := rng.randrange(low, high))
            is_held_out = zlib.crc32(text.encode()) % TEST_SHARE == 0
            if is_held_out == (split != "train"):
                break
        return Prompt(
            id=f"addition/{split}/{index}",
            task=self.name,
            messages=({"role": "user", "content": text},),
            answer=str(a + b),
        )
