"""Compare a complete step of the quick start on a CPU with TRL's trainers.

A step samples, verifies and trains.

    python tools/bench/bench_quickstart.py [--steps 10] [--json] [--output FILE]

Same model and batch: 16 prompts × 8 samples of at most 64 tokens, one thread. Each row runs in a process of
its own; rows take turns, `--rounds` times, because a busy machine changes from minute to minute: `seconds` is
the best step of all rounds, `median` the median. `ratio` is to TRL's trainer of the same algorithm (ours
srpo: to its SDPO). Our steps also publish weights and write metrics. TRL (`pip install trl`) is named under
`skipped` where it cannot be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import QUICKSTART, ROOT, Row, cpu_name, make_parser, publish

ROWS = {"ours grpo": "grpo", "TRL grpo": "grpo", "ours sdpo": "sdpo", "TRL sdpo": "sdpo", "ours srpo": "srpo"}
WARM_UP = 2  # steps that are not counted


def ours(algorithm: str, steps: int) -> list[float]:
    """Return the seconds of each step, by metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"algorithm.name={algorithm}",
            f"train.steps={steps}",
            "evaluation.every=0",
            f"logging.dir={folder}/run",
            "checkpoint.save_interval=0",
            "algorithm.mini_batch_prompts=null",
        ]
        command = [sys.executable, "-m", "megatron_srpo", "train", "examples/quickstart/config.yaml"]
        subprocess.run([*command, *settings], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["seconds"] for line in lines]


def theirs(algorithm: str, steps: int) -> list[float]:
    """Return the seconds of each step, between the trainer's callbacks."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from megatron_srpo.tasks.addition import Addition, verify

    if algorithm == "grpo":
        from trl import GRPOConfig as Settings
        from trl import GRPOTrainer as Trainer
    else:
        from trl.experimental.sdpo import SDPOConfig as Settings
        from trl.experimental.sdpo import SDPOTrainer as Trainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            starts.append(time.perf_counter())

    starts: list[float] = []
    start, task = QUICKSTART / "start", Addition(1)
    prompts = [task.prompt("train", number) for number in range(16 * steps)]
    rows = [{"prompt": list(prompt.messages), "answer": prompt.answer} for prompt in prompts]
    if algorithm == "sdpo":
        rows = [row | {"privileged_context": None} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            output_dir=folder,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=64,
            max_steps=steps + 1,
            learning_rate=1e-4,
            temperature=1.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(start),
            processing_class=AutoTokenizer.from_pretrained(start),
            reward_funcs=lambda completions, answer, **_: [
                verify(gold, completion[0]["content"]).reward
                for gold, completion in zip(answer, completions, strict=True)
            ],
            args=settings,
            train_dataset=datasets.Dataset(
                datasets.table.InMemoryTable.from_pylist(rows), fingerprint="none"
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    return [after - before for before, after in zip(starts, starts[1:], strict=False)]


def measure_all(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return {row: seconds of each step, all rounds} and {row of TRL: reason why it cannot run}."""
    seconds: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for _ in range(options.rounds):
        for name in options.rows:
            if name in skipped:
                continue
            command = [sys.executable, __file__, "--row", name, "--steps", str(options.steps)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode and name.startswith("TRL"):
                skipped[name] = done.stderr.strip().splitlines()[-1]
            elif done.returncode:
                raise SystemExit(done.stderr[-3000:])
            else:
                seconds.setdefault(name, []).extend(json.loads(done.stdout.splitlines()[-1]))
    return seconds, skipped


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    ratio = f"  {row['ratio']:.2f} of TRL's" if row["ratio"] else ""
    return f"{row['name']:>12}  {row['seconds']:.3f} s, median {row['median']:.3f} s{ratio}"


def main() -> None:
    """Measure one row in this process with --row, otherwise all rows, and publish the report."""
    parser = make_parser(__doc__, rounds=2)
    parser.add_argument("--steps", type=int, default=8, help="of each row in each round, after two others")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)  # in its own process
    options = parser.parse_args()
    if options.row:
        measure = ours if options.row.startswith("ours") else theirs
        print(json.dumps(measure(ROWS[options.row], WARM_UP + options.steps)[WARM_UP:]))
        return
    seconds, skipped = measure_all(options)
    rows = []
    for name, found in seconds.items():
        peer = "TRL grpo" if name.endswith("grpo") else "TRL sdpo"
        ratio = min(found) / min(seconds[peer]) if peer in seconds else None
        rows.append({"name": name, "seconds": min(found), "median": statistics.median(found), "ratio": ratio})
    shape = {"steps": options.steps, "rounds": options.rounds, "load_average": os.getloadavg()[0]}
    publish(options, cpu_name(threads=1), shape, rows, format_row, skipped)


if __name__ == "__main__":
    main()
