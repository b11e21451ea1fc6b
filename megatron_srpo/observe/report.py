"""The report: an offline HTML page of runs' curves and samples, from one JSON object shown only as text."""

import datetime
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_srpo.data.rollout_file import policy_tokens
from megatron_srpo.distributed.files import write_text
from megatron_srpo.observe.alarms import REMEMBERED, Limits, alarms
from megatron_srpo.observe.run_folder import RunFolder
from megatron_srpo.observe.tokens import read_tokens, tokens_file

SAMPLES = 5_000  # of all runs together; a phone opens them in two seconds
TEXT_CHARACTERS = 20_000  # of one response or message; longer ones are cut in the middle
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_PAGE = Path(__file__).with_name("page")


def write_report(paths: Sequence[Path], output: Path, samples: int = SAMPLES) -> None:
    """Write the page about these run folders; raise ConfigError if one is not a run's folder."""
    files = ("page.html", "page.css", "charts.js", "samples.js")
    html, css, charts, browser = [(_PAGE / name).read_text(encoding="utf-8") for name in files]
    # "<" could end the script element; json itself escapes all outside ASCII and lone surrogates.
    data = json.dumps(report_data(paths, samples), separators=(",", ":")).replace("<", "\\u003c")
    for mark, text in {"CSS": css, "JS": charts + browser, "DATA": data}.items():
        html = html.replace(f"/*{mark}*/", text, 1)
    write_text(output, html)


def report_data(paths: Sequence[Path], samples: int) -> dict[str, Any]:
    """Collect the data of the page, with at most `samples` samples."""
    runs = [RunFolder.read(path) for path in paths]
    names = _names(paths)
    data: dict[str, Any] = {"made": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "runs": [], "prompts": []}
    data |= {"samples": [], "notes": []}
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        data["runs"].append(_run_data(run, name))
        _add_samples(data, run, number, name, samples // len(runs))
        data["notes"] += run.problems
    data["labels"] = list(dict.fromkeys(one["label"] for run in data["runs"] for one in run["evaluations"]))
    return data


def _names(paths: Sequence[Path]) -> list[str]:
    """Name each folder by the shortest end of its path that is unique, without the words that all share.

    The page has room for about twelve characters of a name.
    """
    resolved = [path.resolve() for path in paths]
    names = [str(path) for path in resolved]
    for depth in range(1, 9):
        ends = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(ends)) == len(set(resolved)):
            names = ends
            break
    words = [re.split(r"(?<=[-_/])", name) for name in names]
    shared = os.path.commonprefix([of_name[:-1] for of_name in words]) if len(set(names)) > 1 else []
    return ["".join(of_name[len(shared) :]) for of_name in words]


def _run_data(run: RunFolder, name: str) -> dict[str, Any]:
    config = run.config
    keys: dict[str, Any] = {"step": None}
    for row in run.steps:
        keys |= dict.fromkeys(key for key, value in row.items() if isinstance(value, int | float))
    batch = f"{config.rollout.prompts_per_step} × {config.rollout.samples_per_prompt} samples a step"
    evaluate = {row["step"]: row.get("seconds_evaluate") or 0.0 for row in run.evaluations}
    seconds = np.cumsum([(row.get("seconds") or 0.0) + evaluate.get(row["step"], 0.0) for row in run.steps])
    return {
        "name": name,
        "what": f"{config.algorithm.name}, lr {config.lr:g}, {batch}, {config.model.hf_path.name}",
        "columns": {key: [_short(row.get(key)) for row in run.steps] for key in keys},
        "hours": [_short(value / 3600) for value in seconds.tolist()],
        "tokens": np.cumsum([row.get("tokens") or 0 for row in run.steps], dtype=int).tolist(),
        "evaluations": _evaluations(run.evaluations),
        "weights": _weight_quantiles(run),
        "alarms": alarm_history(run),
    }


def _evaluations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collect the curves of every avg@K and pass@K; avg@K with its interval if the run wrote one."""
    curves = []
    for key in dict.fromkeys(key for row in rows for key in row if "/avg@" in key or "/pass@" in key):
        found = [row for row in rows if row.get(key) is not None]
        curve: dict[str, Any] = {"label": key.removeprefix("eval/"), "steps": [row["step"] for row in found]}
        curve["values"] = [_short(row[key]) for row in found]
        label = key.rpartition("/")[0]
        if "/avg@" in key and all(f"{label}/avg_low" in row for row in found):
            curve |= {end: [_short(row[f"{label}/avg_{end}"]) for row in found] for end in ("low", "high")}
        curves.append(curve)
    return sorted(curves, key=lambda curve: "/pass@" in curve["label"])


def _weight_quantiles(run: RunFolder) -> dict[str, Any]:
    """Compute quantiles of the dumped tokens' entropy weights, by step."""
    steps, quantiles = [], []
    for step in run.sampled_steps:
        weights: list[float] = []
        for row in read_tokens(run.path, step).values():
            weights += [weight for weight in row.get("weight", ()) if weight is not None]
        if weights:
            steps.append(step)
            quantiles.append(np.quantile(weights, _QUANTILES).tolist())
    columns = zip(*quantiles, strict=True)
    return {"steps": steps, "q": [[_short(value) for value in column] for column in columns]}


def alarm_history(run: RunFolder) -> list[dict[str, str]]:
    """Return every range of steps in which an alarm is active, from the rows alone."""
    limits, ranges, held = Limits.of(run.config), [], {}
    steps = [row for row in run.steps if "loss" in row]  # rows of srpo sample have no alarms
    for place, row in enumerate(steps):
        recent = steps[max(0, place + 1 - REMEMBERED) : place + 1]
        raised = {alarm.name: alarm for alarm in alarms(recent, limits)}
        held = {name: span for name, span in held.items() if name in raised}
        for name, alarm in raised.items():
            if name not in held:
                held[name] = {**alarm._asdict(), "first": row["step"]}
                ranges.append(held[name])
            held[name]["last"] = row["step"]
    for span in ranges:
        first, last = span.pop("first"), span.pop("last")
        span["steps"] = f"step {first}" if first == last else f"steps {first} to {last}"
    return ranges


def _add_samples(data: dict[str, Any], run: RunFolder, number: int, name: str, limit: int) -> None:
    """Add complete steps, evenly spread, those with token values first, up to `limit` samples."""
    steps, prompts, taken = run.sampled_steps, {}, 0
    with_tokens = [step for step in steps if tokens_file(run.path, step).is_file()]
    order = _spread(with_tokens) + _spread([step for step in steps if step not in set(with_tokens)])
    chosen: list[tuple[int, list[dict[str, Any]]]] = []
    for step in order:
        rows = run.samples(step)
        if taken + len(rows) > limit and chosen:
            break
        chosen.append((step, rows[:limit]))
        taken += len(rows[:limit])
    for step, rows in sorted(chosen, key=lambda pair: pair[0]):
        values = read_tokens(run.path, step)
        for place, row in enumerate(rows):
            sample = _sample(row, place, values, data["prompts"], prompts)
            data["samples"].append({"run": number, "step": step, **sample})
    if len(chosen) < len(steps):
        shown = f"this page has the samples of {len(chosen)} of {len(steps)} steps"
        data["notes"].append(f"{name}: {shown}; rollouts/ has all of them.")


def _spread(steps: list[int]) -> list[int]:
    """Order the steps so that any first few are spread over all: last, first, halves, quarters and so on."""
    if not steps:
        return []
    places, stride = [len(steps) - 1, 0], len(steps)
    while stride > 1:
        stride = (stride + 1) // 2
        places += range(0, len(steps), stride)
    return [steps[place] for place in dict.fromkeys(places)]


def _sample(row: dict, place: int, values: dict, prompts: list[dict], numbers: dict[str, int]) -> dict:
    prompt, verdict, route = row["prompt"], row["verdict"], row["route"]
    if prompt["id"] not in numbers:
        numbers[prompt["id"]] = len(prompts)
        messages = [[message["role"], _cut(message["content"])] for message in prompt["messages"]]
        prompts.append({"id": prompt["id"], "messages": messages, "answer": _cut(prompt["answer"])})
    sample: dict[str, Any] = {"number": place, "prompt": numbers[prompt["id"]], "index": row["index"]}
    sample |= {"text": _cut(row["text"]), "tokens": policy_tokens(row), "finish": row["finish_reason"]}
    sample |= {"reward": _short(verdict["reward"]), "correct": verdict["correct"]}
    sample |= {"format": verdict["format_ok"], "failure": verdict["verifier_failed"]}
    sample["feedback"] = verdict["feedback"] and _cut(verdict["feedback"])
    sample |= {"branch": route["branch"], "advantage": _short(route["advantage"])}
    sample |= {"sibling": route["sibling"], "noTeacher": route["no_teacher"]}
    if (found := values.get((prompt["id"], row["index"]))) is not None:
        hidden = ("step", "prompt_id", "index")
        sample["values"] = {key: value for key, value in found.items() if key not in hidden}
    return sample


def _cut(text: str) -> str:
    if len(text) <= TEXT_CHARACTERS:
        return text
    half = TEXT_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"


def _short(value: float | None) -> float | None:
    """Round to five significant digits; None if the number is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
