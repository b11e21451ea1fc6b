"""Draw docs/images/curves.svg: learning curves of GRPO, SDPO and SRPO on the quick-start task.

    python tools/figures/curves.py [--jobs 2] [--sweep] [--runs FOLDER] [--output FILE]

Trains examples/quickstart/config.yaml once for each method and seed (three methods, seeds 1 to 5) and
evaluates every 5 steps; all else is the file's: 30 steps of 16 prompts × 8 samples, AdamW with learning rate
1e-4 and 3 warm-up steps, and 128 questions × 4 samples at temperature 1 in an evaluation. Methods keep their
papers' other defaults, among them the optimizer steps of a training step: GRPO takes two here (mini-batches
of 8 prompts), SDPO and SRPO one. A seed decides training and evaluation questions and all random draws.

A run that is finished under --runs is used again; one that is not is started over. `--sweep` also trains
at other learning rates, with two seeds, and prints their table: does 1e-4 suit all methods alike?

It did on 2026-11-29 (two cores of an AMD EPYC, torch 2.13, float32): avg@4 after 30 steps, the mean of seeds
1 and 2, at 3e-5, 1e-4 and 3e-4 was 0.825, 0.881, 0.057 (GRPO), 0.765, 0.890, 0.662 (SDPO) and 0.766, 0.885,
0.457 (SRPO). At 1e-4 the five seeds' mean ± standard deviation was 0.870 ± 0.028, 0.889 ± 0.028 and
0.874 ± 0.036: the methods differ by less than their seeds do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from _svg import Drawing

ROOT = Path(__file__).parents[2]
METHODS = {"grpo": "blue", "sdpo": "orange", "srpo": "green"}
RATE, SEEDS = "1e-4", (1, 2, 3, 4, 5)  # the rate of the quick start's configuration
SWEEP_RATES, SWEEP_SEEDS = ("3e-5", "1e-4", "3e-4"), (1, 2)
STEPS, EVERY = 30, 5
SCORE = "eval/addition/avg@4"
WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 66, 740, 62, 384  # of the plot


class Run(NamedTuple):
    """One training run of the figure."""

    method: str
    rate: str
    seed: int

    def folder(self, runs: Path) -> Path:
        """Return the run folder, in which an earlier call may have left the finished run."""
        return runs / f"{self.method}-lr{self.rate}-seed{self.seed}"


Scores = dict[int, float]  # by training step
Place = Callable[[float, float], tuple[float, float]]  # (step, score) → pixels
Series = dict[str, list[Scores]]  # by method: one a seed


def main() -> None:
    """Train what is missing, draw the figure, and print the final scores."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--runs", type=Path, default=ROOT / "runs" / "figures", metavar="FOLDER", help="default: %(default)s")
    add("--output", type=Path, default=ROOT / "docs" / "images" / "curves.svg", metavar="FILE")
    add("--jobs", type=int, default=2, help="runs at a time, one core each (%(default)s)")
    add("--sweep", action="store_true", help=f"also train at {', '.join(SWEEP_RATES)}")
    options = parser.parse_args()
    wanted = [Run(method, RATE, seed) for seed in SEEDS for method in METHODS]
    if options.sweep:
        wanted += [Run(name, rate, seed) for seed in SWEEP_SEEDS for rate in SWEEP_RATES for name in METHODS]
    train_all(list(dict.fromkeys(wanted)), options.runs, options.jobs)
    series = {method: _series(options.runs, method, RATE, SEEDS) for method in METHODS}
    draw(series).save(options.output)
    print(f"\n{options.output}\n\n{table(series)}")
    if options.sweep:
        print(f"\n{sweep_table(options.runs)}")


def train_all(wanted: Sequence[Run], runs: Path, jobs: int) -> None:
    """Train what is not finished yet, `jobs` at a time; raise SystemExit after a failed run."""
    missing = [run for run in wanted if scores(run.folder(runs)) is None]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are finished in {runs}", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        began = {pool.submit(train, run, runs): run for run in missing}
        for number, future in enumerate(as_completed(began), 1):
            run, seconds = began[future], future.result()
            found = scores(run.folder(runs)) or {}
            scored = f"{found.get(0, 0):.3f} → {found.get(STEPS, 0):.3f}"
            print(f"[{number}/{len(missing)}] {run.folder(runs).name}: {scored}, {seconds:.0f} s", flush=True)


def train(run: Run, runs: Path) -> float:
    """Train in the run's folder, which is emptied before; return the seconds it took."""
    folder = run.folder(runs)
    shutil.rmtree(folder, ignore_errors=True)
    settings = [f"algorithm.name={run.method}", f"optimizer.lr={run.rate}", f"train.seed={run.seed}"]
    settings += [f"evaluation.every={EVERY}", f"train.steps={STEPS}", "logging.tokens_every=0"]
    settings += ["checkpoint.save_interval=0", "logging.rollouts=false", f"logging.dir={folder.resolve()}"]
    command = [sys.executable, "-m", "megatron_srpo", "train", "examples/quickstart/config.yaml", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{folder}: {done.stderr[-3000:]}")
    return time.perf_counter() - began


def scores(folder: Path) -> Scores | None:
    """Read avg@4 by step; None if the run is not finished."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    found = {row["step"]: row[SCORE] for row in rows if SCORE in row}
    return found if STEPS in found else None


def _series(runs: Path, method: str, rate: str, seeds: Sequence[int]) -> list[Scores]:
    return [scores(Run(method, rate, seed).folder(runs)) or {} for seed in seeds]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation (ddof 1; 0 of one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(series: Series) -> str:
    """Return a Markdown table of avg@4, mean ± standard deviation over seeds."""
    steps = (10, 20, STEPS)
    lines = [f"| method | {' | '.join(f'step {step}' for step in steps)} |", "|---|" + "---|" * len(steps)]
    for method, seeds in series.items():
        cells = [mean_and_deviation([found[step] for found in seeds]) for step in steps]
        lines.append(f"| {method} | {' | '.join(f'{mean:.3f} ± {std:.3f}' for mean, std in cells)} |")
    return "\n".join(lines)


def sweep_table(runs: Path) -> str:
    """Return a Markdown table of the last avg@4 by learning rate, the mean over SWEEP_SEEDS."""
    lines = [f"| method | {' | '.join(f'lr {rate}' for rate in SWEEP_RATES)} |"]
    lines.append("|---|" + "---|" * len(SWEEP_RATES))
    for method in METHODS:
        means = []
        for rate in SWEEP_RATES:
            means.append(statistics.mean(one[STEPS] for one in _series(runs, method, rate, SWEEP_SEEDS)))
        lines.append(f"| {method} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def draw(series: Series) -> Drawing:
    """Draw the mean over seeds as a line and the seeds' range as a band."""
    low, high = _range(series)
    count = len(next(iter(series.values())))
    made = f"tools/figures/curves.py, {datetime.date.today().isoformat()}, {platform.machine()} CPU"
    title = f"Learning curves of the quick start, {count} seeds"
    drawing = Drawing(WIDTH, HEIGHT, title, f"{table(series)}\n{made}")
    drawing.text(
        LEFT, 26, "Quick start: three-digit addition, Qwen3 of 370,000 parameters", bold=True, size=16
    )
    what = f"mean of {count} seeds; bands from the lowest to the highest seed; learning rate {RATE}"
    drawing.text(LEFT, 46, what, "quiet", 13.5)

    def place(step: float, score: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * step / STEPS
        return x, BOTTOM - (BOTTOM - TOP) * (score - low) / (high - low)

    _axes(drawing, place, low, high)
    for method, color in METHODS.items():
        steps = sorted(series[method][0])
        columns = [[found[step] for found in series[method]] for step in steps]
        ends = [place(step, max(column)) for step, column in zip(steps, columns, strict=True)]
        ends += [place(step, min(column)) for step, column in zip(steps, columns, strict=True)][::-1]
        drawing.area(ends, color, 0.16)
    for method, color in METHODS.items():
        steps = sorted(series[method][0])
        means = [statistics.mean(found[step] for found in series[method]) for step in steps]
        drawing.polyline([place(*pair) for pair in zip(steps, means, strict=True)], color, 2.4)
    _legend(drawing, series)
    return drawing


def _range(series: Series) -> tuple[float, float]:
    """Return the ends of the vertical axis: multiples of 0.1 around all scores."""
    values = [score for seeds in series.values() for found in seeds for score in found.values()]
    return int(min(values) * 10) / 10, min(1.0, (int(max(values) * 10) + 1) / 10)


def _axes(drawing: Drawing, place: Place, low: float, high: float) -> None:
    for number in range(round(low * 10), round(high * 10) + 1):
        _, y = place(0, number / 10)
        drawing.path(f"M{LEFT},{y:.1f} H{RIGHT}", "line", 1)
        drawing.text(LEFT - 10, y + 5, f"{number / 10:.1f}", "quiet", 13.5, text_anchor="end")
    for step in range(0, STEPS + 1, EVERY):
        x, _ = place(step, low)
        drawing.path(f"M{x:.1f},{BOTTOM} v5", "quiet", 1)
        drawing.text(x, BOTTOM + 21, str(step), "quiet", 13.5, text_anchor="middle")
    drawing.text(
        (LEFT + RIGHT) / 2, HEIGHT - 12, "training step (128 samples each)", size=14, text_anchor="middle"
    )
    middle = (TOP + BOTTOM) / 2
    turned = f"rotate(-90 20 {middle})"
    label = "avg@4 on 128 held-out questions"
    drawing.text(20, middle, label, size=14, text_anchor="middle", transform=turned)


def _legend(drawing: Drawing, series: Series) -> None:
    """List the methods in the lower right corner, highest first, each with its last score."""
    last = {name: mean_and_deviation([found[STEPS] for found in series[name]]) for name in METHODS}
    x, y, row = RIGHT - 250, BOTTOM - 87, 25
    drawing.text(x + 104, y, f"step {STEPS}, mean ± std", "quiet", 13)
    for number, name in enumerate(sorted(METHODS, key=lambda name: -last[name][0]), 1):
        mean, deviation = last[name]
        drawing.path(f"M{x},{y + row * number - 5} h28", METHODS[name], 3)
        drawing.text(x + 38, y + row * number, name.upper(), METHODS[name], 14.5, bold=True)
        drawing.text(x + 104, y + row * number, f"{mean:.3f} ± {deviation:.3f}", size=14.5)


if __name__ == "__main__":
    main()
