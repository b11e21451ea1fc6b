"""Evaluation on held-out prompts: avg@K and pass@K of the engine's present weights."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_srpo.config import EvaluationSection
from megatron_srpo.records import Group
from megatron_srpo.rollout.collect import Collector, exchange
from megatron_srpo.rollout.engine import Sampling


def evaluate(collector: Collector, settings: EvaluationSection, max_tokens: int, seed: int) -> dict[str, float]:
    """The evaluation's part of metrics.jsonl: every rank samples its share, every rank gets the result.

    The same prompts and the same random numbers at every call: two evaluations differ by the weights alone.
    """
    prompts = collector.prompts("test", 0, settings.prompts)
    sampling = Sampling(settings.temperature, settings.top_p, max_tokens, collector.folder.stop_ids)
    groups = collector.verify(collector.sample(prompts, settings.samples, sampling, f"{seed}/evaluation"))
    return summarise(collector.task.name, exchange(groups, collector.layout))


def summarise(task: str, groups: Sequence[Group]) -> dict[str, float]:
    """avg@K (mean accuracy of K samples a prompt), pass@K (share of prompts with a correct one), length, format, truncation."""
    samples = [sample for group in groups for sample in group]
    k = len(groups[0])
    return {
        f"eval/{task}/avg@{k}": sum(sample.verdict.correct for sample in samples) / len(samples),
        f"eval/{task}/pass@{k}": sum(any(sample.verdict.correct for sample in group) for group in groups) / len(groups),
        f"eval/{task}/response_tokens_mean": sum(len(sample.response_ids) for sample in samples) / len(samples),
        f"eval/{task}/format_rate": sum(sample.verdict.format_ok for sample in samples) / len(samples),
        f"eval/{task}/truncated_share": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
    }
