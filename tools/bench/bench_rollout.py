"""How fast servers are asked: 1,000 requests at concurrency 64 on two SGLang servers, ours beside SGLang's
own client.

    python tools/bench/bench_rollout.py [--requests 1000] [--concurrency 64] [--servers 2] [--tokens 32] [--rounds
    3]
                                  [--python .venv-sglang/bin/python] [--json] [--output FILE]

The servers are the quick start's, on this machine's CPU. Every request has a prompt of its own of 24 tokens
and makes exactly --tokens tokens, drawn at temperature 1. Both clients send the same load; SGLang's
(sglang.benchmark, which knows one server and needs `pip install datasets` in that environment) runs once
beside each server, at the same time, with its share. The clients take turns; `seconds` is the median round.
Says whether a request was lost or answered twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench_publish import ALONE, START, add_common_options, configuration, tell
from safetensors.torch import load_file

from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import Completion, Request, Sampling
from megatron_srpo.rollout.engines import create_engine

PROMPT_TOKENS = 24


def ours(engine, options: argparse.Namespace, vocab_size: int, seed: int) -> float:
    """Seconds for all requests. Raises SystemExit when one is lost, answered twice, or too short."""
    dice = random.Random(seed)
    requests = [
        Request(tuple(dice.choices(range(10, vocab_size), k=PROMPT_TOKENS)), str(number))
        for number in range(options.requests)
    ]
    answers: dict[int, list[Completion]] = {}

    def finished(completions: Mapping[int, Completion]) -> bool:
        for number, completion in completions.items():
            answers.setdefault(number, []).append(completion)
        return False

    start = time.perf_counter()
    engine.generate(requests, Sampling(1.0, 1.0, options.tokens, ()), finished)
    seconds = time.perf_counter() - start
    lost, doubled = options.requests - len(answers), sum(len(given) > 1 for given in answers.values())
    short = sum(len(given[0].ids) != options.tokens for given in answers.values())
    if lost or doubled or short:
        raise SystemExit(f"{lost} requests lost, {doubled} answered more than once, {short} too short")
    return seconds


def theirs(urls: list[str], options: argparse.Namespace, seed: int) -> float:
    """Seconds of SGLang's client, once a server at the same time; its own clock, the slower of them."""
    clients = []
    for number, url in enumerate(urls):
        command = [
            options.python,
            "-m",
            "sglang.bench_serving",
            "--backend",
            "sglang",
            "--base-url",
            url,
            "--dataset-name",
            "random-ids",
        ]
        command += [
            "--num-prompts",
            str(options.requests // len(urls)),
            "--max-concurrency",
            str(options.concurrency // len(urls)),
        ]
        command += [
            "--random-input-len",
            str(PROMPT_TOKENS),
            "--random-output-len",
            str(options.tokens),
            "--random-range-ratio",
            "1.0",
        ]
        command += [
            "--tokenizer",
            str(START),
            "--model",
            str(START),
            "--seed",
            str(seed * 10 + number),
            "--disable-stream",
        ]
        command += [
            "--warmup-requests",
            "0",
            "--disable-tqdm",
            "--return-logprob",
            "--output-file",
            os.devnull,
        ]
        drawn = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "ignore_eos": True,
            "skip_special_tokens": False,
        }  # else it is greedy
        command += [
            "--extra-request-body",
            json.dumps({"sampling_params": {**drawn, "max_new_tokens": options.tokens}}),
        ]
        environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        clients.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    seconds = []
    for client in clients:
        said = client.communicate()[0]
        found = re.search(r"Benchmark duration \(s\):\s+([\d.]+)", said)
        if client.returncode or found is None:
            raise SystemExit(f"SGLang's client failed:\n{said[-2000:]}")
        seconds.append(float(found[1]))
    return max(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_common_options(parser, servers=2)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder, mine, others = HFFolder(START), [], []
    with tempfile.TemporaryDirectory() as root:
        config = configuration(options, START, Path(root) / "run")
        engine = create_engine(config, folder, ALONE, lambda text: None)
        try:
            engine.update_weights(load_file(START / "model.safetensors").items(), "0")
            engine.generation.concurrency = options.concurrency
            urls = [target.url for target in engine.generation.targets]
            for number in range(options.rounds):
                mine.append(ours(engine, options, folder.architecture.vocab_size, number))
                others.append(theirs(urls, options, number))
        finally:
            engine.close()
    rows = [
        {"name": "SGLang's client", "seconds": statistics.median(others)},
        {"name": "ours", "seconds": statistics.median(mine)},
    ]
    rows[1] |= {"lost": 0, "doubled": 0}
    for row in rows:
        row["requests_a_second"] = options.requests / row["seconds"]
    shape = {key: getattr(options, key) for key in ("requests", "concurrency", "servers", "tokens", "rounds")}
    tell(options, shape, rows, _line)


def _line(row: dict) -> str:
    return f"{row['name']:>16}  {row['seconds']:6.2f} s  {row['requests_a_second']:6.1f} requests/s  {row['ratio']:.2f}"


if __name__ == "__main__":
    main()
