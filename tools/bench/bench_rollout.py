"""Measure requests a second on two SGLang servers, of our client and of SGLang's own.

    python tools/bench/bench_rollout.py [--requests 1000] [--concurrency 64] [--servers 2] [--tokens 32]
        [--rounds 3] [--python .venv-sglang/bin/python] [--json] [--output FILE]

The servers are the quick start's, on this machine's CPU. Every request has its own prompt of 24 tokens and
generates exactly --tokens tokens at temperature 1. Both clients send the same load; SGLang's
(sglang.benchmark, which knows one server and needs `pip install datasets` in that environment) runs once for
each server, at the same time, with its share. The clients take turns; `seconds` is the median round. Fails
when a request is lost or answered twice.
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
from pathlib import Path
from threading import Event

from _report import Row, add_ratios, cpu_name, make_parser, publish
from _servers import START, add_server_options, start_servers
from safetensors.torch import load_file

from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import Completion, Request, Sampling
from megatron_srpo.rollout.sglang.engine import SGLangEngine

PROMPT_TOKENS = 24


def ours(engine: SGLangEngine, options: argparse.Namespace, vocab_size: int, seed: int) -> float:
    """Return the seconds for all requests. Raises SystemExit if one is lost, answered twice or too short."""
    dice = random.Random(seed)
    requests = [
        Request(tuple(dice.choices(range(10, vocab_size), k=PROMPT_TOKENS)), str(number))
        for number in range(options.requests)
    ]
    answers: dict[int, list[Completion]] = {}
    start = time.perf_counter()
    for completions in engine.generate(requests, Sampling(1.0, 1.0, options.tokens, ()), Event()):
        for number, completion in completions.items():
            answers.setdefault(number, []).append(completion)
    seconds = time.perf_counter() - start
    lost, doubled = options.requests - len(answers), sum(len(given) > 1 for given in answers.values())
    short = sum(len(given[0].ids) != options.tokens for given in answers.values())
    if lost or doubled or short:
        raise SystemExit(f"{lost} requests lost, {doubled} answered more than once, {short} too short")
    return seconds


def theirs(urls: list[str], options: argparse.Namespace, seed: int) -> float:
    """Return the seconds of SGLang's client by its own clock: one client a server, the slowest of them."""
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    clients = []
    for number, url in enumerate(urls):
        clients.append(
            subprocess.Popen(
                client_command(url, len(urls), options, 10 * seed + number),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    seconds = []
    for client in clients:
        output = client.communicate()[0]
        found = re.search(r"Benchmark duration \(s\):\s+([\d.]+)", output)
        if client.returncode or found is None:
            raise SystemExit(f"SGLang's client failed:\n{output[-2000:]}")
        seconds.append(float(found[1]))
    return max(seconds)


def client_command(url: str, servers: int, options: argparse.Namespace, seed: int) -> list[str]:
    """Return the command of SGLang's client for one server's share of the load."""
    sampling = {
        "temperature": 1.0,  # its default is greedy
        "top_p": 1.0,
        "top_k": -1,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "max_new_tokens": options.tokens,
    }
    arguments = {
        "backend": "sglang",
        "base-url": url,
        "dataset-name": "random-ids",
        "num-prompts": options.requests // servers,
        "max-concurrency": options.concurrency // servers,
        "random-input-len": PROMPT_TOKENS,
        "random-output-len": options.tokens,
        "random-range-ratio": 1.0,
        "tokenizer": START,
        "model": START,
        "seed": seed,
        "warmup-requests": 0,
        "output-file": os.devnull,
        "extra-request-body": json.dumps({"sampling_params": sampling}),
    }
    command = [options.python, "-m", "sglang.bench_serving"]
    command += ["--disable-stream", "--disable-tqdm", "--return-logprob"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    return command


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    speed = f"{row['requests_a_second']:6.1f} requests/s"
    return f"{row['name']:>16}  {row['seconds']:6.2f} s  {speed}  {row['ratio']:.2f}"


def main() -> None:
    """Run both clients in turn and publish the report."""
    parser = make_parser(__doc__, rounds=3)
    add_server_options(parser, servers=2)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    folder, our_seconds, their_seconds = HFFolder(START), [], []
    with tempfile.TemporaryDirectory() as root:
        engine = start_servers(options, folder, Path(root) / "run")
        try:
            engine.update_weights(load_file(START / "model.safetensors").items(), "0")
            engine.generation.concurrency = options.concurrency
            urls = [target.url for target in engine.generation.targets]
            for number in range(options.rounds):
                our_seconds.append(ours(engine, options, folder.architecture.vocab_size, number))
                their_seconds.append(theirs(urls, options, number))
        finally:
            engine.close()
    rows: list[Row] = [
        {"name": "SGLang's client", "seconds": statistics.median(their_seconds)},
        {"name": "ours", "seconds": statistics.median(our_seconds), "lost": 0, "doubled": 0},
    ]
    for row in rows:
        row["requests_a_second"] = options.requests / row["seconds"]
    add_ratios(rows)
    shape = {key: getattr(options, key) for key in ("requests", "concurrency", "servers", "tokens", "rounds")}
    publish(options, cpu_name(), shape, rows, format_row)


if __name__ == "__main__":
    main()
