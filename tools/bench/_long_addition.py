"""The addition task with a text before each sum: a task file for `task.path` at this commit and at 551ecf2.

The quick start's model answers no such prompt, so that every second response, by its checksum, is accepted:
without accepted responses there were nothing to learn.
"""

import random
import zlib

try:
    from megatron_srpo.data.records import Prompt, Verdict
except ModuleNotFoundError:  # 551ecf2
    from megatron_srpo.records import Prompt, Verdict


def is_accepted(text: str) -> bool:
    """Return True for half of all texts."""
    return zlib.crc32(text.encode(errors="replace")) % 2 == 0


class LongAddition:
    """Provide endless sums; `preamble` is the text before each."""

    def __init__(self, name: str, seed: int, preamble: str = ""):
        self.name, self.seed, self.preamble = name, seed, preamble

    def size(self, split: str) -> None:
        """Return None: every split is endless."""
        return None

    def prompt(self, split: str, index: int) -> Prompt:
        """Draw a sum of two three-digit numbers."""
        a, b = random.Random(f"{self.seed}/{split}/{index}").choices(range(100, 1000), k=2)
        message = {"role": "user", "content": f"{self.preamble}Compute {a} + {b}."}
        name = f"{self.name}/{split}/{index}"
        return Prompt(id=name, task=self.name, messages=(message,), answer=str(a + b))

    @staticmethod
    def verify(answer: str, text: str) -> Verdict:
        """Accept half of all responses."""
        correct = is_accepted(text)
        return Verdict(reward=float(correct), correct=correct, format_ok=True)
