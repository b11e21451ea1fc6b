"""Define a task of your own: spell a word backwards.

`task.path: examples/own_task/backwards.py` is all that a configuration needs.
"""

import random

from megatron_srpo.data.records import Prompt, Verdict

SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sta", "ter", "von")


class Backwards:
    """Provide endless words by (seed, split, index).

    Words of validation and test begin with "t" or "v", no others do.
    """

    def __init__(self, name: str, seed: int, syllables: int = 2):
        """Take task.name and the run's seed; further arguments come from task.options."""
        self.name, self.seed, self.syllables = name, seed, syllables

    def size(self, split: str) -> int | None:
        """Return None: endless.

        A finite task returns the number of prompts of a split, 0 for a split that it does not have.
        """
        return None

    def prompt(self, split: str, index: int) -> Prompt:
        """Return prompt `index` of "train", "validation" or "test": a function of seed, split and index."""
        rng = random.Random(f"{self.seed}/{split}/{index}")
        first = [syllable for syllable in SYLLABLES if (syllable[0] in "tv") == (split != "train")]
        word = rng.choice(first) + "".join(rng.choices(SYLLABLES, k=self.syllables - 1))
        return Prompt(
            id=f"{self.name}/{split}/{index}",
            task=self.name,
            messages=({"role": "user", "content": f"Spell {word} backwards."},),
            answer=word[::-1],
        )

    @staticmethod
    def verify(answer: str, text: str) -> Verdict:
        """Judge a response in a worker process that is killed after a time limit.

        Never evaluate `text` as code.
        """
        given = text.strip().removesuffix(".")
        correct = given == answer
        feedback = None if correct else f"A word of {len(answer)} letters was expected, not {len(given)}."
        return Verdict(reward=float(correct), correct=correct, format_ok=given.isalpha(), feedback=feedback)
