"""The eval command: evaluate a Hugging Face folder, or the policy of a run, on held-out questions."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from megatron_srpo.checkpoint.folder import read_manifest
from megatron_srpo.checkpoint.inputs import file_checksum, tokenizer_inputs
from megatron_srpo.checkpoint.weights import RunTensors, checkpoint_of, is_of_a_run
from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import Config, ParallelSection
from megatron_srpo.data.records import Sample
from megatron_srpo.distributed.layout import Layout, process_group
from megatron_srpo.distributed.processes import rank_from_environment
from megatron_srpo.distributed.startup import resume_collection
from megatron_srpo.evaluation.answers import Answers, answer_files, check_answered, check_files, open_folder
from megatron_srpo.evaluation.evaluate import ask, label_of, parts
from megatron_srpo.evaluation.scoreboard import Outcome, result_of, write_result
from megatron_srpo.model.hf_folder import HFFolder, naming_key
from megatron_srpo.preflight import check_evaluation
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.rollout.engine import Sampling
from megatron_srpo.rollout.engines import check_engine, create_engine
from megatron_srpo.tasks import Task, evaluation_tasks, question_count
from megatron_srpo.tasks.pool import Pool
from megatron_srpo.tasks.remarks import evaluation_remarks
from megatron_srpo.weights.transfer import Repeatable

CHUNK_SEQUENCES = 1024  # responses that all ranks sample before the first one writes them
PROGRESS_SECONDS = 10.0


@naming_key("model.hf_path")
def run_evaluation(config: Config) -> Path:
    """Evaluate model.hf_path or evaluation.checkpoint, or resume it; return the folder of result.json."""
    folder = HFFolder(config.model.hf_path)
    folder.validate()
    if (path := config.evaluation.checkpoint) is not None:
        if not is_of_a_run(path):
            expected = "a run folder with checkpoints nor one of its checkpoints"
            raise ConfigError(f"evaluation.checkpoint: {path} is neither {expected}")
        config = _with_checkpoint(config, checkpoint_of(path))
    tasks = evaluation_tasks(config)
    check_evaluation(config, folder, tasks)
    check_files(config, tasks)
    weights = ""
    if rank_from_environment() == 0:
        check_engine(config, trains=False)
        weights = weights_checksum(config, folder)
        model = {"weights": weights, **tokenizer_inputs(folder)}
        open_folder(config, model)
        for line in evaluation_remarks(config.evaluation, tasks, {}):
            print(line)
        check_answered(config, tasks)
    # Every process has its own engine.
    minutes = config.parallel.distributed_timeout_minutes
    data_parallel = ParallelSection.model_validate({"distributed_timeout_minutes": minutes})
    with process_group(data_parallel, config.train.seed) as layout:
        if path is not None:  # the first rank's choice: a run in progress may have saved another meanwhile
            first = layout.broadcast(str(config.evaluation.checkpoint))
            config = _with_checkpoint(config, Path(first))
        engine = create_engine(config, folder, layout, lambda text: print(text) if layout.rank == 0 else None)
        with closing(engine):
            engine.update_weights(Repeatable(lambda: stored_weights(config, folder)), "0")
            verifiers = Pool({name: task.verifier for name, task in tasks.items()}, config.task)
            collector = Collector(verifiers, engine, folder, layout, config.rollout)
            resume_collection()
            outcomes = _sample_all(config, collector, tasks)
            if layout.rank == 0:
                name = str(config.evaluation.checkpoint or config.model.hf_path)
                result = result_of(outcomes, name, weights, layout.device.type)
                write_result(config.logging.dir, result)
    return config.logging.dir


def _with_checkpoint(config: Config, checkpoint: Path) -> Config:
    evaluation = config.evaluation.model_copy(update={"checkpoint": checkpoint})
    return config.model_copy(update={"evaluation": evaluation})


def _sample_all(config: Config, collector: Collector, tasks: Mapping[str, Task]) -> list[Outcome]:
    """Sample answers and greedy answers to every split of every task; return the outcomes on rank 0."""
    settings, outcomes = config.evaluation, []
    limit, stops = config.rollout.max_response_tokens, collector.folder.stop_ids
    sampling = Sampling(settings.temperature, settings.top_p, limit, stops)
    greedy = Sampling(0.0, 1.0, limit, stops)
    for task, split in parts(tasks, settings):
        label = label_of(task, split)
        file, greedy_file = answer_files(config, task, split)
        sampled = Answers(file, settings.samples, collector.layout)
        single = None
        _complete(sampled, collector, task, split, config, sampling)
        if settings.greedy and settings.temperature > 0:
            single = Answers(greedy_file, 1, collector.layout)
            _complete(single, collector, task, split, config, greedy)
        if collector.layout.rank == 0:
            greedy_groups = None if single is None else single.read()
            outcomes.append(Outcome(label, sampled.read(), sampled.seconds(), greedy_groups))
    return outcomes


def _complete(
    answers: Answers, collector: Collector, task: Task, split: str, config: Config, sampling: Sampling
) -> None:
    """Sample answers to the questions without any, in chunks that keep every rank's engine busy."""
    count, ranks = question_count(task, split, config.evaluation), collector.layout.world_size
    chunk = max(1, CHUNK_SEQUENCES // answers.samples // ranks) * ranks
    seed, done = f"{config.train.seed}/evaluation", answers.done()
    known = answers.unfinished()
    progress = _Progress(answers.path.stem, count * answers.samples, collector.layout)
    progress.show(max(done * answers.samples, len(known)))

    def persist(samples: Sequence[Sample]) -> None:
        answers.keep(samples)
        progress.add(len(samples) * ranks)

    for start in range(done, count, chunk):
        numbers = range(start, min(start + chunk, count))
        groups = ask(collector, task, split, numbers, answers.samples, sampling, seed, known, persist)
        answers.append(groups)
        progress.show(numbers.stop * answers.samples)
    answers.close()


class _Progress:
    """Lines about the number of answers so far, on the first rank's standard error."""

    def __init__(self, name: str, total: int, layout: Layout):
        self._name, self._total, self._is_first = name, total, layout.rank == 0
        self._done, self._shown_at = 0, -math.inf

    def add(self, count: int) -> None:
        """Count answers, of all ranks by estimate; show them every PROGRESS_SECONDS."""
        self._done = min(self._done + count, self._total)
        if time.monotonic() - self._shown_at >= PROGRESS_SECONDS:
            self.show(self._done)

    def show(self, done: int) -> None:
        """Show that `done` answers exist."""
        self._done, self._shown_at = done, time.monotonic()
        if self._is_first:
            print(f"{self._name}: {done} of {self._total} answers", file=sys.stderr, flush=True)


def weights_checksum(config: Config, folder: HFFolder) -> str:
    """Return the SHA-256 of the weights' files, or of the checksums in evaluation.checkpoint."""
    total = hashlib.sha256()
    if (path := config.evaluation.checkpoint) is not None:
        files = read_manifest(path).files
        total.update(json.dumps({name: files[name].crc32 for name in sorted(files)}).encode())
    else:
        for file in sorted(set(folder.file_of.values())):
            total.update(f"{file.name} {file_checksum(file)}\n".encode())
    return total.hexdigest()


def stored_weights(config: Config, folder: HFFolder) -> Iterator[tuple[str, Tensor]]:
    """Yield the folder's weights, or those of evaluation.checkpoint, as (name, tensor) for an engine."""
    if (path := config.evaluation.checkpoint) is not None:
        policy = RunTensors(path, "policy")
        if policy.architecture != folder.architecture:
            held = f"{policy.folder.path} holds a different model than model.hf_path ({folder.path})"
            raise ConfigError(f"evaluation.checkpoint: {held}")
        yield from ((name, policy.tensor(name).to(policy.dtype(name))) for name in policy.names())
        return
    for file in sorted(set(folder.file_of.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in (name for name, place in folder.file_of.items() if place == file):
                yield name, tensors.get_tensor(name)
