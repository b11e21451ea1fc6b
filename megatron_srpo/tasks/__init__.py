"""Tasks: where prompts come from, and the verifiers that judge responses. One file per family."""

from __future__ import annotations

import importlib.util
from typing import Protocol

from megatron_srpo.config.schema import Config, ConfigError, EvaluationSection, TaskSource
from megatron_srpo.data.records import Prompt

# Verifiers by name and rule: "module:function", (answer, text) → Verdict, called in a killable process.
VERIFIERS = {
    "exact": {"paper": "megatron_srpo.tasks.addition:verify"},
    "multiple_choice": {
        "paper": "megatron_srpo.tasks.sciknoweval:verify",
        "strict": "megatron_srpo.tasks.sciknoweval:verify_strict",
    },
    "tool_calls": {
        "paper": "megatron_srpo.tasks.tool_use:verify",
        "strict": "megatron_srpo.tasks.tool_use:verify_strict",
    },
    "math": {"paper": "megatron_srpo.tasks.mathematics:verify"},
}
# Task names that imply a verifier.
VERIFIER_OF = {
    **dict.fromkeys(("sciknoweval", "chemistry", "physics", "biology", "materials"), "multiple_choice"),
    "tool_use": "tool_calls",
    **dict.fromkeys(("math", "gsm8k", "aime24", "aime25", "hmmt25", "minerva", "olympiadbench"), "math"),
}


class Task(Protocol):
    """What a task must offer; prompts are addressed by number, so a run is defined by its seed alone."""

    name: str
    verifier: str
    """"module:function" or "file.py:Class.function": (answer, text) → Verdict.

    A pure function that must not evaluate `text` as code; it runs in worker processes (see `pool`).
    """

    def size(self, split: str) -> int | None:
        """Return the size of "train", "validation" or "test"; 0: no such split; None: endless."""
        ...

    def prompt(self, split: str, index: int) -> Prompt:
        """Return prompt `index` (0, 1, …), without token ids; finite tasks start new epochs in training."""
        ...


def create_task(source: TaskSource, seed: int) -> Task:
    """Create the task that a source describes.

    Raises:
        ConfigError: An unknown name, data that cannot be read, or keys that do not belong.
    """
    _refuse_strangers(source)
    if source.path is not None and source.path.suffix == ".py":
        from megatron_srpo.tasks.own import create_own_task

        return create_own_task(source, seed)
    if source.path is not None:
        from megatron_srpo.tasks import mathematics
        from megatron_srpo.tasks.questions import QuestionFile

        kind = source.verifier or VERIFIER_OF.get(source.name)
        if kind is None:
            raise ConfigError(
                f"task.verifier: who judges {source.name!r} in {source.path}? Set task.verifier"
                f" ({', '.join(VERIFIERS)}), or a task.name that implies it ({', '.join(VERIFIER_OF)})"
            )
        if source.rule not in VERIFIERS[kind]:
            raise ConfigError(f"task.rule: {kind} has no {source.rule} rule, only paper")
        if kind == "math" and importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                f"task.verifier: {source.name} needs math-verify; pip install 'megatron_srpo[tasks]'"
            )
        return QuestionFile(
            source, seed, VERIFIERS[kind][source.rule], mathematics.phrase if kind == "math" else str
        )
    if source.name == "addition":
        from megatron_srpo.tasks.addition import Addition

        return Addition(seed)
    if source.name.startswith("reasoning_gym/"):
        from megatron_srpo.tasks.procedural import Procedural

        return Procedural(source, seed)
    if source.name in VERIFIER_OF:
        raise ConfigError(
            f"task.path: {source.name} needs its questions: a folder with train.jsonl and test.jsonl, or a"
            f" .jsonl file"
        )
    raise ConfigError(
        f"task.name: unknown task {source.name!r}; known: addition, reasoning_gym/DATASET, and with"
        f" task.path: {', '.join(VERIFIER_OF)};"
        " a name of your own needs task.path and task.verifier, or a .py file as task.path"
    )


def training_tasks(config: Config) -> dict[str, Task]:
    """Create the tasks that are trained on, by name.

    Raises:
        ConfigError: As `create_task`, or a task has no training questions.
    """
    tasks = {source.name: create_task(source, config.train.seed) for source in config.task.sources}
    for name, task in tasks.items():
        if task.size("train") == 0:
            raise ConfigError(
                f"task.path: task {name} has no questions to train on (train.jsonl, or a smaller"
                f" task.test_share)"
            )
    return tasks


def evaluation_tasks(config: Config) -> dict[str, Task]:
    """Create the tasks that are evaluated, by name.

    Raises:
        ConfigError: As `create_task`, or a split is empty, or endless but wanted whole.
    """
    settings = config.evaluation
    tasks: dict[str, Task] = {}
    for source in config.evaluation_tasks:
        if source.name in tasks:
            raise ConfigError(
                f"evaluation.tasks: two tasks are called {source.name}; give each a name of its own (and a"
                f" verifier)"
            )
        task = tasks[source.name] = create_task(source, config.train.seed)
        for split in settings.splits:
            if task.size(split) == 0:
                raise ConfigError(
                    f"evaluation.splits: task {source.name} has no {split} questions ({split}.jsonl,"
                    f" task.{split}_share,"
                    " or evaluation.every: 0)"
                )
            if task.size(split) is None and settings.prompts is None:
                raise ConfigError(
                    f"evaluation.prompts: null means all, but task {source.name} is endless; give a number"
                )
    return tasks


def question_count(task: Task, split: str, settings: EvaluationSection) -> int:
    """Return how many questions of `split` are evaluated: evaluation.prompts, or all if there are fewer."""
    return min(count for count in (task.size(split), settings.prompts) if count is not None)


def _refuse_strangers(source: TaskSource) -> None:
    """Raise ConfigError for keys that this task does not read."""
    path = source.path
    is_own = path is not None and path.suffix == ".py"
    is_file = path is not None and not is_own
    belongs = {
        "verifier": is_file,
        "rule": is_file,
        "options": is_own or source.name.startswith("reasoning_gym/"),
        "test_share": is_file and path is not None and not path.is_dir(),
        "validation_share": is_file,
    }
    default = TaskSource()
    for key, is_read in belongs.items():
        if not is_read and getattr(source, key) != getattr(default, key):
            raise ConfigError(
                f"task.{key}: task {source.name} does not read it"
                + ("" if path is not None else "; is task.path missing?")
            )
