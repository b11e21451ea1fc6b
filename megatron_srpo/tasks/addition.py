"""`addition`: three-digit sums, endless and learnt by a tiny model in a minute (the quick start's task)."""

import random
import zlib

from megatron_srpo.data.records import Prompt, Verdict
from megatron_srpo.tasks.catalog import BuiltinTask, Verifier
from megatron_srpo.tasks.extract import after_thinking, last_answer_block, verdict_of
from megatron_srpo.tasks.worker import Verify

DIGITS = 3
TEST_SHARE = 10  # one sum in ten belongs to the test split and is never trained on


def verify(answer: str, text: str) -> Verdict:
    """Accept a response whose last complete `<answer>` block, stripped, equals `answer` (`exact`)."""
    given = last_answer_block(after_thinking(text))
    return verdict_of(given == answer, format_ok=given is not None)


def check_gold(answer: str, question: str, verify: Verify) -> None:
    """Raise ValueError if `<answer>` cannot hold the answer."""
    if not verify(answer, f"<answer>{answer}</answer>").correct:
        raise ValueError(f"is {answer[:100]!r}; expected a text that an <answer> block can hold")


class Addition:
    """Prompts by (seed, split, index); a response is right when its last `<answer>` block holds the sum."""

    name = "addition"
    verifier = "megatron_srpo.tasks.addition:verify"

    def __init__(self, seed: int):
        self.seed = seed

    def size(self, split: str) -> None:
        """Return None: every split is endless."""
        return None

    def prompt(self, split: str, index: int) -> Prompt:
        """Draw a sum uniformly from those of `split`; no seed trains on held-out sums of any seed.

        Validation and test draw from the same tenth of all sums, so they share about one in several hundred.
        """
        rng = random.Random(f"addition/{self.seed}/{split}/{index}")
        low, high = 10 ** (DIGITS - 1), 10**DIGITS
        while True:
            a, b = rng.randrange(low, high), rng.randrange(low, high)
            text = f"Compute {a} + {b}."
            is_held_out = zlib.crc32(text.encode()) % TEST_SHARE == 0
            if is_held_out == (split != "train"):
                break
        message = {"role": "user", "content": text}
        identifier = f"addition/{split}/{index}"
        return Prompt(id=identifier, task=self.name, messages=(message,), answer=str(a + b))


TASK = BuiltinTask("addition", lambda source, seed: Addition(seed))
VERIFIER = Verifier("exact", {"paper": verify}, check_gold=check_gold)
