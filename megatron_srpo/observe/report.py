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

from megatron_srpo.distributed.files import write_text
from megatron_srpo.observe.alarms import REMEMBERED, Limits, alarms
from megatron_srpo.observe.report_samples import select_samples, short, spread
from megatron_srpo.observe.run_folder import RunFolder
from megatron_srpo.observe.tokens import read_tokens, tokens_file

# Limits of a page, for all runs together. It stays below 20 MB, and a phone opens it in two seconds.
SAMPLES = 5_000
SAMPLE_BYTES = 14_000_000  # with their prompts and token values
CURVE_VALUES = 600_000  # 4 MB; of longer runs every second, third, … step is shown
_TOKEN_FILE_BYTES = 1 << 29  # read for the quantiles of entropy weights: of as many steps as that allows
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
        data["runs"].append(_run_data(run, name, CURVE_VALUES // len(runs)))
        shown = select_samples(run, samples // len(runs), SAMPLE_BYTES // len(runs), len(data["prompts"]))
        for _, of_step in sorted(shown.steps.items()):
            data["samples"] += [{"run": number, **sample} for sample in of_step]
        data["prompts"] += shown.prompts
        data["notes"] += [f"{name}: {note}" for note in (*_curve_notes(data["runs"][-1]), *shown.notes)]
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


def _run_data(run: RunFolder, name: str, size: int) -> dict[str, Any]:
    """Collect the curves of a run, with at most about `size` numbers."""
    config = run.config
    keys: dict[str, Any] = {"step": None}
    for row in run.steps:
        keys |= dict.fromkeys(key for key, value in row.items() if isinstance(value, int | float))
    batch = f"{config.rollout.prompts_per_step} × {config.rollout.samples_per_prompt} samples a step"
    evaluate = {row["step"]: row.get("seconds_evaluate") or 0.0 for row in run.evaluations}
    seconds = np.cumsum([(row.get("seconds") or 0.0) + evaluate.get(row["step"], 0.0) for row in run.steps])
    tokens = np.cumsum([row.get("tokens") or 0 for row in run.steps], dtype=int)
    weights = _weight_quantiles(run)
    every = math.ceil(max(1, len(keys) * len(run.steps) / size))
    needed = {*evaluate, *weights["steps"]}  # points of curves whose place in time is that of their step
    last = len(run.steps) - 1
    shown = [
        place
        for place, row in enumerate(run.steps)
        if place % every == 0 or place == last or row["step"] in needed
    ]
    return {
        "name": name,
        "what": f"{config.algorithm.name}, lr {config.lr:g}, {batch}, {config.model.hf_path.name}",
        "steps": len(run.steps),
        "every": every,
        "columns": {key: [short(run.steps[place].get(key)) for place in shown] for key in keys},
        "hours": [short(value / 3600) for value in seconds[shown].tolist()],
        "tokens": tokens[shown].tolist(),
        "evaluations": _evaluations(run.evaluations),
        "weights": weights,
        "alarms": alarm_history(run),
    }


def _curve_notes(curves: dict[str, Any]) -> list[str]:
    """Name the steps that are left out of a run's curves."""
    notes = []
    if curves["every"] > 1:
        notes.append(f"its curves show one in {curves['every']} of its {curves['steps']} steps.")
    if left_out := curves["weights"]["left_out"]:
        notes.append(f"its curve of entropy weights leaves out {left_out} steps with token values.")
    return notes


def _evaluations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collect the curves of every avg@K and pass@K; avg@K with its interval if the run wrote one."""
    curves = []
    for key in dict.fromkeys(key for row in rows for key in row if "/avg@" in key or "/pass@" in key):
        found = [row for row in rows if row.get(key) is not None]
        curve: dict[str, Any] = {"label": key.removeprefix("eval/"), "steps": [row["step"] for row in found]}
        curve["values"] = [short(row[key]) for row in found]
        label = key.rpartition("/")[0]
        if "/avg@" in key and all(f"{label}/avg_low" in row for row in found):
            curve |= {end: [short(row[f"{label}/avg_{end}"]) for row in found] for end in ("low", "high")}
        curves.append(curve)
    return sorted(curves, key=lambda curve: "/pass@" in curve["label"])


def _weight_quantiles(run: RunFolder) -> dict[str, Any]:
    """Compute quantiles of the dumped tokens' entropy weights, by step."""
    quantiles: dict[int, list[float]] = {}
    read = left_out = 0
    for step in spread([step for step in run.sampled_steps if tokens_file(run.path, step).is_file()]):
        size = tokens_file(run.path, step).stat().st_size
        if read and read + size > _TOKEN_FILE_BYTES:
            left_out += 1
            continue
        read += size
        weights: list[float] = []
        for _, row in read_tokens(run.path, step):
            weights += [weight for weight in row.get("weight", ()) if weight is not None]
        if weights:
            quantiles[step] = np.quantile(weights, _QUANTILES).tolist()
    steps = sorted(quantiles)
    columns = zip(*(quantiles[step] for step in steps), strict=True)
    q = [[short(value) for value in column] for column in columns]
    return {"steps": steps, "q": q, "left_out": left_out}


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
