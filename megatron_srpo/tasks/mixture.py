"""The order of training prompts: which task's turn it is.

A curriculum would be another class with this one method.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_srpo.data.records import Prompt
from megatron_srpo.tasks import Task


class Mixture:
    """Tasks in turn, in proportion to their weights: after every prompt each task is less than one prompt
    from its share where there are two tasks, and never more than a few where there are many. The same on
    every run.
    """

    def __init__(self, tasks: Mapping[str, Task], weights: Mapping[str, float]):
        """`weights`: the tasks trained on, by name, any positive numbers."""
        self.tasks = tasks
        total = sum(weights.values())
        self.shares = {name: weight / total for name, weight in weights.items()}
        self._turns: list[
            tuple[str, int]
        ] = []  # (task, how many of its prompts came before), grows as it is asked for
        self._counts = dict.fromkeys(weights, 0)

    def prompt(self, number: int) -> Prompt:
        """Training prompt `number` (0, 1, …) of the run, without token ids."""
        while len(self._turns) <= number:
            turn = len(self._turns) + 1
            name = max(self.shares, key=lambda name: self.shares[name] * turn - self._counts[name])
            self._turns.append((name, self._counts[name]))
            self._counts[name] += 1
        name, index = self._turns[number]
        return self.tasks[name].prompt("train", index)
