"""Evaluation of the engine's weights on held-out questions; training and the eval command share it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from megatron_srpo.config.schema import EvaluationSection
from megatron_srpo.data.records import Group, Sample, SampleKey
from megatron_srpo.evaluation.scores import Score, interval, sample_means
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.rollout.engine import Sampling
from megatron_srpo.rollout.exchange import in_prompt_order
from megatron_srpo.tasks import Task, question_count


def evaluate(
    collector: Collector, tasks: Mapping[str, Task], settings: EvaluationSection, max_tokens: int, seed: int
) -> dict[str, float]:
    """Return the metrics of an evaluation with the same prompts and random numbers every time. Collective."""
    sampling = Sampling(settings.temperature, settings.top_p, max_tokens, collector.folder.stop_ids)
    scores: dict[str, float] = {}
    for task, split in parts(tasks, settings):
        numbers = range(question_count(task, split, settings))
        groups = ask(collector, task, split, numbers, settings.samples, sampling, f"{seed}/evaluation")
        own = [[Score.of(sample) for sample in group] for group in groups]
        shares = collector.layout.gather_json(own)
        everyone = [[Score(*score) for score in group] for group in in_prompt_order(shares)]
        scores |= summarise(label_of(task, split), everyone)
    if len(tasks) > 1:
        for kind in ("avg", "pass"):
            key = f"{kind}@{settings.samples}"
            values = [scores[f"eval/{label_of(task, settings.splits[0])}/{key}"] for task in tasks.values()]
            scores[f"eval/mean/{key}"] = sum(values) / len(values)
    return scores


def ask(
    collector: Collector,
    task: Task,
    split: str,
    numbers: range,
    samples: int,
    sampling: Sampling,
    seed: str,
    known: Mapping[SampleKey, Sample] = MappingProxyType({}),
    persist: Callable[[Sequence[Sample]], None] | None = None,
) -> list[Group]:
    """Return this rank's share of the verified groups of the questions `numbers` of `split`, in order.

    known, persist: see `Collector.sample`.
    """
    prompts = collector.prompts(partial(task.prompt, split), numbers)
    return collector.sample(prompts, samples, sampling, seed, known, persist)


def summarise(label: str, groups: Sequence[Sequence[Score]]) -> dict[str, float]:
    """Return eval/<label>/…: avg@K (accuracy) with its 95 % interval, pass@K (solved groups), means."""
    samples = [score for group in groups for score in group]
    k = len(groups[0])
    question_means = [sum(score.correct for score in group) / k for group in groups]
    _, low, high = interval([question_means])
    solved = [any(score.correct for score in group) for group in groups]
    scores = {
        "avg_low": low,
        "avg_high": high,
        f"avg@{k}": sum(score.correct for score in samples) / len(samples),
        f"pass@{k}": sum(solved) / len(groups),
        **sample_means(samples),
    }
    return {f"eval/{label}/{key}": value for key, value in scores.items()}


def parts(tasks: Mapping[str, Task], settings: EvaluationSection) -> list[tuple[Task, str]]:
    """Pair every task with each split to evaluate."""
    return [(task, split) for task in tasks.values() for split in settings.splits]


def label_of(task: Task, split: str) -> str:
    """Return the label of a task's split in metrics; the test split has the task's name."""
    return task.name if split == "test" else f"{task.name}/{split}"
