"""Tasks: sources of prompts, and the verifiers that judge responses. One file each, found by `catalog`."""

import importlib.util
from typing import Protocol

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config, EvaluationSection
from megatron_srpo.config.task_section import TaskSource
from megatron_srpo.data.records import Prompt
from megatron_srpo.tasks.catalog import Verifier, builtin_tasks, verifiers


class Task(Protocol):
    """The task protocol; prompts are addressed by number, so a run is defined by its seed alone."""

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
    """Create the task of a source; raise ConfigError for unknown names, unreadable data or unused keys."""
    if source.path is not None and not source.path.exists():
        expected = "expected a folder with train.jsonl and test.jsonl, a .jsonl file or your .py file"
        raise ConfigError(f"task.path: {source.path.resolve()} does not exist; {expected}")
    _refuse_unused_keys(source)
    if source.path is not None and source.path.suffix == ".py":
        from megatron_srpo.tasks.own import create_own_task

        return create_own_task(source, seed)
    if source.path is not None:
        return _question_file(source, seed)
    for builtin in builtin_tasks().values():
        if builtin.matches(source.name):
            return builtin.create(source, seed)
    implied = [name for verifier in verifiers().values() for name in verifier.tasks]
    if source.name in implied:
        expected = "a folder with train.jsonl and test.jsonl, or a .jsonl file"
        raise ConfigError(f"task.path: {source.name} needs its questions: {expected}")
    raise ConfigError(
        f"task.name: unknown task {source.name!r}; known: {', '.join(builtin_tasks())}, and with"
        f" task.path: {', '.join(implied)}; others need task.path and task.verifier, or a .py file there"
    )


def _question_file(source: TaskSource, seed: int) -> Task:
    from megatron_srpo.tasks.questions import QuestionFile

    verifier = _verifier_of(source)
    if source.rule not in verifier.rules:
        known = ", ".join(verifier.rules)
        raise ConfigError(f"task.rule: {verifier.name} has no {source.rule} rule, only {known}")
    if verifier.requires is not None and importlib.util.find_spec(verifier.requires) is None:
        needed = f"needs {verifier.requires.replace('_', '-')}; pip install 'megatron_srpo[tasks]'"
        raise ConfigError(f"task.verifier: {source.name} {needed}")
    return QuestionFile(source, seed, verifier)


def _verifier_of(source: TaskSource) -> Verifier:
    known = verifiers()
    if source.verifier is not None:
        if source.verifier not in known:
            problem = f"unknown verifier {source.verifier!r}; known: {', '.join(known)}"
            raise ConfigError(f"task.verifier: {problem}")
        return known[source.verifier]
    implied = {name: verifier for verifier in known.values() for name in verifier.tasks}
    if source.name not in implied:
        raise ConfigError(
            f"task.verifier: none for {source.name!r} in {source.path}. Set task.verifier"
            f" ({', '.join(known)}), or a task.name that implies it ({', '.join(implied)})"
        )
    return implied[source.name]


def training_tasks(config: Config) -> dict[str, Task]:
    """Create the training tasks, by name; raise ConfigError if one has no training questions."""
    tasks = {source.name: create_task(source, config.train.seed) for source in config.task.sources}
    for name, task in tasks.items():
        if task.size("train") == 0:
            problem = "has no questions to train on; expected train.jsonl, or a smaller task.test_share"
            raise ConfigError(f"task.path: task {name} {problem}")
    return tasks


def evaluation_tasks(config: Config) -> dict[str, Task]:
    """Create the evaluation tasks, by name; raise ConfigError for empty or unlimited splits."""
    settings = config.evaluation
    tasks: dict[str, Task] = {}
    for source in config.evaluation_tasks:
        if source.name in tasks:
            problem = f"two tasks are called {source.name}; rename one (and set its verifier)"
            raise ConfigError(f"evaluation.tasks: {problem}")
        task = tasks[source.name] = create_task(source, config.train.seed)
        for split in settings.splits:
            if task.size(split) == 0:
                raise ConfigError(f"evaluation.splits: {_no_questions(source, task, split)}")
            if task.size(split) is None and settings.prompts is None:
                problem = f"null means all, but task {source.name} is endless; give a number"
                raise ConfigError(f"evaluation.prompts: {problem}")
    return tasks


def _no_questions(source: TaskSource, task: Task, split: str) -> str:
    """Say why a split is empty, and what to do."""
    problem, path = f"task {source.name} has no {split} questions", source.path
    share = {"test": source.test_share, "validation": source.validation_share}[split]
    if path is not None and path.suffix == ".jsonl" and (split == "test" or share):
        lines = sum(task.size(one) or 0 for one in ("train", "validation", "test"))
        share = 0.1 if share is None else share
        found = f"task.{split}_share: {share:g} of the {lines} questions in {path} rounds to 0"
        return f"{problem}: {found}; set a larger share, more questions, or evaluation.every: 0"
    return f"{problem}; expected {split}.jsonl, task.{split}_share, or evaluation.every: 0"


def question_count(task: Task, split: str, settings: EvaluationSection) -> int:
    """Return the number of questions evaluated in `split`: evaluation.prompts, or all if there are fewer."""
    return min(count for count in (task.size(split), settings.prompts) if count is not None)


def _refuse_unused_keys(source: TaskSource) -> None:
    path = source.path
    is_own = path is not None and path.suffix == ".py"
    is_file = path is not None and not is_own
    reads_options = any(one.reads_options and one.matches(source.name) for one in builtin_tasks().values())
    belongs = {
        "verifier": is_file,
        "rule": is_file,
        "options": is_own or reads_options,
        "test_share": is_file and path is not None and not path.is_dir(),
        "validation_share": is_file,
    }
    default = TaskSource()
    for key, is_read in belongs.items():
        if not is_read and getattr(source, key) != getattr(default, key):
            hint = "; is task.path missing? Set it, or remove the key" if path is None else "; remove it"
            raise ConfigError(f"task.{key}: task {source.name} does not read it{hint}")
