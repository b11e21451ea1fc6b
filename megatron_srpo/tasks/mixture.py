"""The order of training prompts over tasks; a curriculum would be another class with this one method."""

from collections.abc import Mapping

from megatron_srpo.data.records import Prompt
from megatron_srpo.tasks import Task


class Mixture:
    """Tasks in turn, in proportion to their weights, in the same order on every run.

    After every prompt, a task has its share to within one prompt (two tasks) or a few prompts (many tasks).
    """

    def __init__(self, tasks: Mapping[str, Task], weights: Mapping[str, float]):
        self.tasks = tasks
        total = sum(weights.values())
        self.shares = {name: weight / total for name, weight in weights.items()}
        self._turns: list[tuple[str, int]] = []  # (task, its prompts before this one), as far as needed
        self._counts = dict.fromkeys(weights, 0)

    def prompt(self, number: int) -> Prompt:
        """Return training prompt `number` (0, 1, …) of the run, without token ids."""
        while len(self._turns) <= number:
            turn = len(self._turns) + 1
            name = max(self.shares, key=lambda name: self.shares[name] * turn - self._counts[name])
            self._turns.append((name, self._counts[name]))
            self._counts[name] += 1
        name, index = self._turns[number]
        return self.tasks[name].prompt("train", index)
