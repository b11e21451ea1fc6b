"""Evaluation on held-out questions: during training, and as a command on any Hugging Face folder.

Both take the same path.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import yaml
from safetensors import safe_open
from torch import Tensor

from megatron_srpo.checkpoint.run_folder import check_writable
from megatron_srpo.checkpoint.weights import RunTensors, checkpoint_of, is_of_a_run
from megatron_srpo.config.load import load_config, save_config
from megatron_srpo.config.schema import Config, ConfigError, EvaluationSection, ParallelSection
from megatron_srpo.data.records import Group, Sample
from megatron_srpo.distributed.layout import Layout, joined
from megatron_srpo.distributed.processes import rank_from_environment
from megatron_srpo.evaluation.scoreboard import Outcome, result_of, write_result
from megatron_srpo.evaluation.scores import interval
from megatron_srpo.model.hf_folder import HFFolder, naming_key
from megatron_srpo.preflight import check_evaluation
from megatron_srpo.rollout.collect import Collector, exchange
from megatron_srpo.rollout.engine import Sampling
from megatron_srpo.rollout.engines import check_engine, create_engine
from megatron_srpo.tasks import Task, evaluation_tasks, question_count
from megatron_srpo.tasks.pool import Pool
from megatron_srpo.weights.transfer import Repeatable

CHUNK_SEQUENCES = 1024  # at most so many responses are lost when a command is cut off


def evaluate(
    collector: Collector, tasks: Mapping[str, Task], settings: EvaluationSection, max_tokens: int, seed: int
) -> dict[str, float]:
    """The evaluation's part of metrics.jsonl: every rank samples its share, every rank gets the result.

    The same prompts and the same random numbers at every call: two evaluations differ by the weights alone.
    """
    sampling = Sampling(settings.temperature, settings.top_p, max_tokens, collector.folder.stop_ids)
    scores: dict[str, float] = {}
    for task, split in _parts(tasks, settings):
        numbers = range(question_count(task, split, settings))
        groups = ask(collector, task, split, numbers, settings.samples, sampling, f"{seed}/evaluation")
        scores |= summarise(_label(task, split), groups)
    if len(tasks) > 1:
        for kind in ("avg", "pass"):
            key = f"{kind}@{settings.samples}"
            values = [scores[f"eval/{_label(task, settings.splits[0])}/{key}"] for task in tasks.values()]
            scores[f"eval/mean/{key}"] = sum(values) / len(values)
    return scores


def ask(
    collector: Collector, task: Task, split: str, numbers: range, samples: int, sampling: Sampling, seed: str
) -> list[Group]:
    """The verified groups of the questions `numbers` of `split`, all of them on every rank, in order."""
    prompts = collector.prompts(partial(task.prompt, split), numbers)
    return exchange(collector.sample(prompts, samples, sampling, seed), collector.layout)


def summarise(label: str, groups: Sequence[Group]) -> dict[str, float]:
    """avg@K (mean accuracy of K samples a prompt) with its 95 % interval over questions, pass@K (share of
    prompts with a correct one), length, format, truncation.
    """
    samples = [sample for group in groups for sample in group]
    k = len(groups[0])
    of_questions = [sum(sample.verdict.correct for sample in group) / k for group in groups]
    _, low, high = interval([of_questions])
    return {
        f"eval/{label}/avg_low": low,
        f"eval/{label}/avg_high": high,
        f"eval/{label}/avg@{k}": sum(sample.verdict.correct for sample in samples) / len(samples),
        f"eval/{label}/pass@{k}": sum(any(sample.verdict.correct for sample in group) for group in groups)
        / len(groups),
        f"eval/{label}/response_tokens_mean": sum(sample.policy_tokens for sample in samples) / len(samples),
        f"eval/{label}/format_rate": sum(sample.verdict.format_ok for sample in samples) / len(samples),
        f"eval/{label}/truncated_share": sum(sample.finish_reason == "length" for sample in samples)
        / len(samples),
        f"eval/{label}/verifier_failed_share": sum(
            sample.verdict.verifier_failed is not None for sample in samples
        )
        / len(samples),
    }


def _parts(tasks: Mapping[str, Task], settings: EvaluationSection) -> list[tuple[Task, str]]:
    return [(task, split) for task in tasks.values() for split in settings.splits]


def _label(task: Task, split: str) -> str:
    """What a task's split is called in metrics: the test split has the task's name."""
    return task.name if split == "test" else f"{task.name}/{split}"


# ---- the command
# -------------------------------------------------------------------------------------------------------


@naming_key("model.hf_path")
def run_evaluation(config: Config) -> Path:
    """`python -m megatron_srpo eval`: evaluate model.hf_path, or the policy of the run evaluation.checkpoint,
    on this process's share.

    Returns the result folder (logging.dir). Every sample is appended to samples/, chunk by chunk; the same
    command goes on where an earlier one stopped. At the end result.json and result.md. Raises ConfigError
    before any work for what cannot be run. Of a run it is the newest checkpoint now: when there is a newer
    one, the same command is another evaluation.
    """
    folder = HFFolder(config.model.hf_path)
    folder.validate()
    if (path := config.evaluation.checkpoint) is not None:
        if not is_of_a_run(path):
            raise ConfigError(
                f"evaluation.checkpoint: {path} is neither a run folder with checkpoints nor one of its checkpoints"
            )
        config = _with_checkpoint(config, checkpoint_of(path))
    tasks = evaluation_tasks(config)
    check_evaluation(config, folder, tasks)
    _check_files(config, tasks)
    if rank_from_environment() == 0:
        check_engine(config)
        _open_folder(config)
        _check_answered(config, tasks)
    alone = ParallelSection(
        distributed_timeout_minutes=config.parallel.distributed_timeout_minutes
    )  # every process holds an engine
    with joined(alone, config.train.seed) as layout:
        if path is not None:  # the first rank's: a run that goes on may have saved another meanwhile
            first = layout.broadcast(str(config.evaluation.checkpoint))
            config = _with_checkpoint(config, Path(first))
        engine = create_engine(config, folder, layout, lambda text: print(text) if layout.rank == 0 else None)
        with closing(engine):
            engine.update_weights(Repeatable(lambda: stored_weights(config, folder)), "0")
            verifiers = Pool({name: task.verifier for name, task in tasks.items()}, config.task)
            outcomes = _ask_everything(
                config, Collector(verifiers, engine, folder, layout, config.rollout), tasks
            )
            if layout.rank == 0:
                model = str(config.evaluation.checkpoint or config.model.hf_path)
                write_result(config.logging.dir, result_of(outcomes, model, layout.device.type))
    return config.logging.dir


def _with_checkpoint(config: Config, checkpoint: Path) -> Config:
    return config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"checkpoint": checkpoint})}
    )


def _ask_everything(config: Config, collector: Collector, tasks: Mapping[str, Task]) -> list[Outcome]:
    """Sampled and greedy answers to every split of every task.

    On the first rank, the outcomes; elsewhere nothing.
    """
    settings, outcomes = config.evaluation, []
    limit, stops = config.rollout.max_response_tokens, collector.folder.stop_ids
    sampling, greedy = (
        Sampling(settings.temperature, settings.top_p, limit, stops),
        Sampling(0.0, 1.0, limit, stops),
    )
    for task, split in _parts(tasks, settings):
        label = _label(task, split)
        file, greedy_file = _files(config, task, split)
        sampled = Answers(file, settings.samples, collector.layout)
        single = Answers(greedy_file, 1, collector.layout)
        _complete(sampled, collector, task, split, config, sampling)
        if wants_greedy := settings.greedy and settings.temperature > 0:
            _complete(single, collector, task, split, config, greedy)
        if collector.layout.rank == 0:
            outcomes.append(
                Outcome(label, sampled.read(), sampled.seconds(), single.read() if wants_greedy else None)
            )
    return outcomes


def _files(config: Config, task: Task, split: str) -> tuple[Path, Path]:
    """Where the sampled and the greedy answers are kept."""
    file = config.logging.dir / "samples" / f"{_label(task, split).replace('/', '.')}.jsonl"
    return file, file.with_suffix(".greedy.jsonl")


def _check_files(config: Config, tasks: Mapping[str, Task]) -> None:
    """Every task's split has files of its own. Raises ConfigError."""
    owners: dict[Path, str] = {}
    for task, split in _parts(tasks, config.evaluation):
        for file in _files(config, task, split):
            if file in owners:
                raise ConfigError(
                    f"evaluation.tasks: {owners[file]} and {_label(task, split)} would both keep their answers in {file};"
                    " give one another name"
                )
            owners[file] = _label(task, split)


def _complete(
    answers: Answers, collector: Collector, task: Task, split: str, config: Config, sampling: Sampling
) -> None:
    """Ask the questions that have no answers yet, in chunks that keep every rank's engine busy."""
    count, ranks = question_count(task, split, config.evaluation), collector.layout.world_size
    chunk = max(1, CHUNK_SEQUENCES // answers.samples // ranks) * ranks
    for start in range(answers.done(), count, chunk):
        began = time.perf_counter()
        numbers = range(start, min(start + chunk, count))
        groups = ask(
            collector, task, split, numbers, answers.samples, sampling, f"{config.train.seed}/evaluation"
        )
        answers.append(groups, time.perf_counter() - began)


class Answers:
    """One file of samples, whole groups in the order of their questions; only the first rank touches it.

    Beside it FILE.seconds: the time of each chunk, for the throughput.
    """

    def __init__(self, path: Path, samples: int, layout: Layout):
        self.path, self.samples, self.layout = path, samples, layout
        self.times = path.with_suffix(".seconds")

    def done(self) -> int:
        """How many questions are answered, on every rank alike; what a cut-off command left of a group is
        removed.
        """
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
        """The chunk's samples are on disk when this returns."""
        if self.layout.rank == 0:
            lines = "".join(sample.model_dump_json() + "\n" for group in groups for sample in group)
            for path, text in ((self.times, f"{seconds}\n"), (self.path, lines)):
                with path.open("a", encoding="utf-8") as out:
                    out.write(text)
                    out.flush()
                    os.fsync(out.fileno())

    def read(self) -> list[Group]:
        """Every group."""
        rows = [Sample.model_validate_json(line) for line in self.path.read_bytes().split(b"\n") if line]
        return [tuple(rows[start : start + self.samples]) for start in range(0, len(rows), self.samples)]

    def seconds(self) -> float:
        """Time spent on what is there."""
        return sum(float(line) for line in self.times.read_text().split())


def stored_weights(config: Config, folder: HFFolder) -> Iterator[tuple[str, Tensor]]:
    """The folder's weights, or the checkpoint's, as the stream an engine takes."""
    if (path := config.evaluation.checkpoint) is not None:
        policy = RunTensors(path, "policy")
        if policy.architecture != folder.architecture:
            raise ConfigError(
                f"evaluation.checkpoint: {policy.folder.path} holds another model than model.hf_path ({folder.path})"
            )
        yield from ((name, policy.tensor(name).to(policy.dtype(name))) for name in policy.names())
        return
    for file in sorted(set(folder.file_of.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in (name for name, place in folder.file_of.items() if place == file):
                yield name, tensors.get_tensor(name)


def _open_folder(config: Config) -> None:
    """Make the result folder, or find it made by the same command. Raises ConfigError otherwise."""
    directory, file = config.logging.dir, config.logging.dir / "config.yaml"
    check_writable(directory)
    if (directory / "metrics.jsonl").exists():
        raise ConfigError(
            f"logging.dir: {directory.resolve()} holds a training run; name another folder for the evaluation"
        )
    if file.exists():
        before, now = _what_counts(load_config(file, [])), _what_counts(config)
        if changed := sorted(key for key in before if before[key] != now[key]):
            raise ConfigError(
                f"logging.dir: {directory.resolve()} holds an evaluation with other settings ({', '.join(changed)}):"
                f" {yaml.safe_dump(before[changed[0]], default_flow_style=True).strip()}; name another folder"
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    save_config(config, file)


def _check_answered(config: Config, tasks: Mapping[str, Task]) -> None:
    """What has been answered are the questions asked now: a file of questions may have changed.

    Raises ConfigError.
    """
    for task, split in _parts(tasks, config.evaluation):
        count = question_count(task, split, config.evaluation)
        for file, samples in zip(_files(config, task, split), (config.evaluation.samples, 1), strict=True):
            lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
            for number, line in enumerate(lines[::samples]):
                then = Sample.model_validate_json(line).prompt
                now = task.prompt(split, number) if number < count else None
                if now is None or (then.id, then.messages, then.answer) != (now.id, now.messages, now.answer):
                    raise ConfigError(
                        f"logging.dir: {file} holds answers to other questions (first: {then.id}); name another folder"
                    )


def _what_counts(config: Config) -> dict:
    """The settings answers depend on; processes, batch sizes and everything about training do not matter."""
    tree = json.loads(config.model_dump_json())
    rollout = {
        key: tree["rollout"][key] for key in ("max_prompt_tokens", "max_response_tokens", "enable_thinking")
    }
    evaluation = {key: value for key, value in tree["evaluation"].items() if key not in ("every", "tasks")}
    tasks = [json.loads(source.model_dump_json()) for source in config.evaluation_tasks]
    counts = {"model": tree["model"], "rollout": rollout, "evaluation": evaluation, "evaluation.tasks": tasks}
    return {**counts, "train.seed": tree["train"]["seed"]}
