"""Measure tokens a second of the embedded engine, of an earlier one and of transformers' generate.

    python tools/bench/bench_engine.py [--prompts 4] [--answers 16] [--prompt-tokens 400] [--tokens 16]
        [--batch-size 256] [--shape smollm2-135m] [--rounds 3] [--baseline REF] [--json] [--output FILE]

Each of --prompts random prompts is answered --answers times at temperature 1, by a model with random weights,
on one thread. All answers of a row are computed at once if --batch-size allows; generate always takes all of
them, padded on the left. `fixed` answers have --tokens tokens. `varied` ones end earlier at one of many stop
ids: half of them, on average, after a third of --tokens. generate returns no log-probabilities.

Each row runs in a process of its own; rows take turns. Times are the thread's CPU seconds, which other
processes change less. `seconds` is for --tokens tokens of every answer, at the best speed of all rounds, and
`ratio` is to the baseline or else to generate. `extra_bytes` is the growth
of the peak of resident memory over that with the model alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import torch
from _baseline import baseline_tree, run_json
from _memory import peak_resident_bytes, reset_peak
from _report import ROOT, Row, add_ratios, cpu_name, make_parser, publish

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHAPES = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 300,
    },
}
Sampler = Callable[[Sequence[tuple[int, ...]], int, tuple[int, ...]], list[int]]  # returns answers' lengths


def make_engine(folder: Path, batch_size: int) -> Sampler:
    """Return the engine of the package that is imported, with random weights; of this one or of 551ecf2."""
    from megatron_srpo.model.hf_folder import HFFolder
    from megatron_srpo.rollout.engine import Request, Sampling

    try:
        from megatron_srpo.rollout.transformers.engine import TransformersEngine
    except ModuleNotFoundError:  # 551ecf2
        from megatron_srpo.rollout.transformers_engine import TransformersEngine
    engine: Any = TransformersEngine(HFFolder(folder), torch.device("cpu"), torch.float32, batch_size)
    engine.version = "0"

    def sample(prompts: Sequence[tuple[int, ...]], tokens: int, stops: tuple[int, ...]) -> list[int]:
        requests = [Request(prompt, str(number)) for number, prompt in enumerate(prompts)]
        sampling = Sampling(1.0, 1.0, tokens, stops)
        lengths = {}

        def finished(completions: Any) -> bool:
            lengths.update({number: len(found.ids) for number, found in completions.items()})
            return False

        if "finished" in engine.generate.__annotations__:  # 551ecf2 takes a callback
            engine.generate(requests, sampling, finished)
        else:
            for completions in engine.generate(requests, sampling, Event()):
                finished(completions)
        return [lengths[number] for number in range(len(prompts))]

    return sample


def make_generate(folder: Path, batch_size: int) -> Sampler:
    """Return transformers' batched generate, which samples without top-k and top-p."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()

    def sample(prompts: Sequence[tuple[int, ...]], tokens: int, stops: tuple[int, ...]) -> list[int]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        answers = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
            eos_token_id=list(stops),
            pad_token_id=0,
        )[:, longest:]
        ends = torch.isin(answers, torch.tensor(stops)).int()
        return [int(end.argmax()) + 1 if end.any() else len(end) for end in ends]

    return sample


def measure(options: argparse.Namespace) -> Row:
    """Return seconds, tokens and memory of both kinds of answers, for the row in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_LLAMA | shape))
        make = make_generate if options.row == "generate" else make_engine
        sample = make(Path(folder), options.batch_size)
    dice, vocabulary = random.Random(0), shape["vocab_size"]
    # half of the answers end within a third of the tokens
    share = 1 - 0.5 ** (3 / options.tokens)
    stops = {"fixed": (vocabulary,), "varied": tuple(range(max(1, round(share * vocabulary))))}
    distinct = [
        tuple(dice.choices(range(vocabulary), k=options.prompt_tokens)) for _ in range(options.prompts)
    ]
    prompts = [prompt for prompt in distinct for _ in range(options.answers)]
    reset_peak()
    before = peak_resident_bytes()
    sample(prompts[:2], 2, stops["fixed"])
    found: Row = {}
    for kind, ids in stops.items():
        reset_peak()
        start = time.process_time()
        lengths = sample(prompts, options.tokens, ids)
        seconds = time.process_time() - start
        tokens = sum(lengths)
        if kind == "fixed" and tokens != options.tokens * len(prompts):
            raise SystemExit(f"{tokens} tokens were sampled, not {options.tokens} for each of {len(prompts)}")
        found[kind] = {"speed": tokens / seconds, "extra_bytes": peak_resident_bytes() - before}
    return found


def measure_all(options: argparse.Namespace) -> list[Row]:
    """Return the rows, each with the best speed of all rounds."""
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in _SHAPE]
    found: dict[str, list[Row]] = {}

    def run(name: str, row: str, tree: Path) -> None:
        command = [sys.executable, __file__, *arguments, "--row", row]
        variables = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for kind, values in run_json(command, tree, variables).items():
            found.setdefault(f"{name}, {kind}", []).append(values)

    def rounds(baseline: Path | None) -> None:
        for _ in range(options.rounds):
            if baseline is not None:
                run(options.baseline, "engine", baseline)
            run("generate", "generate", ROOT)
            run("ours", "engine", ROOT)

    if options.baseline is None:
        rounds(None)
    else:
        with baseline_tree(options.baseline) as tree:
            rounds(tree)
    tokens = options.prompts * options.answers * options.tokens
    rows: list[Row] = []
    for name, values in found.items():
        speed = max(value["speed"] for value in values)
        extra = max(value["extra_bytes"] for value in values)
        row = {"name": name, "seconds": tokens / speed, "tokens_a_second": speed, "extra_bytes": extra}
        rows.append(row)
    return sorted(rows, key=lambda row: row["name"].endswith("varied"))


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    speed = f"{row['tokens_a_second']:8.1f} tokens/s"
    return f"{row['name']:>18}  {speed}  {row['ratio']:.3f}  + {row['extra_bytes'] / 2**20:6.0f} MiB"


_SHAPE = ("prompts", "answers", "prompt_tokens", "tokens", "batch_size", "shape")


def main() -> None:
    """Measure one row in this process with --row, otherwise all rows, and publish the report."""
    parser = make_parser(__doc__, rounds=3, baseline=True)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--answers", type=int, default=16, help="to each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer, at most")
    parser.add_argument("--batch-size", type=int, default=256, help="rollout.batch_size")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--row", choices=("engine", "generate"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options)))
        return
    rows = measure_all(options)
    for kind in ("fixed", "varied"):
        add_ratios([row for row in rows if row["name"].endswith(kind)])
    shape = {name: getattr(options, name) for name in (*_SHAPE, "rounds")}
    publish(options, cpu_name(1), shape, rows, format_row)


if __name__ == "__main__":
    main()
