"""Alarms about silent failures of post-training, as pure functions of the last rows of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_srpo.config.schema import AlarmName, Config

Row = Mapping[str, Any]  # a training step's line of metrics.jsonl

PERSISTENCE = 3  # consecutive steps with a fault before most alarms are raised: one bad batch is not enough
REMEMBERED = 25  # rows that any alarm reads
_FALLS = {"response_tokens_mean": 0.4, "policy_entropy": 0.6, "format_rate": 0.2}  # relative falls that count
_RISE = 0.05  # of the pass rate, with which shorter and more certain responses are no fault
_WEIGHT_STD = 0.02  # of nearly uniform entropy weights
_VERIFIER_FAILURES = 0.05  # share of a step's samples; single timeouts are normal
UNJUDGED = 0.5  # share of samples without a verdict at which training stops
_CERTAIN = 0.05  # nats per token; a teacher of lower entropy is certain at every token


class Alarm(NamedTuple):
    """A fault found now (`finding`, with figures), and what it means and what to try (`advice`)."""

    name: AlarmName
    finding: str
    advice: str


class Limits(NamedTuple):
    """The settings that the alarms need."""

    dead_group_share: float
    logprob_gap: float | None  # None: replayed samples are those of another policy
    ema_rate: float | None  # None: the teacher is not an EMA
    weighs_entropy: bool

    @classmethod
    def of(cls, config: Config) -> Limits:
        """Return the limits of a run's configuration."""
        has_teacher = config.algorithm.uses_teacher
        rollout = config.rollout
        gap = None if rollout.replay else rollout.logprob_gap_warning + rollout.nucleus_gap
        rate = config.teacher.ema_rate if has_teacher and config.teacher.kind == "ema" else None
        weighs_entropy = has_teacher and config.algorithm.entropy_beta > 0
        return cls(config.logging.dead_group_share, gap, rate, weighs_entropy)


def alarms(rows: Sequence[Row], limits: Limits) -> list[Alarm]:
    """Return the alarms raised at the last of `rows` (training steps, oldest first, `REMEMBERED` at most)."""
    raised = []
    for name, (finds, advice) in _ALARMS.items():
        finding = finds(rows, limits) if rows else None
        if finding is not None:
            raised.append(Alarm(name, finding, advice))
    return raised


def _collapse(rows: Sequence[Row], limits: Limits) -> str | None:
    before, now = rows[-REMEMBERED:-PERSISTENCE], rows[-PERSISTENCE:]
    if len(before) < PERSISTENCE:
        return None
    rate = _mean(before, "pass_rate")
    if _mean(now, "pass_rate") - rate >= min(_RISE, (1 - rate) / 2):  # near 1 it can rise only a little
        return None
    fallen = [key for key, share in _FALLS.items() if _mean(now, key) < (1 - share) * _mean(before, key)]
    if len(fallen) < 2:
        return None
    figures = ", ".join(f"{key} {_mean(before, key):.3g} → {_mean(now, key):.3g}" for key in fallen)
    return f"{figures}, while the pass rate did not rise ({rate:.3f} → {_mean(now, 'pass_rate'):.3f})"


def _dead_groups(rows: Sequence[Row], limits: Limits) -> str | None:
    now = rows[-PERSISTENCE:]
    if len(now) < PERSISTENCE or any(row["zero_advantage_share"] < limits.dead_group_share for row in now):
        return None
    rate = _mean(now, "pass_rate")
    which = {1.0: "all correct", 0.0: "none correct"}.get(rate, f"{rate:.0%} of samples correct")
    share = _mean(now, "zero_advantage_share")
    return f"{share:.0%} of groups had equal rewards in the last {PERSISTENCE} steps ({which})"


def _teacher_still(rows: Sequence[Row], limits: Limits) -> str | None:
    now = [row for row in rows if row["updates"] > row["updates_skipped"]][-PERSISTENCE:]
    rate, has_distance = limits.ema_rate, all(_number(row, "teacher_distance") != 0 for row in now)
    if rate is None or len(now) < PERSISTENCE or not has_distance:
        return None
    followed = max(_number(row, "teacher_followed") for row in now)
    if followed >= rate / 2:
        return None
    moved = f"the teacher moved at most {followed:.2g} of its distance to the policy per step"
    return f"{moved}, but teacher.ema_rate is {rate:g}"


def _uniform_weights(rows: Sequence[Row], limits: Limits) -> str | None:
    now = [row for row in rows[-REMEMBERED:] if row["sdpo_token_share"] > 0][-PERSISTENCE:]
    if not limits.weighs_entropy or len(now) < PERSISTENCE or not rows[-1]["sdpo_token_share"]:
        return None
    if min(_number(row, "teacher_entropy") for row in now) < _CERTAIN:
        return None
    if max(_number(row, "entropy_weight_std") for row in now) >= _WEIGHT_STD:
        return None
    spread, entropy = _mean(now, "entropy_weight_std"), _mean(now, "teacher_entropy")
    figures = f"standard deviation {spread:.2g}, mean teacher entropy {entropy:.2f} nats per token"
    return f"entropy weights are nearly uniform: {figures}"


def _logprob_gap(rows: Sequence[Row], limits: Limits) -> str | None:
    gap = _number(rows[-1], "engine_logprob_gap")
    if limits.logprob_gap is None or gap < limits.logprob_gap:
        return None
    size = f"{gap:.3g} nats per token (rollout.logprob_gap_warning)"
    return f"log-probabilities of trainer and engine differ by {size}"


def _samples_dropped(rows: Sequence[Row], limits: Limits) -> str | None:
    dropped = rows[-1].get("samples_dropped", 0)
    if not dropped:
        return None
    return f"{dropped} samples of earlier steps were discarded (rollout.max_staleness)"


def _verifier_failures(rows: Sequence[Row], limits: Limits) -> str | None:
    share = _unjudged(rows[-1])
    return f"{share:.0%} of the step's samples have no verdict" if share >= _VERIFIER_FAILURES else None


def too_many_unjudged(rows: Sequence[Row]) -> str | None:
    """Return why training must stop: a step without any verdict, or several with less than half of theirs."""
    now = [_unjudged(row) for row in rows[-PERSISTENCE:]]
    if now and now[-1] == 1:
        return "no sample of the step has a verdict"
    if len(now) < PERSISTENCE or min(now) < UNJUDGED:
        return None
    return f"{min(now):.0%} of the samples or more have no verdict in each of the last {PERSISTENCE} steps"


def _unjudged(row: Row) -> float:
    return row.get("verifier_failed_share") or 0.0


def _number(row: Row, key: str) -> float:
    """Return a number of the row; null (for a non-finite number) counts as infinite."""
    value = row.get(key)
    return math.inf if value is None or math.isnan(value) else value


def _mean(rows: Sequence[Row], key: str) -> float:
    """Average the finite values; NaN, for which every comparison is false, if there are none."""
    values = [value for row in rows if math.isfinite(value := _number(row, key))]
    return sum(values) / len(values) if values else math.nan


_ALARMS: dict[AlarmName, tuple[Callable[[Sequence[Row], Limits], str | None], str]] = {
    "collapse": (
        _collapse,
        "Responses get shorter, more certain or less well-formed without getting better. Read some samples;"
        " restart from an earlier checkpoint with a lower optimizer.lr, or use algorithm.name: srpo if sdpo"
        " collapsed.",
    ),
    "dead_groups": (
        _dead_groups,
        "Such groups give GRPO no signal. All correct: the task is too easy, or the verifier accepts all."
        " None correct: it is too hard, or the policy does not know the format. Read some samples; try other"
        " questions, rollout.dynamic_filtering or more samples per prompt.",
    ),
    "teacher_still": (
        _teacher_still,
        "The EMA teacher follows the policy more slowly than teacher.ema_rate. Possible causes: the EMA is"
        " kept in bf16, or is never updated. If the teacher should not move, set teacher.kind: frozen.",
    ),
    "uniform_weights": (
        _uniform_weights,
        "Entropy weighting has no effect: the teacher's entropy is nearly the same at every token. Check that"
        " it is over the full vocabulary, read the teacher's prompts (srpo inspect), and try a larger"
        " algorithm.entropy_beta.",
    ),
    "logprob_gap": (
        _logprob_gap,
        "The trained policy is not the one that sampled. Check that the engine has the published weights, and"
        " the same dtype and temperature. A step of staleness adds to the gap; importance weights correct a"
        " small one.",
    ),
    "samples_dropped": (
        _samples_dropped,
        "They were sampled with weights that are too old now, and their prompts are sampled again. Raise"
        " rollout.max_staleness, or lower rollout.over_sampling: a step can leave at most"
        " rollout.prompts_per_step groups to the next one.",
    ),
    "verifier_failures": (
        _verifier_failures,
        "The verifier raised an error, took too long or was out of memory. With task.verifier_failed: exclude"
        " such samples teach nothing. The first failure is shown with its place; see its sample with srpo"
        " inspect, and task.verifier_seconds and task.verifier_memory_mib.",
    ),
}
