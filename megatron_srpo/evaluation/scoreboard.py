"""Evaluation results: result.json and result.md of one model, and the comparison of several."""

import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.records import Group
from megatron_srpo.distributed.files import write_text
from megatron_srpo.evaluation.scores import Score, interval, paired_difference, pass_at_k, sample_means


class Outcome(NamedTuple):
    """One task's answers: `samples` groups of K, sampled in `seconds`, and `greedy` groups of one or None."""

    label: str
    samples: list[Group]
    seconds: float
    greedy: list[Group] | None


def result_of(outcomes: Sequence[Outcome], model: str, weights: str, device: str) -> dict[str, Any]:
    """Compute result.json: intervals are 95 % bootstrap over questions, `overall` is the mean over tasks."""
    tasks = {outcome.label: _task_result(outcome) for outcome in outcomes}
    overall: dict[str, Any] = {}
    for key in _shared(tasks.values()):
        values = [list(task["questions"][key].values()) for task in tasks.values()]
        mean, low, high = interval(values)
        overall |= {key: mean, f"{key}/interval": [low, high]}
    groups = [group for outcome in outcomes for group in outcome.samples]
    tokens = sum(sample.policy_tokens for group in groups for sample in group)
    seconds = sum(outcome.seconds for outcome in outcomes)
    overall |= {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
    date = datetime.date.today().isoformat()
    facts = {"model": model, "weights": weights, "device": device, "date": date}
    return {**facts, "overall": overall, "tasks": tasks}


def _shared(tasks: Iterable[dict[str, Any]]) -> list[str]:
    """Return the scores that all of these task results have, in the order of the first."""
    first, *others = tasks
    return [key for key in first["questions"] if all(key in other["questions"] for other in others)]


def _task_result(outcome: Outcome) -> dict[str, Any]:
    samples = [sample for group in outcome.samples for sample in group]
    k = len(outcome.samples[0])
    counts = [sum(sample.judged.correct for sample in group) for group in outcome.samples]
    names = [group[0].prompt.id for group in outcome.samples]
    correct = dict(zip(names, counts, strict=True))
    ks = sorted({2**power for power in range(k.bit_length()) if 2**power <= k} | {k})
    questions = {f"avg@{k}": {name: c / k for name, c in correct.items()}}
    questions |= {f"pass@{j}": {name: pass_at_k(k, c, j) for name, c in correct.items()} for j in ks if j > 1}
    if outcome.greedy is not None:
        questions["greedy"] = {group[0].prompt.id: float(group[0].judged.correct) for group in outcome.greedy}
    scores: dict[str, Any] = {}
    for key, values in questions.items():
        mean, low, high = interval([list(values.values())])
        scores |= {key: mean, f"{key}/interval": [low, high]}
    tokens = sum(sample.policy_tokens for sample in samples)
    return {
        **scores,
        "question_count": len(outcome.samples),
        "samples": k,
        **sample_means([Score.of(sample) for sample in samples]),
        "seconds": outcome.seconds,
        "tokens_per_second": tokens / outcome.seconds,
        "questions": questions,
    }


def write_result(directory: Path, result: dict[str, Any]) -> None:
    """Write result.json and result.md, each atomically."""
    write_text(directory / "result.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    write_text(directory / "result.md", markdown(result) + "\n")


def markdown(result: dict[str, Any]) -> str:
    """Format one model's table: percent, with 95 % intervals over questions."""
    rows = [*result["tasks"].items()] + ([("mean", result["overall"])] if len(result["tasks"]) > 1 else [])
    scores = _shared(result["tasks"].values())
    shares = ("format_rate", "truncated_share", "verifier_failed_share")
    header = ["task", "questions", *scores, "tokens", "format", "truncated", "no verdict"]
    model = f"`{result['model']}` (weights {result['weights'][:12]})"
    lines = [f"{model} on {result['device']}, {result['date']}", "", *_header(header)]
    for name, row in rows:
        cells = [name, str(row.get("question_count", ""))]
        for key in scores:
            low, high = row[f"{key}/interval"]
            cells.append(f"{100 * row[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        cells += [f"{row['response_tokens_mean']:.0f}" if "samples" in row else ""]
        cells += [f"{100 * row[key]:.1f} %" if key in row else "" for key in shares]
        lines.append(_row(cells))
    overall = result["overall"]
    rate = f"{overall['tokens_per_second']:.0f} tokens a second"
    lines += ["", f"{overall['tokens']} tokens in {overall['seconds']:.1f} s: {rate}"]
    return "\n".join(lines)


class _TaskScores(BaseModel, strict=True, allow_inf_nan=False):
    questions: dict[str, dict[str, float]]  # score → question → its value


class _Result(BaseModel, strict=True):
    """The values of result.json that `compare` reads."""

    model: str
    tasks: dict[str, _TaskScores] = Field(min_length=1)


def read_result(directory: Path) -> dict[str, Any]:
    """Read result.json of an evaluation's folder; raise ConfigError if it is missing or damaged."""
    file = directory / "result.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        _Result.model_validate(result)
        return result
    except OSError:
        raise ConfigError(f"{file} is missing; is {directory} the folder of a finished evaluation?") from None
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ConfigError(f"{file}: is not a result of the eval command: {problem}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: is not a result of the eval command: {error}") from None


def compare(directories: Sequence[Path]) -> str:
    """Compare every other folder with the first by a paired bootstrap over questions, as a Markdown table."""
    base, *others = [read_result(directory) for directory in directories]
    header = ["task", "score", "base", "other", "difference", "95 % interval", "p"]
    lines = []
    for directory, other in zip(directories[1:], others, strict=True):
        if set(base["tasks"]) != set(other["tasks"]):
            tasks = [sorted(result["tasks"]) for result in (other, base)]
            raise ConfigError(f"{directory}: has the tasks {tasks[0]}, {directories[0]} has {tasks[1]}")
        lines += [f"base `{directories[0]}` ({base['model']}), other `{directory}` ({other['model']})", ""]
        lines += _header(header)
        shared = _shared([*base["tasks"].values(), *other["tasks"].values()])
        if not shared:
            problem = f"no score in common with {directories[0]}; do their evaluation.samples differ?"
            raise ConfigError(f"{directory}: {problem}")
        for key in shared:
            pairs = {name: _paired(name, key, base, other, directory) for name in base["tasks"]}
            rows = [(name, [pair]) for name, pair in pairs.items()]
            for name, pair in rows + ([("mean", list(pairs.values()))] if len(rows) > 1 else []):
                difference = paired_difference([first for first, _ in pair], [second for _, second in pair])
                cells = [name, key]
                for sides in zip(*pair, strict=True):
                    cells.append(f"{100 * sum(sum(side) / len(side) for side in sides) / len(pair):.1f}")
                cells.append(f"{100 * difference.mean:+.1f}")
                cells.append(f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]")
                cells.append(f"{difference.p:.3f}" if difference.p >= 0.001 else "< 0.001")
                lines.append(_row(cells))
        lines.append("")
    return "\n".join(lines).rstrip()


def _paired(name: str, key: str, base: dict, other: dict, directory: Path) -> tuple[list[float], list[float]]:
    first, second = base["tasks"][name]["questions"][key], other["tasks"][name]["questions"][key]
    if set(first) != set(second):
        missing = sorted(set(first) ^ set(second))
        differ = f"{len(missing)} differ, first {missing[0]}"
        raise ConfigError(f"{directory}: task {name} has different questions ({differ})")
    return list(first.values()), [second[question] for question in first]


def _header(titles: Sequence[str]) -> list[str]:
    return [_row(titles), _row(["---"] * len(titles))]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
