"""Remarks on the evaluated questions: how many there are, and which are also trained on."""

from collections.abc import Mapping

import numpy as np

from megatron_srpo.config.schema import EvaluationSection
from megatron_srpo.tasks import Task, question_count
from megatron_srpo.tasks.question_index import text_hash
from megatron_srpo.tasks.questions import QuestionFile


def evaluation_remarks(
    settings: EvaluationSection, evaluated: Mapping[str, Task], trained: Mapping[str, Task]
) -> list[str]:
    """Return a line for each split of which only a part is evaluated, or that holds training questions."""
    learnt = {name: _text_hashes(task, "train", task.size("train") or 0) for name, task in trained.items()}
    lines = []
    for task, split in [(task, split) for task in evaluated.values() for split in settings.splits]:
        size, count = task.size(split), question_count(task, split, settings)
        if size is not None and count < size:
            which = f"only the first {count} of {size} {split} questions of {task.name}"
            lines.append(f"{which} are evaluated (evaluation.prompts; null: all)")
        asked = _text_hashes(task, split, count) if learnt else np.empty(0)
        shared = np.flatnonzero(np.isin(asked, np.concatenate([asked[:0], *learnt.values()])))
        if len(shared):
            which = f"{len(shared)} of {count} {split} questions of {task.name}"
            name, number = next(
                (name, int(found[-1]))
                for name, texts in learnt.items()
                if len(found := np.flatnonzero(texts == asked[shared[0]]))
            )
            same = trained[name].prompt("train", number).id
            first = f"{task.prompt(split, int(shared[0])).id} is {same}"
            lines.append(f"{which} are also trained on, word for word (the first: {first})")
    return lines


def _text_hashes(task: Task, split: str, count: int) -> np.ndarray:
    """Return `text_hash` of the first `count` prompts of a split."""
    if isinstance(task, QuestionFile):
        return task.text_hashes(split)[:count]
    hashes = (text_hash(task.prompt(split, number).messages) for number in range(count))
    return np.fromiter(hashes, np.int64, count)
