"""The task section: the tasks to train on, their files and verifiers."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_srpo.config.base import Section


class TaskSource(Section):
    """One task: the source of its questions and its verifier. A bare word is short for its name."""

    name: str = Field(
        default="addition",
        pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$",
        description="addition, reasoning_gym/DATASET, or the name of the task in `path`; default: its stem",
    )
    path: Path | None = Field(
        default=None, description="folder with train.jsonl and test.jsonl, a .jsonl file, or your .py file"
    )
    verifier: str | None = Field(
        default=None, description="verifier of the questions in `path`; null: by name (docs/tasks.md)"
    )
    rule: Literal["paper", "strict"] = Field(
        default="paper", description="multiple_choice and tool_calls: the papers' rule, or our strict one"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="passed to the reasoning_gym dataset or to your own class"
    )
    weight: float = Field(
        default=1.0, gt=0, description="share of the training prompts, relative to the mixture's other tasks"
    )
    test_share: float | None = Field(
        default=None, ge=0, le=1, description="test share of a .jsonl file; null: 0.1, or 1 if not trained on"
    )
    validation_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of training questions held out if no validation.jsonl"
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_word(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"name": given}
        if isinstance(given, dict) and given.get("path") and given.get("name") is None:
            return {**given, "name": Path(str(given["path"])).stem}
        return given


class TaskSection(TaskSource):
    """One task or a mixture of tasks, and the limits of the verifier processes."""

    mixture: list[TaskSource] | None = Field(
        default=None, min_length=1, description="several tasks, instead of name and path"
    )
    verifier_workers: int = Field(default=2, gt=0, description="verifier processes per rank")
    verifier_seconds: float = Field(
        default=10.0, gt=0, description="timeout per sample; the verifier process is killed when it expires"
    )
    verifier_memory_mib: int = Field(default=2048, ge=256, description="memory limit of a verifier process")
    verifier_failed: Literal["exclude", "zero"] = Field(
        default="exclude", description="exclude a sample whose verifier failed, or count it as wrong"
    )

    @property
    def sources(self) -> tuple[TaskSource, ...]:
        """The tasks to train on."""
        own = {name: getattr(self, name) for name in TaskSource.model_fields}
        return tuple(self.mixture or [TaskSource(**own)])

    @model_validator(mode="before")
    @classmethod
    def _mixture_alone(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("mixture"):
            default = TaskSource()
            given = {key: value for key, value in given.items() if value is not None}
            for key in sorted(TaskSource.model_fields):
                if key in given and given[key] != getattr(default, key):
                    raise ValueError(
                        f"task.mixture: task.{key} belongs in one of its tasks (or set it to null)"
                    )
        return given

    @model_validator(mode="after")
    def _own_names(self):
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"task.mixture: two tasks are called {repeated[0]}; rename one (and set its verifier)"
            )
        if self.mixture is None and self.weight != 1:
            raise ValueError(
                "task.weight: is a task's share of task.mixture, but there is no mixture; remove it"
            )
        return self
