"""The metrics of one step, and metrics.jsonl: one JSON object per line, the source of every curve."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_srpo.data.histogram import quantile
from megatron_srpo.data.outline import Outline, OutlineGroup
from megatron_srpo.data.update_report import UpdateReport
from megatron_srpo.distributed.files import JsonLines, SavedFile, describe, read_jsonl, write_text


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


# A training step's row has all of these, as numbers; the alarms and the terminal read them.
_REQUIRED = ("pass_rate", "zero_advantage_share", "sdpo_token_share", "updates", "updates_skipped")


def read_rows(file: Path) -> JsonLines:
    """Read the rows of a metrics.jsonl; lines that are not such rows, by their types, are problems."""
    found = read_jsonl(file)
    rows = JsonLines([], [], list(found.problems))
    for row, number in zip(found.rows, found.numbers, strict=True):
        if problem := _row_problem(row):
            rows.problems.append(f"{file}:{number}: is damaged ({problem})")
        else:
            rows.rows.append(row)
            rows.numbers.append(number)
    return rows


def _row_problem(row: dict[str, Any]) -> str | None:
    """Return why this is no row of metrics.jsonl, or None."""
    if type(row.get("step")) is not int or row["step"] < 0:
        return f"step: found {row.get('step')!r}, expected a whole number"
    required = _REQUIRED if "loss" in row else ("pass_rate",) if "pass_rate" in row else ()
    for key in (*required, *row):
        value = row.get(key)
        if key == "alarms":
            fits = isinstance(value, list) and all(isinstance(name, str) for name in value)
        elif key == "weight_version":
            fits = isinstance(value, str)
        else:  # null: a number that was not finite
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
            fits = is_number or (value is None and key not in required)
        if not fits:
            return f"{key}: found {str(value)[:40]!r}, expected {_EXPECTED.get(key, 'a number')}"
    return None


_EXPECTED = {"alarms": "a list of names", "weight_version": "a string"}


class MetricsFile:
    """The file metrics.jsonl, on disk after every line. Non-finite numbers become null."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        broken = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        self._file.write(json.dumps(row | dict.fromkeys(broken)) + "\n")
        self._file.flush()
        if self.path.is_file():  # not the null device of other ranks
            os.fsync(self._file.fileno())

    def rewind(
        self, step: int, with_evaluation: bool, saved: SavedFile | None = None
    ) -> tuple[list[dict[str, Any]], str]:
        """Drop rows after `step`, its evaluation unless with_evaluation, a partial line, damaged lines.

        Returns:
            The other rows, and what is damaged, or "": the file then stays as metrics.damaged.jsonl. `saved`
            describes the file after `step`, if it is known.
        """
        if not self.path.is_file():
            return [], ""
        content, found = self.path.read_bytes(), read_rows(self.path)
        problems = list(found.problems)
        if content and not content.endswith(b"\n"):  # the line that was being written
            last = content.count(b"\n") + 1
            problems = [one for one in problems if not one.startswith(f"{self.path}:{last}: ")]
        problems += [
            f"{self.path}:{number}: is damaged (it has no loss)"
            for row, number in zip(found.rows, found.numbers, strict=True)
            if "pass_rate" in row and "loss" not in row
        ]
        if not problems and saved is not None and describe(self.path, saved.bytes) != saved:
            problems = [f"{self.path}: has changed since step {step} was saved (CRC-32)"]
        rows = [row for row in found.rows if row["step"] <= step and ("pass_rate" in row) == ("loss" in row)]
        if not with_evaluation:
            rows = [row for row in rows if row["step"] < step or "loss" in row]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if problems or content != text.encode():
            self._file.close()
            if problems:
                self.path.replace(self.path.with_suffix(".damaged.jsonl"))
            write_text(self.path, text)
            self._file = self.path.open("a", encoding="utf-8")
        kept = f"its {len(rows)} valid rows are used, and the file is kept as metrics.damaged.jsonl"
        return rows, f"{problems[0]}: {kept}" if problems else ""

    def evaluations(self) -> list[dict[str, Any]]:
        """Read the rows of evaluations."""
        return [row for row in read_rows(self.path).rows if any("/avg@" in key for key in row)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
