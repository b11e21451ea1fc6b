"""The metrics of one step, for its row of metrics.jsonl."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_srpo.data.histogram import quantile
from megatron_srpo.data.outline import Outline, OutlineGroup
from megatron_srpo.data.update_report import UpdateReport


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _ratio(total: Tensor, count: Tensor) -> float:
    return float(total) / float(count) if count else 0.0


def _share(conditions: Sequence[bool]) -> float:
    return _mean([float(condition) for condition in conditions])


def _tokens(samples: Sequence[Outline]) -> int:
    return sum(sample.policy_tokens for sample in samples)


def rollout_metrics(groups: Sequence[OutlineGroup]) -> dict[str, float]:
    """Compute a step's metrics; excluded samples count in lengths, truncations, verifier failures only."""
    samples = [sample for group in groups for sample in group]
    judged = [sample for sample in samples if not sample.judged.excluded]
    judged_groups = [group for group in groups if not all(sample.judged.excluded for sample in group)]
    is_flat = [all(sample.routed.advantage == 0 for sample in group) for group in judged_groups]
    distilled = [sample for sample in judged if sample.routed.distillation_weight > 0]
    failed = [sample for sample in judged if not sample.judged.correct]
    return {
        "reward_mean": _mean([sample.judged.reward for sample in judged]),
        "pass_rate": _share([sample.judged.correct for sample in judged]),
        "tokens": _tokens(samples),
        "response_tokens_mean": _mean([sample.policy_tokens for sample in samples]),
        "truncated_share": _share([sample.finish_reason == "length" for sample in samples]),
        "format_rate": _share([sample.judged.format_ok for sample in judged]),
        "verifier_failed_share": _share([sample.judged.verifier_failed is not None for sample in samples]),
        "sdpo_sample_share": len(distilled) / max(len(judged), 1),
        "sdpo_token_share": _tokens(distilled) / max(_tokens(judged), 1),
        "teacherless_failed_share": _share([sample.routed.no_teacher is not None for sample in failed]),
        "teacher_prompts_cut": sum(sample.routed.demonstration_cut for sample in samples),
        "teacher_prompts_empty": sum(sample.routed.no_teacher == "nothing_to_show" for sample in samples),
        "zero_advantage_share": _share(is_flat),
        **_by_task(samples),
    }


def _by_task(samples: Sequence[Outline]) -> dict[str, float]:
    """Compute the most important metrics of each task if there are several."""
    rows: dict[str, float] = {}
    names = sorted({sample.task for sample in samples})
    for name in names if len(names) > 1 else ():
        own = [sample for sample in samples if sample.task == name]
        judged = [sample for sample in own if not sample.judged.excluded]
        rows |= {
            f"prompt_share/{name}": len(own) / len(samples),
            f"pass_rate/{name}": _share([sample.judged.correct for sample in judged]),
            f"format_rate/{name}": _share([sample.judged.format_ok for sample in judged]),
            f"truncated_share/{name}": _share([sample.finish_reason == "length" for sample in own]),
            f"response_tokens_mean/{name}": _mean([sample.policy_tokens for sample in own]),
        }
    return rows


def version_metrics(groups: Sequence[OutlineGroup], step: int) -> dict[str, Any]:
    """Return the newest weight version that sampled the groups, and the age of each sample's oldest token."""
    versions = []
    for sample in (sample for group in groups for sample in group):
        versions.append([int(version) for version in sample.versions if version.isdigit()])
    behind = [step - 1 - min(of_sample) for of_sample in versions if of_sample]
    newest = str(max(map(max, filter(None, versions)), default=groups[0][0].versions[-1]))
    ages = {"staleness_mean": _mean(behind), "staleness_max": max(behind, default=0)}
    return {"weight_version": newest, **ages}


def update_metrics(report: UpdateReport) -> dict[str, float]:
    """Compute the metrics of a step's updates; means over no token (nothing distilled) are 0."""
    sums = report.sums
    mean_weight = _ratio(sums.weight, sums.distilled)
    variance = _ratio(sums.weight_squared, sums.distilled) - mean_weight**2
    return {
        "loss": _mean(report.losses),
        "grad_norm": _mean(report.grad_norms),
        "lr": report.lr,
        "updates": len(report.losses),
        "updates_skipped": len(report.skipped_updates),
        "policy_entropy": _ratio(sums.entropy, sums.tokens),
        "teacher_entropy": _ratio(sums.teacher_entropy, sums.distilled),
        **{f"teacher_entropy_p{share}": quantile(sums.entropy_counts, share / 100) for share in (10, 50, 90)},
        "distillation_divergence": _ratio(sums.divergence, sums.distilled),
        "entropy_weight_mean": mean_weight,
        "entropy_weight_std": math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else variance,
        "engine_logprob_gap": _ratio(sums.gap, sums.tokens),
        "engine_logprob_gap_max": report.gap_max,
        "importance_mean": _ratio(sums.importance, sums.tokens),
        "importance_clip_share": _ratio(sums.clipped, sums.tokens),
        "tokens_trained": int(sums.trained),
        "tokens_scored": int(sums.tokens - sums.trained),
        **_teacher_metrics(report.teacher_distances),
    }


def _teacher_metrics(distances: tuple[float, float] | None) -> dict[str, float]:
    """Return the teacher's distance to the policy, and the share of it covered in this step."""
    if distances is None:
        return {}
    before, after = distances
    return {"teacher_distance": after, "teacher_followed": 1 - after / before if before else 0.0}
