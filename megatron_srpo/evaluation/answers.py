"""Answers of the eval command on disk: files of samples from which an interrupted command resumes."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from megatron_srpo.checkpoint.run_folder import check_writable
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config, save_config
from megatron_srpo.config.schema import Config
from megatron_srpo.data.records import Group, Sample
from megatron_srpo.distributed.files import FileError, read_jsonl
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.evaluation.evaluate import label_of, parts
from megatron_srpo.tasks import Task, question_count


class Answers:
    """One file of complete groups in the order of their questions, on rank 0; FILE.seconds has the times."""

    def __init__(self, path: Path, samples: int, layout: Layout):
        self.path = path
        self.samples = samples
        self.layout = layout
        self.times = path.with_suffix(".seconds")

    def done(self) -> int:
        """Return the number of answered questions, after removing an incomplete group. A collective call."""
        complete = 0
        if self.layout.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = self.path.read_bytes() if self.path.exists() else b""
            lines = content.split(b"\n")[:-1]
            complete = len(lines) // self.samples
            kept = sum(len(line) + 1 for line in lines[: complete * self.samples])
            if kept < len(content):
                os.truncate(self.path, kept)
        return self.layout.broadcast(complete)

    def append(self, groups: Sequence[Group], seconds: float) -> None:
        """Append a chunk's samples and its time, on disk when this returns."""
        if self.layout.rank == 0:
            lines = "".join(sample.model_dump_json() + "\n" for group in groups for sample in group)
            for path, text in ((self.times, f"{seconds}\n"), (self.path, lines)):
                with path.open("a", encoding="utf-8") as out:
                    out.write(text)
                    out.flush()
                    os.fsync(out.fileno())

    def read(self) -> list[Group]:
        """Read all groups; raise FileError for a damaged line."""
        found = read_jsonl(self.path)
        if found.problems:
            raise FileError(f"{found.problems[0]}; name another logging.dir")
        rows = [Sample.model_validate(row) for row in found.rows]
        return [tuple(rows[start : start + self.samples]) for start in range(0, len(rows), self.samples)]

    def seconds(self) -> float:
        """Return the seconds that sampling all chunks took."""
        return sum(float(line) for line in self.times.read_text().split())


def answer_files(config: Config, task: Task, split: str) -> tuple[Path, Path]:
    """Return the files of the sampled and of the greedy answers."""
    file = config.logging.dir / "samples" / f"{label_of(task, split).replace('/', '.')}.jsonl"
    return file, file.with_suffix(".greedy.jsonl")


def check_files(config: Config, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError unless every split of every task has its own files."""
    owners: dict[Path, str] = {}
    for task, split in parts(tasks, config.evaluation):
        for file in answer_files(config, task, split):
            if file in owners:
                both = f"{owners[file]} and {label_of(task, split)} would both write their answers to {file}"
                raise ConfigError(f"evaluation.tasks: {both}; rename one")
            owners[file] = label_of(task, split)


def open_folder(config: Config) -> None:
    """Make the result folder. Raises ConfigError if it holds something other than this evaluation."""
    directory, file = config.logging.dir, config.logging.dir / "config.yaml"
    check_writable(directory)
    holder = f"logging.dir: {directory.resolve()} holds"
    if (directory / "metrics.jsonl").exists():
        raise ConfigError(f"{holder} a training run; name another folder for the evaluation")
    if file.exists():
        before, now = _relevant_settings(load_config(file, [])), _relevant_settings(config)
        if changed := sorted(key for key in before if before[key] != now[key]):
            setting = yaml.safe_dump(before[changed[0]], default_flow_style=True).strip()
            changes = f"different settings ({', '.join(changed)}): {setting}"
            raise ConfigError(f"{holder} an evaluation with {changes}; name another folder")
        return
    directory.mkdir(parents=True, exist_ok=True)
    save_config(config, file)


def check_answered(config: Config, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError if answers on disk are to different questions, as a changed file can have."""
    for task, split in parts(tasks, config.evaluation):
        count = question_count(task, split, config.evaluation)
        sampled, greedy = answer_files(config, task, split)
        for file, samples in ((sampled, config.evaluation.samples), (greedy, 1)):
            for number, row in enumerate(read_jsonl(file).rows[::samples]):  # `done` cuts a partial last line
                then = Sample.model_validate(row).prompt
                now = task.prompt(split, number) if number < count else None
                if now is None or (then.id, then.messages, then.answer) != (now.id, now.messages, now.answer):
                    other = f"answers to different questions (first: {then.id})"
                    raise ConfigError(f"logging.dir: {file} holds {other}; name another folder")


def _relevant_settings(config: Config) -> dict:
    """Return the settings that answers depend on: not processes, batch sizes or anything about training."""
    tree = json.loads(config.model_dump_json())
    keys = ("max_prompt_tokens", "max_response_tokens", "enable_thinking")
    rollout = {key: tree["rollout"][key] for key in keys}
    evaluation = {key: value for key, value in tree["evaluation"].items() if key not in ("every", "tasks")}
    tasks = [json.loads(source.model_dump_json()) for source in config.evaluation_tasks]
    counts = {"model": tree["model"], "rollout": rollout, "evaluation": evaluation, "evaluation.tasks": tasks}
    return {**counts, "train.seed": tree["train"]["seed"]}
