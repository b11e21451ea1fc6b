"""Answers of the eval command on disk: files of samples from which an interrupted command resumes."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from pydantic import ValidationError

from megatron_srpo.checkpoint.run_folder import check_writable
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config, save_config
from megatron_srpo.config.schema import Config
from megatron_srpo.data.records import Group, Prompt, Sample, SampleKey
from megatron_srpo.distributed.files import FileError, read_jsonl, write_text
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.evaluation.evaluate import label_of, parts
from megatron_srpo.rollout.exchange import in_prompt_order
from megatron_srpo.rollout.ledger import Ledger
from megatron_srpo.tasks import Task, question_count


class Answers:
    """One file of complete groups in the order of their questions, on rank 0; FILE.seconds has the times.

    Answers to the questions that come next are kept as they arrive, in samples/unfinished/.
    """

    def __init__(self, path: Path, samples: int, layout: Layout):
        self.path = path
        self.samples = samples
        self.layout = layout
        self.times = path.with_suffix(".seconds")
        self._unfinished = Ledger(path.parent / "unfinished" / path.stem, layout, keeps_samples=True)
        self._began_at = time.perf_counter()

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

    def unfinished(self) -> dict[SampleKey, Sample]:
        """Return the kept answers to the next questions; the time counts from now on."""
        self._began_at = time.perf_counter()
        return {key: found.sample for key, found in self._unfinished.recovered(1).items()}

    def keep(self, samples: Sequence[Sample]) -> None:
        """Keep answers as they arrive, not yet verified, and the time since the last ones."""
        self._unfinished.persist(1, 1, samples)
        self._append(self.times, self._seconds())

    def append(self, groups: Sequence[Group]) -> None:
        """Append all ranks' samples of a chunk, on disk when this returns, and its time. A collective.

        Rank r has every world_size-th group of the chunk, from the r-th.
        """
        own = ["".join(sample.model_dump_json() + "\n" for sample in group).encode() for group in groups]
        lines = b"".join(in_prompt_order(self.layout.gather_on_first(own)))
        self._append(self.times, self._seconds())
        self._append(self.path, lines.decode())

    def close(self) -> None:
        """Remove the kept answers, once all questions are answered."""
        self._unfinished.close()
        if self.layout.rank == 0:
            folder = self.path.parent / "unfinished"
            shutil.rmtree(folder / self.path.stem, ignore_errors=True)
            with suppress(OSError):  # not empty: other tasks are not finished
                folder.rmdir()

    def _seconds(self) -> str:
        now = time.perf_counter()
        seconds, self._began_at = now - self._began_at, now
        return f"{seconds}\n"

    def _append(self, path: Path, text: str) -> None:
        if self.layout.rank == 0:
            with path.open("a", encoding="utf-8") as out:
                out.write(text)
                if path == self.path:
                    out.flush()
                    os.fsync(out.fileno())

    def read(self) -> list[Group]:
        """Read all groups; raise FileError for a damaged line."""
        rows = read_samples(self.path)
        return [tuple(rows[start : start + self.samples]) for start in range(0, len(rows), self.samples)]

    def seconds(self) -> float:
        """Return the seconds that sampling all chunks took; raise FileError for a damaged line."""
        try:
            return sum(float(line) for line in self.times.read_text(encoding="utf-8").split())
        except ValueError as error:
            raise FileError(f"{self.times}: is damaged ({error}); name another logging.dir") from None


def read_samples(file: Path) -> list[Sample]:
    """Read a file of samples, none if it does not exist; raise FileError for a damaged line."""
    found = read_jsonl(file)
    samples = []
    try:
        for row, number in zip(found.rows, found.numbers, strict=True):
            samples.append(Sample.model_validate(row))
            if samples[-1].verdict is None:
                raise FileError(f"{file}:{number}: has no verdict; name another logging.dir")
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        problem = f"{file}:{number}: {place}: {error.errors()[0]['msg']}"
        raise FileError(f"{problem}; name another logging.dir") from None
    if found.problems:
        raise FileError(f"{found.problems[0]}; name another logging.dir")
    return samples


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


def open_folder(config: Config, model: Mapping[str, str]) -> None:
    """Make the result folder. Raises ConfigError if it holds something other than this evaluation.

    `model` has the checksums of the weights and of the tokenizer.
    """
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
        _check_model(directory, model, holder)
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "model.json", json.dumps(model, indent=1) + "\n")
    save_config(config, file)


def _check_model(directory: Path, model: Mapping[str, str], holder: str) -> None:
    file = directory / "model.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("expected an object")
    except FileNotFoundError:
        problem = "an evaluation of an older version, which did not note its weights' checksum"
        raise ConfigError(f"{holder} {problem}; name another folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}; name another logging.dir") from None
    if changed := [key for key in {**before, **model} if before.get(key) != model.get(key)]:
        others = f"answers of another model ({', '.join(changed)} changed since)"
        raise ConfigError(f"{holder} {others}; name another folder")


def check_answered(config: Config, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError if answers on disk are to different questions, as a changed file can have."""
    for task, split in parts(tasks, config.evaluation):
        count = question_count(task, split, config.evaluation)
        sampled, greedy = answer_files(config, task, split)
        for file, samples in ((sampled, config.evaluation.samples), (greedy, 1)):
            for number, then in enumerate(_prompts(file, samples)):
                now = task.prompt(split, number) if number < count else None
                if now is None or (then.id, then.messages, then.answer) != (now.id, now.messages, now.answer):
                    other = f"answers to different questions (first: {then.id})"
                    raise ConfigError(f"logging.dir: {file} holds {other}; name another folder")


def _prompts(file: Path, samples: int) -> list[Prompt]:
    """Return the questions of the complete groups; `Answers.done` removes what is left of the last one."""
    if not file.is_file() or file.read_bytes().endswith(b"\n"):
        return [sample.prompt for sample in read_samples(file)[::samples]]
    rows = read_jsonl(file).rows
    return [Sample.model_validate(row).prompt for row in rows[: len(rows) // samples * samples : samples]]


def _relevant_settings(config: Config) -> dict:
    """Return the settings that answers depend on: not processes, batch sizes or anything about training."""
    tree = json.loads(config.model_dump_json())
    keys = ("max_prompt_tokens", "max_response_tokens", "enable_thinking")
    rollout = {key: tree["rollout"][key] for key in keys}
    evaluation = {key: value for key, value in tree["evaluation"].items() if key not in ("every", "tasks")}
    tasks = [json.loads(source.model_dump_json()) for source in config.evaluation_tasks]
    counts = {"model": tree["model"], "rollout": rollout, "evaluation": evaluation, "evaluation.tasks": tasks}
    return {**counts, "train.seed": tree["train"]["seed"]}
