"""Answers of the eval command on disk: files of samples that an interrupted command continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from megatron_srpo.checkpoint.run_folder import check_writable
from megatron_srpo.config.load import load_config, save_config
from megatron_srpo.config.schema import Config, ConfigError
from megatron_srpo.data.records import Group, Sample
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.evaluation.evaluate import label_of, parts
from megatron_srpo.tasks import Task, question_count


class Answers:
    """One file of samples, complete groups in the order of their questions; only the first rank opens it.

    FILE.seconds, next to it, holds the time of each chunk, for the throughput.
    """

    def __init__(self, path: Path, samples: int, layout: Layout):
        self.path = path
        self.samples = samples
        self.layout = layout
        self.times = path.with_suffix(".seconds")

    def done(self) -> int:
        """Return how many questions are answered, after removing an incomplete group. All ranks together."""
        whole = 0
        if self.layout.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = self.path.read_bytes() if self.path.exists() else b""
            lines = content.split(b"\n")[:-1]
            whole = len(lines) // self.samples
            kept = sum(len(line) + 1 for line in lines[: whole * self.samples])
            if kept < len(content):
                os.truncate(self.path, kept)
        return self.layout.broadcast(whole)

    def append(self, groups: Sequence[Group], seconds: float) -> None:
        """Append a chunk's samples; they are on disk when this returns."""
        if self.layout.rank == 0:
            lines = "".join(sample.model_dump_json() + "\n" for group in groups for sample in group)
            for path, text in ((self.times, f"{seconds}\n"), (self.path, lines)):
                with path.open("a", encoding="utf-8") as out:
                    out.write(text)
                    out.flush()
                    os.fsync(out.fileno())

    def read(self) -> list[Group]:
        rows = [Sample.model_validate_json(line) for line in self.path.read_bytes().split(b"\n") if line]
        return [tuple(rows[start : start + self.samples]) for start in range(0, len(rows), self.samples)]

    def seconds(self) -> float:
        """Return the seconds spent on all answers."""
        return sum(float(line) for line in self.times.read_text().split())


def answer_files(config: Config, task: Task, split: str) -> tuple[Path, Path]:
    """Return the files of the sampled and of the greedy answers."""
    file = config.logging.dir / "samples" / f"{label_of(task, split).replace('/', '.')}.jsonl"
    return file, file.with_suffix(".greedy.jsonl")


def check_files(config: Config, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError unless every task's split has files of its own."""
    owners: dict[Path, str] = {}
    for task, split in parts(tasks, config.evaluation):
        for file in answer_files(config, task, split):
            if file in owners:
                both = f"{owners[file]} and {label_of(task, split)}"
                raise ConfigError(
                    f"evaluation.tasks: {both} would both keep their answers in {file}; give one another name"
                )
            owners[file] = label_of(task, split)


def open_folder(config: Config) -> None:
    """Make the result folder. Raises ConfigError if it holds something other than this evaluation."""
    directory, file = config.logging.dir, config.logging.dir / "config.yaml"
    check_writable(directory)
    if (directory / "metrics.jsonl").exists():
        raise ConfigError(
            f"logging.dir: {directory.resolve()} holds a training run; name another folder for the evaluation"
        )
    if file.exists():
        before, now = _what_counts(load_config(file, [])), _what_counts(config)
        if changed := sorted(key for key in before if before[key] != now[key]):
            setting = yaml.safe_dump(before[changed[0]], default_flow_style=True).strip()
            raise ConfigError(
                f"logging.dir: {directory.resolve()} holds an evaluation with other settings"
                f" ({', '.join(changed)}): {setting}; name another folder"
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    save_config(config, file)


def check_answered(config: Config, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError if answers on disk are to other questions: a question file may have changed."""
    for task, split in parts(tasks, config.evaluation):
        count = question_count(task, split, config.evaluation)
        for file, samples in zip(
            answer_files(config, task, split), (config.evaluation.samples, 1), strict=True
        ):
            lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
            for number, line in enumerate(lines[::samples]):
                then = Sample.model_validate_json(line).prompt
                now = task.prompt(split, number) if number < count else None
                if now is None or (then.id, then.messages, then.answer) != (now.id, now.messages, now.answer):
                    raise ConfigError(
                        f"logging.dir: {file} holds answers to other questions (first: {then.id});"
                        " name another folder"
                    )


def _what_counts(config: Config) -> dict:
    """Return the settings that answers depend on: not processes, batch sizes or anything about training."""
    tree = json.loads(config.model_dump_json())
    rollout = {
        key: tree["rollout"][key] for key in ("max_prompt_tokens", "max_response_tokens", "enable_thinking")
    }
    evaluation = {key: value for key, value in tree["evaluation"].items() if key not in ("every", "tasks")}
    tasks = [json.loads(source.model_dump_json()) for source in config.evaluation_tasks]
    counts = {"model": tree["model"], "rollout": rollout, "evaluation": evaluation, "evaluation.tasks": tasks}
    return {**counts, "train.seed": tree["train"]["seed"]}
