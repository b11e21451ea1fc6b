"""Compare a complete step of the quick start on a CPU with TRL's trainers.

A step samples, verifies and trains.

    python tools/bench/bench_quickstart.py [--steps 10] [--prompt-tokens 400] [--baseline REF] [--json]

Same model and batch: 16 prompts × 8 samples of at most 64 tokens, one thread. Each row runs in a process of
its own; rows take turns, `--rounds` times, because a busy machine changes from minute to minute: `seconds` is
the best step of all rounds, `median` the median. Each step has a row, and so have its two parts: `sampling`
(of TRL `_generate`) and `training`, the rest. `ratio` is to TRL's trainer of the same algorithm (ours srpo:
to its SDPO). Our steps also publish weights and write metrics. TRL (`pip install trl`) is named under
`skipped` where it cannot be imported. With --prompt-tokens, a text before the sum makes prompts longer, and
half of the responses are accepted (`_long_addition.py`).
"""

from __future__ import annotations

import argparse
import bisect
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from _baseline import baseline_tree, tree_environment
from _long_addition import LongAddition
from _report import QUICKSTART, ROOT, Row, cpu_name, make_parser, publish

ROWS = {"ours grpo": "grpo", "TRL grpo": "grpo", "ours sdpo": "sdpo", "TRL sdpo": "sdpo", "ours srpo": "srpo"}
WARM_UP = 2  # steps that are not counted


START = QUICKSTART / "start"
MAX_TOKENS = 64  # of a response
PREAMBLE = "Add the two numbers and write their sum in an answer block. "
TRL_SETTINGS = dict(
    per_device_train_batch_size=128,
    num_generations=8,
    max_completion_length=MAX_TOKENS,
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


class Step(NamedTuple):
    """Seconds of one step: sampling with its verdicts (TRL's: without), and the rest."""

    sampling: float
    training: float


def preamble_of(prompt_tokens: int) -> str:
    """Return the text before a sum with which prompts have at most `prompt_tokens` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(START)

    def length(preamble: str) -> int:
        message = LongAddition("long_addition", 1, preamble).prompt("train", 0).messages[-1]
        return len(tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"])

    text = PREAMBLE * (prompt_tokens // 8)
    return text[
        : bisect.bisect_right(range(len(text)), prompt_tokens, key=lambda end: length(text[:end])) - 1
    ]


def ours(algorithm: str, steps: int, prompt_tokens: int, tree: Path) -> list[Step]:
    """Return the seconds of each step with a tree's package, by metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"algorithm.name={algorithm}",
            f"train.steps={steps}",
            "evaluation.every=0",
            f"logging.dir={folder}/run",
            "checkpoint.save_interval=0",
            "algorithm.mini_batch_prompts=null",
        ]
        if prompt_tokens:
            settings += [
                f"task.path={Path(__file__).with_name('_long_addition.py')}",
                "task.name=long_addition",
                f"task.options={json.dumps({'preamble': preamble_of(prompt_tokens)})}",
                f"rollout.max_prompt_tokens={prompt_tokens}",
                "teacher.max_prompt_tokens=1024",
            ]
        command = [sys.executable, "-m", "megatron_srpo", "train", "examples/quickstart/config.yaml"]
        done = subprocess.run(
            [*command, *settings], cwd=tree, env=tree_environment(tree), capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{tree}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        rows = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        return [Step(row["seconds_rollout"], row["seconds"] - row["seconds_rollout"]) for row in rows]


def prompt_rows(count: int, prompt_tokens: int) -> list[dict[str, Any]]:
    """Return the task's prompts as rows of TRL's data set."""
    from megatron_srpo.tasks.addition import Addition

    task: Any = Addition(1)
    if prompt_tokens:
        task = LongAddition("long_addition", 1, preamble_of(prompt_tokens))
    prompts = [task.prompt("train", number) for number in range(count)]
    return [{"prompt": list(prompt.messages), "answer": prompt.answer} for prompt in prompts]


def theirs(algorithm: str, steps: int, prompt_tokens: int) -> list[Step]:
    """Return the seconds of each step, between the trainer's callbacks."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from megatron_srpo.tasks.addition import verify

    if algorithm == "grpo":
        from trl import GRPOConfig as Settings
        from trl import GRPOTrainer as Trainer
    else:
        from trl.experimental.sdpo import SDPOConfig as Settings
        from trl.experimental.sdpo import SDPOTrainer as Trainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            starts.append(time.perf_counter())

    class Timed(Trainer):
        def _generate(self, *arguments):
            began = time.perf_counter()
            result = super()._generate(*arguments)
            sampling.append(time.perf_counter() - began)
            return result

    starts: list[float] = []
    sampling: list[float] = []
    judge = LongAddition.verify if prompt_tokens else verify
    rows = prompt_rows(16 * steps, prompt_tokens)
    if algorithm == "sdpo":
        rows = [row | {"privileged_context": None} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            output_dir=folder,
            max_steps=steps + 1,
            **TRL_SETTINGS,
        )
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(START),
            processing_class=AutoTokenizer.from_pretrained(START),
            reward_funcs=lambda completions, answer, **_: [
                judge(gold, completion[0]["content"]).reward
                for gold, completion in zip(answer, completions, strict=True)
            ],
            args=settings,
            train_dataset=datasets.Dataset(
                datasets.table.InMemoryTable.from_pylist(rows), fingerprint="none"
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    totals = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    assert len(sampling) == len(starts), "one generation a step"
    return [Step(sampled, total - sampled) for sampled, total in zip(sampling, totals, strict=False)]


def measure_all(
    options: argparse.Namespace, trees: dict[str, Path]
) -> tuple[dict[str, list[Step]], dict[str, str]]:
    """Measure all rows in turns.

    Args:
        options: The command line's.
        trees: {end of the name of our rows: checkout}.

    Returns:
        {row: seconds of each step, all rounds} and {row of TRL: reason why it cannot run}.
    """
    steps: dict[str, list[Step]] = {}
    skipped: dict[str, str] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for _ in range(options.rounds):
        for row in options.rows:
            for suffix, tree in trees.items() if row.startswith("ours") else [("", ROOT)]:
                name = row + suffix
                if name in skipped:
                    continue
                arguments = ["--row", row, "--tree", str(tree), "--steps", str(options.steps)]
                arguments += ["--prompt-tokens", str(options.prompt_tokens)]
                command = [sys.executable, __file__, *arguments]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode and name.startswith("TRL"):
                    skipped[name] = done.stderr.strip().splitlines()[-1]
                elif done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                else:
                    found = json.loads(done.stdout.splitlines()[-1])
                    steps.setdefault(name, []).extend(Step(*step) for step in found)
    return steps, skipped


def make_rows(steps: dict[str, list[Step]]) -> list[Row]:
    """Return three rows for each measured one: the step, its sampling and its training."""
    rows = []
    for name, found in steps.items():
        peer = steps.get("TRL grpo" if "grpo" in name else "TRL sdpo")
        for part in ("", "sampling", "training"):
            seconds = _seconds(found, part)
            ratio = min(seconds) / min(_seconds(peer, part)) if peer else None
            row = {"name": f"{name}, {part}" if part else name, "seconds": min(seconds)}
            rows.append(row | {"median": statistics.median(seconds), "ratio": ratio})
    return rows


def _seconds(steps: Sequence[Step], part: str) -> list[float]:
    return [getattr(step, part) if part else sum(step) for step in steps]


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    ratio = f"  {row['ratio']:.2f} of TRL's" if row["ratio"] else ""
    return f"{row['name']:>30}  {row['seconds']:.3f} s, median {row['median']:.3f} s{ratio}"


def trl_version() -> str | None:
    """Return the version of the installed TRL."""
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Measure one row in this process with --row, otherwise all rows, and publish the report."""
    parser = make_parser(__doc__, rounds=2, baseline=True)
    parser.add_argument("--steps", type=int, default=8, help="of each row in each round, after two others")
    parser.add_argument("--prompt-tokens", type=int, default=0, help="of each prompt; 0: the task's own 19")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)  # in its own process
    parser.add_argument("--tree", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        arguments = ROWS[options.row], WARM_UP + options.steps, options.prompt_tokens
        is_ours = options.row.startswith("ours")
        steps = ours(*arguments, options.tree) if is_ours else theirs(*arguments)
        print(json.dumps(steps[WARM_UP:]))
        return
    with baseline_tree(options.baseline) if options.baseline else nullcontext() as tree:
        trees = {"": ROOT} | ({f" at {options.baseline}": tree} if tree else {})
        steps, skipped = measure_all(options, trees)
    shape = {"steps": options.steps, "rounds": options.rounds, "prompt_tokens": options.prompt_tokens}
    shape |= {"trl": trl_version(), "load_average": os.getloadavg()[0]}
    publish(options, cpu_name(threads=1), shape, make_rows(steps), format_row, skipped)


if __name__ == "__main__":
    main()
