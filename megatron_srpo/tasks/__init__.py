"""Tasks: where prompts come from and who says whether a response is right. One file a family."""

from __future__ import annotations

import importlib.util
from typing import Protocol

from megatron_srpo.config.schema import Config, ConfigError, EvaluationSection, TaskSource
from megatron_srpo.data.records import Prompt

# Who judges, by name and rule: "module:function", (answer, text) → Verdict, called in a process that can be
# killed.
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
# Names that say who judges.
VERIFIER_OF = {
    **dict.fromkeys(("sciknoweval", "chemistry", "physics", "biology", "materials"), "multiple_choice"),
    "tool_use": "tool_calls",
    **dict.fromkeys(("math", "gsm8k", "aime24", "aime25", "hmmt25", "minerva", "olympiadbench"), "math"),
}


class Task(Protocol):
    """What a task must offer.

    Prompts are addressed by number, so a run is defined by its seed alone; no process takes part.
    """

    name: str
    verifier: str
    """"module:function" or "file.py:Class.function": (answer, text) → Verdict. A pure function that must not evaluate `text` as code;
    it runs in worker processes (see `pool`)."""

    def size(self, split: str) -> int | None:
        """How many prompts `split` ("train", "validation", "test") has, 0 when there is no such split; None:
        endless.
        """

    def prompt(self, split: str, index: int) -> Prompt:
        """Prompt `index` (0, 1, …) of `split`, without token ids.

        Training never ends: a finite task begins a new epoch.
        """


def create_task(source: TaskSource, seed: int) -> Task:
    """The task a source describes.

    Raises ConfigError for an unknown name, data that cannot be read or keys that do not belong.
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
                f"task.verifier: who judges {source.name!r} in {source.path}? Give task.verifier"
                f" ({', '.join(VERIFIERS)}),"
                f" or a task.name that says it ({', '.join(VERIFIER_OF)})"
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
    """The tasks trained on, by name.

    Raises ConfigError as `create_task` does, or for a task without training questions.
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
    """What is evaluated, by name.

    Raises ConfigError as `create_task` does, or for a split that is empty or endless and wanted whole.
    """
    settings, tasks = config.evaluation, {}
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
    """How many questions of `split` are evaluated: evaluation.prompts, or as many as there are."""
    return min(count for count in (task.size(split), settings.prompts) if count is not None)


def _refuse_strangers(source: TaskSource) -> None:
    """Keys that would be read by nobody."""
    is_file, is_own = source.path is not None, source.path is not None and source.path.suffix == ".py"
    belongs = {
        "verifier": is_file and not is_own,
        "rule": is_file and not is_own,
        "options": is_own or source.name.startswith("reasoning_gym/"),
        "test_share": is_file and not is_own and not source.path.is_dir(),
        "validation_share": is_file and not is_own,
    }
    default = TaskSource()
    for key, is_read in belongs.items():
        if not is_read and getattr(source, key) != getattr(default, key):
            raise ConfigError(
                f"task.{key}: task {source.name} does not read it"
                + ("" if is_file else "; is task.path missing?")
            )
