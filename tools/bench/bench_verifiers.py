"""Measure verdicts a second of the verifier pool, against the same verifiers in a loop in-process.

    python tools/bench/bench_verifiers.py [--workers 2] [--questions 500] [--json] [--output FILE]

Generated responses of some hundred tokens, eight to a question, half of them right; for mathematics half of
the answers are integers and half LaTeX that no two questions share, so every one is parsed. `ratio` is the
pool's time to the loop's; `extra_bytes` is the workers' resident memory. A verifier that is not installed is
named under `skipped`.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

from _memory import status_bytes
from _report import Row, cpu_name, make_parser, publish

from megatron_srpo.config.task_section import TaskSection
from megatron_srpo.tasks.catalog import verifiers
from megatron_srpo.tasks.pool import Job, Pool
from megatron_srpo.tasks.worker import load_attribute

GROUP = 8
THOUGHT = "Let me think about this step by step, and look at every option. " * 20
LOOP_JOBS = 400  # the loop is timed on so many


def choice_answer(rng: random.Random, right: bool) -> tuple[str, str]:
    """Return (answer, response) of a multiple-choice question."""
    answer = rng.choice("ABCD")
    given = answer if right else "ABCD"[("ABCD".index(answer) + 1) % 4]
    return answer, f"<reasoning>\n{THOUGHT}\n</reasoning>\n<answer>\n{given}\n</answer>"


def call_answer(rng: random.Random, right: bool) -> tuple[str, str]:
    """Return (answer, response) of a tool-use question with two calls, one of them nested."""
    names = ("search", "update")
    inputs = [
        json.dumps({"query": str(rng.random()), "page": 1}),
        json.dumps({"id": rng.randrange(99), "data": {"tags": ["a", "b"]}}),
    ]
    answer = json.dumps(
        [{"Action": name, "Action_Input": text} for name, text in zip(names, inputs, strict=True)]
    )
    given = inputs if right else [inputs[1], "{}"]
    calls = [f"Action: {name}\nAction Input: {text}\n" for name, text in zip(names, given, strict=True)]
    return answer, f"Thought: {THOUGHT}\n{''.join(calls)}"


def math_answer(rng: random.Random, right: bool) -> tuple[str, str]:
    """Return (answer, response) of a mathematics question."""
    top, bottom = rng.randrange(1, 10**6), rng.randrange(2, 10**6)
    given = top if right else top + 1
    if rng.random() < 0.5:
        return str(top), f"{THOUGHT} \\boxed{{{given}}}"
    return f"\\frac{{{top}}}{{{bottom}}}", f"{THOUGHT} \\boxed{{\\frac{{{given}}}{{{bottom}}}}}"


ANSWERS: dict[str, Callable[[random.Random, bool], tuple[str, str]]] = {
    "multiple_choice": choice_answer,
    "tool_calls": call_answer,
    "math": math_answer,
}


def make_jobs(kind: str, questions: int) -> list[tuple[Job, bool]]:
    """Return eight responses to each question and whether they are right."""
    rng = random.Random(kind)
    jobs = []
    for _ in range(questions):
        seed = rng.random()
        for place in range(GROUP):
            right = place % 2 == 0
            jobs.append((Job(kind, *ANSWERS[kind](random.Random(seed), right)), right))
    return jobs


def measure(kind: str, jobs: list[tuple[Job, bool]], workers: int) -> Row:
    """Return one row. Raises ValueError when a verdict is wrong."""
    reference = verifiers()[kind].path("paper")
    pool = Pool({kind: reference}, TaskSection.model_validate({"verifier_workers": workers}))
    pool.verify([job for job, _ in jobs[: GROUP * workers]])  # imports
    start = time.perf_counter()
    verdicts = pool.verify([job for job, _ in jobs])
    seconds = time.perf_counter() - start
    memory = sum(status_bytes(worker.process.pid, "VmRSS") for worker in pool.workers)
    pool.close()
    if [verdict.correct for verdict in verdicts] != [right for _, right in jobs]:
        raise ValueError(f"{kind}: a verdict is wrong")
    verifier: Any = load_attribute(reference)
    few = [job for job, _ in jobs[-LOOP_JOBS:]]
    verifier(few[0].answer, few[0].text)
    start = time.perf_counter()
    for job in few:
        verifier(job.answer, job.text)
    loop = (time.perf_counter() - start) / len(few) * len(jobs)
    return {
        "name": kind,
        "seconds": seconds,
        "ratio": seconds / loop,
        "extra_bytes": memory,
        "verdicts": len(jobs),
        "verdicts_per_second": len(jobs) / seconds,
    }


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    speed, memory = f"{row['verdicts_per_second']:9.0f} verdicts/s", f"{row['extra_bytes'] / 2**20:.0f} MiB"
    return f"{row['name']:>16}  {speed}  {row['ratio']:.2f} of the loop's time  {memory}"


def main() -> None:
    """Measure every installed verifier and publish the report."""
    parser = make_parser(__doc__)
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--questions", type=int, default=500, help="questions of eight responses each")
    options = parser.parse_args()
    rows, skipped = [], {}
    for kind in ANSWERS:
        try:
            load_attribute("math_verify:" if kind == "math" else "json:")
        except ImportError as error:
            skipped[kind] = str(error)
            continue
        rows.append(measure(kind, make_jobs(kind, options.questions), options.workers))
    shape = {
        "workers": options.workers,
        "questions": options.questions,
        "group": GROUP,
        "characters": len(THOUGHT),
    }
    publish(options, cpu_name(), shape, rows, format_row, skipped)


if __name__ == "__main__":
    main()
