"""Measure the checks of a million questions before a run starts, against an earlier version.

    python tools/bench/bench_preflight.py [--questions 1000000] [--baseline REF] [--json] [--output FILE]

Generated question files of the shapes that the prepare tools write: mathematics (gsm8k) and multiple choice
(chemistry), each with `--questions` training questions and a thousandth as many test questions. A row is
everything that rank 0 does with the data before the first step, in a process of its own: preflight, the tasks
and remarks of the run, and the checksums for its checkpoints. `extra_bytes` is the growth of its memory.
`--model`: its tokenizer and chat template are used; default: the quick start's model.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

from _baseline import baseline_tree, run_json
from _report import QUICKSTART, ROOT, Row, cpu_name, make_parser, publish

SYSTEM = (
    "Given a question and four options, please select the right answer. Respond in the following format:\n"
    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\nFor the answer, only output the letter."
)
TEXT = "the mass of a compound is found by adding how many grams each day if it takes twice as long"
KINDS = ("gsm8k", "chemistry")

# Prints {"seconds", "cpu_seconds", "bytes"}; imports and the model folder are not counted.
MEASURE = """
import json, sys, time
from pathlib import Path
sys.path.insert(1, BENCH)
from _memory import peak_resident_bytes, reset_peak
try:
    from megatron_srpo.config.load import load_config
except ImportError:  # 551ecf2
    from megatron_srpo.config_file import load_config
from megatron_srpo.preflight import preflight
from megatron_srpo.rollout import source
config = load_config(Path(sys.argv[1]), sys.argv[2:])
warm = ["task.path=null", "task.name=addition", "evaluation.every=0", "task.verifier=null"]
preflight(load_config(Path(sys.argv[1]), [*sys.argv[2:], *warm]))
reset_peak()
before, start, used = peak_resident_bytes(), time.perf_counter(), time.process_time()
folder = preflight(config)
trained, evaluated = source.training_tasks(config), source.evaluation_tasks(config)
if hasattr(source, "evaluation_remarks"):  # later than 551ecf2
    from megatron_srpo.checkpoint.inputs import inputs_of
    source.evaluation_remarks(config.evaluation, evaluated, trained)
    inputs_of(config, folder)
seconds, used = time.perf_counter() - start, time.process_time() - used
found = {"seconds": seconds, "cpu_seconds": used, "bytes": peak_resident_bytes() - before}
print(json.dumps(found))
"""


def write_questions(file: Path, kind: str, count: int, seed: int) -> None:
    """Write a file of questions of 300 to 400 bytes with answers of the kind."""
    rng, words = random.Random(f"{kind}/{seed}"), TEXT.split()
    with file.open("w") as out:
        for number in range(count):
            text = " ".join(rng.choices(words, k=25)) + f" {seed}.{number}?"
            if kind == "gsm8k":
                answer = str(number) if number % 4 else rf"\frac{{{number}}}{{{number + 7}}}"
                row = {"id": f"{kind}-{seed}-{number}", "question": text * 2, "answer": answer}
            else:
                options = "\n".join(f"{letter}: {rng.random():.3f} g/mol" for letter in "ABCD")
                row = {"idx": f"{seed}-{number}", "prompt": f"{text}\n\n{options}", "system": SYSTEM}
                row["answer"] = rng.choice("ABCD")
            out.write(json.dumps(row) + "\n")


def measure(kind: str, questions: int, model: Path, tree: Path) -> Row:
    """Return the row of a kind of question with the code in `tree`."""
    program = MEASURE.replace("BENCH", repr(str(Path(__file__).parent)))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_questions(folder / "train.jsonl", kind, questions, 1)
        write_questions(folder / "test.jsonl", kind, max(1, questions // 1000), 2)
        size = sum(file.stat().st_size for file in folder.iterdir())
        overrides = [f"model.hf_path={model}", f"logging.dir={folder / 'run'}", f"task.path={folder}"]
        overrides += [f"task.name={kind}", "evaluation.prompts=null", "rollout.max_prompt_tokens=2048"]
        command = [sys.executable, "-c", program, str(QUICKSTART / "config.yaml"), *overrides]
        found = run_json(command, tree)
    row = {"name": kind, "seconds": found["seconds"], "cpu_seconds": found["cpu_seconds"]}
    return {**row, "extra_bytes": found["bytes"], "file_bytes": size, "questions": questions}


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    seconds = f"{row['seconds']:7.1f} s ({row['cpu_seconds']:.1f} s of CPU)"
    what = f"{row['questions']:>9,} questions, {row['file_bytes'] / 1e6:4.0f} MB"
    return f"{row['name']:>20}  {what}  {seconds}  {row['extra_bytes'] / 1e6:6.0f} MB of memory"


def main() -> None:
    """Generate the files, measure and publish the report."""
    parser = make_parser(__doc__)
    parser.add_argument("--questions", type=int, default=1_000_000)
    parser.add_argument("--model", type=Path, default=QUICKSTART / "start")
    parser.add_argument(
        "--baseline", metavar="REF", help="also measure this commit, on a 20th of the questions"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    rows = [measure(kind, options.questions, options.model, ROOT) for kind in options.kinds]
    if options.baseline:
        with baseline_tree(options.baseline) as tree:
            few = max(1, options.questions // 20)
            for row in [measure(kind, few, options.model, tree) for kind in options.kinds]:
                rows.append({**row, "name": f"{row['name']}, {options.baseline}"})
    publish(options, cpu_name(), {"questions": options.questions}, rows, format_row)


if __name__ == "__main__":
    main()
