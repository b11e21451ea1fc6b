"""`addition`: three-digit sums, the task of the quick start. Endless, verifiable, learnt by a tiny model in a minute."""

from __future__ import annotations

import random
import zlib

from megatron_srpo.records import Prompt, Verdict

DIGITS = 3
TEST_SHARE = 10  # one sum in ten belongs to the test split and is never trained on


def question(a: int, b: int) -> str:
    """The user's message."""
    return f"Compute {a} + {b}."


class Addition:
    """Prompts by (seed, split, index); a response is right when its last `<answer>` block holds the sum."""

    name = "addition"

    def __init__(self, seed: int):
        self.seed = seed

    def prompt(self, split: str, index: int) -> Prompt:
        """A sum drawn uniformly among those of `split`; the splits are disjoint whatever the seed."""
        rng = random.Random(f"addition/{self.seed}/{split}/{index}")
        low, high = 10 ** (DIGITS - 1), 10**DIGITS
        while True:
            text = question(a := rng.randrange(low, high), b := rng.randrange(low, high))
            is_test = zlib.crc32(text.encode()) % TEST_SHARE == 0
            if is_test == (split == "test"):
                break
        return Prompt(
            id=f"addition/{split}/{index}",
            task=self.name,
            messages=({"role": "user", "content": text},),
            answer=str(a + b),
        )

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """Reward 1 when the last complete `<answer>` block equals the sum, else 0."""
        end = text.rfind("</answer>")
        start = text.rfind("<answer>", 0, end) if end >= 0 else -1
        correct = start >= 0 and text[start + len("<answer>") : end].strip() == prompt.answer
        return Verdict(reward=float(correct), correct=correct, format_ok=start >= 0)
