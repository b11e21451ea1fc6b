"""Measure seconds, peak memory and page size of `srpo report` on a generated run folder of full size.

    python tools/bench/bench_report.py [--steps 10000] [--full 8] [--inline] [--json] [--output FILE]

The folder has a row of metrics for every step; `--full` steps, spread over the run, have 256 samples of 8,192
tokens and token values of 8 of them, and every other step has one short sample. The rows: writing the dump of
a full step (in this process), reading all samples of one (`srpo inspect`), and the report (processes of their
own). `extra_bytes` is the peak of resident memory of the process, `file_bytes` the size of what it wrote.
`--inline` writes token ids and log-probabilities into the JSON lines, as older versions did.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _memory import status_bytes
from _report import QUICKSTART, Row, cpu_name, make_parser, publish

from megatron_srpo.config.load import load_config, save_config
from megatron_srpo.data import rollout_file
from megatron_srpo.data.records import Group, Prompt, Route, Sample, Segment, Verdict
from megatron_srpo.data.rollout_file import dump, step_file
from megatron_srpo.observe.tokens import choose, write_tokens

VOCABULARY = 151_936
PROMPT_TOKENS = 512
TEXT = "so the sum of both sides is x = 2, and therefore we have that f(x) in [0, 1) holds"
COLUMNS = (
    "loss grad_norm lr policy_entropy teacher_entropy teacher_entropy_p10 teacher_entropy_p50"
    " teacher_entropy_p90 distillation_divergence entropy_weight_mean entropy_weight_std engine_logprob_gap"
    " engine_logprob_gap_max importance_mean importance_clip_share teacher_distance teacher_followed"
    " reward_mean pass_rate response_tokens_mean truncated_share format_rate verifier_failed_share"
    " sdpo_sample_share sdpo_token_share teacherless_failed_share zero_advantage_share staleness_mean seconds"
    " seconds_rollout seconds_verify seconds_teacher seconds_update seconds_publish seconds_checkpoint"
)


def make_group(step: int, number: int, size: int, tokens: int) -> Group:
    """Return a verified and routed group of `size` responses of `tokens` tokens."""
    rng = np.random.default_rng((step, number))
    messages = ({"role": "user", "content": " ".join(rng.choice(TEXT.split(), PROMPT_TOKENS))},)
    ids = tuple(rng.integers(VOCABULARY, size=min(tokens, PROMPT_TOKENS)).tolist())
    prompt = Prompt(id=f"{step}/{number}", task="made-up", messages=messages, answer="7", ids=ids)
    group = []
    for index in range(size):
        response = tuple(rng.integers(VOCABULARY, size=tokens).tolist())
        logprobs = tuple((-rng.exponential(size=tokens)).astype(np.float32).tolist())
        is_distilled = index % 2 == 1
        route = Route(
            branch="sdpo" if is_distilled else "grpo",
            policy_weight=float(not is_distilled),
            distillation_weight=float(is_distilled),
            advantage=0.5 - is_distilled,
            sibling=0 if is_distilled else None,
            teacher_ids=(*ids, *response) if is_distilled else None,
        )
        sample = Sample(
            prompt=prompt,
            index=index,
            segments=(Segment(ids=response, logprobs=logprobs, versions=((str(step - 1), 0, tokens),)),),
            finish_reason="stop",
            text=" ".join(rng.choice(TEXT.split(), tokens)),
            verdict=Verdict(reward=1 - is_distilled, correct=not is_distilled, format_ok=True),
            route=route,
        )
        group.append(sample)
    return tuple(group)


def token_values(key: tuple[str, int], tokens: int) -> dict[str, Any]:
    """Return values of a sample's tokens, in the form of `TokenValues.gather`."""
    rng = np.random.default_rng(key[1])
    numbers = {
        name: [float(f"{value:.5g}") for value in rng.exponential(size=tokens)]
        for name in ("logprob", "teacher_logprob", "entropy", "teacher_entropy", "divergence", "weight")
    }
    tops: dict[str, Any] = {}
    for name in ("top", "teacher_top"):
        likeliest = rng.integers(VOCABULARY, size=(tokens, 5)).tolist()
        values = (-rng.exponential(size=(tokens, 5))).tolist()
        tops[name] = [
            [[token, float(f"{value:.5g}")] for token, value in zip(*place, strict=True)]
            for place in zip(likeliest, values, strict=True)
        ]
    return {"prompt_id": key[0], "index": key[1], **numbers, **tops}


def make_run(folder: Path, steps: int, full: int, prompts: int, size: int, tokens: int) -> list[int]:
    """Write the folder of a run whose `full` steps have complete samples; return these steps."""
    (folder / "rollouts").mkdir(parents=True)
    overrides = [f"logging.dir={folder}", f"train.steps={steps}", f"rollout.prompts_per_step={prompts}"]
    save_config(
        load_config(QUICKSTART / "config.yaml", [*overrides, f"rollout.samples_per_prompt={size}"]),
        folder / "config.yaml",
    )
    rng, large = random.Random(0), [round(steps * (place + 1) / full) for place in range(full)]
    with (folder / "metrics.jsonl").open("w") as out:
        for step in range(1, steps + 1):
            row: dict[str, Any] = {"step": step, **{name: rng.random() for name in COLUMNS.split()}}
            row |= {"updates": 1, "updates_skipped": 0, "tokens": 2_000_000, "alarms": []}
            out.write(json.dumps(row | {"weight_version": str(step - 1)}) + "\n")
            if step % 100 == 0:
                score = {"avg@16": rng.random(), "pass@16": rng.random(), "avg_low": 0.4, "avg_high": 0.6}
                scores = {f"eval/made-up/{name}": value for name, value in score.items()}
                out.write(json.dumps({"step": step, **scores}) + "\n")
    for step in sorted({*range(1, steps + 1)} - {*large}):
        dump([make_group(step, 0, 1, 8)], folder / "rollouts", step)
    for step in large:
        groups = [make_group(step, number, size, tokens) for number in range(prompts)]
        dump(groups, folder / "rollouts", step)
        values = [token_values(key, tokens) for key in choose(groups, 8)]
        write_tokens(values, groups, lambda ids: f"t{ids[0]}", folder / "rollouts", step)
    return large


def run_command(name: str, *arguments: str) -> Row:
    """Run an `srpo` command; return a row with its seconds and its peak memory."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "megatron_srpo", *arguments], stdout=subprocess.DEVNULL)
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        peak = max(peak, status_bytes(process.pid, "VmHWM"))  # ru_maxrss would include this process's memory
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        raise ChildProcessError(f"{name}: exit status {process.returncode}")
    used = ended[2].ru_utime + ended[2].ru_stime
    seconds = time.perf_counter() - start
    return {"name": name, "seconds": seconds, "cpu_seconds": used, "extra_bytes": peak}


def measure(folder: Path, options: Any) -> list[Row]:
    """Return the rows."""
    large = make_run(
        folder, options.steps, options.full, options.prompts, options.samples_per_prompt, options.tokens
    )
    groups = [
        make_group(large[0], number, options.samples_per_prompt, options.tokens)
        for number in range(options.prompts)
    ]
    start, used = time.perf_counter(), time.process_time()
    dump(groups, folder / "rollouts", large[0])
    row: Row = {"name": "dump of a step", "seconds": time.perf_counter() - start}
    row |= {"cpu_seconds": time.process_time() - used, "extra_bytes": 0}
    files = [step_file(folder, large[0]), rollout_file.binary_file(step_file(folder, large[0]))]
    row["file_bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    rows = [row, run_command("inspect", "inspect", str(folder), "--step", str(large[0]))]
    report = run_command("report", "report", str(folder))
    report["file_bytes"] = (folder / "report.html").stat().st_size
    return [*rows, report]


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    size = f"{row['file_bytes'] / 1e6:8.1f} MB written" if "file_bytes" in row else ""
    seconds = f"{row['seconds']:7.2f} s ({row['cpu_seconds']:.2f} s of CPU)"
    return f"{row['name']:>16}  {seconds}  {row['extra_bytes'] / 1e6:6.0f} MB of memory{size}"


def main() -> None:
    """Generate a run folder, measure and publish the report."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--full", type=int, default=8, help="steps with complete samples")
    parser.add_argument("--prompts", type=int, default=32, help="groups of a complete step")
    parser.add_argument("--samples-per-prompt", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="of a response")
    parser.add_argument("--inline", action="store_true", help="token ids in the JSON lines")
    options = parser.parse_args()
    if options.inline:
        rollout_file.INLINE_IDS = sys.maxsize
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder) / "run", options)
    shape = {name: value for name, value in vars(options).items() if name not in ("json", "output")}
    publish(options, cpu_name(), shape, rows, format_row)


if __name__ == "__main__":
    main()
