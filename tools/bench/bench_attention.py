"""Compare the local attention over packed documents with that of another commit, on CPUs.

    python tools/bench/bench_attention.py [--baseline 551ecf2] [--json] [--output FILE]

Each row is a forward and backward pass of one layer's attention, rotary embedding included, in fp32 on one
thread. `prompts`: a group's prompt and its responses, where the other commit repeats the prompt. `context
parallel`: documents of two lengths, each shared by two ranks (gloo), of which the first is timed. `ratio` is
to the same row of this commit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from _baseline import baseline_tree, tree_environment
from _report import ROOT, Row, cpu_name, make_parser, publish

HEADS, KEY_HEADS, DIM = 16, 8, 64
SHAPES: dict[str, dict[str, Any]] = {
    "prompts": {"ranks": 1, "groups": 4, "prompt": 400, "responses": [16] * 8},
    "documents": {"ranks": 1, "groups": 32, "prompt": 0, "responses": [64]},
    "context parallel": {"ranks": 2, "groups": 16, "prompt": 0, "responses": [64, 96]},
}


def inputs(tokens: int) -> list[torch.Tensor]:
    """Return random queries, keys and values of `tokens` tokens."""
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(tokens, n, DIM, generator=generator, requires_grad=True) for n in heads]


def ours(shape: dict[str, Any], rank: int) -> tuple[Any, int]:
    """Return (forward pass of three tensors, this rank's tokens) of this commit's attention."""
    from megatron_srpo.distributed.context_parallel import ContextParallel
    from megatron_srpo.distributed.megatron import RotaryEmbedding
    from megatron_srpo.model.layers import PackedAttention, PackedRow
    from megatron_srpo.model.packed_row import Documents

    lengths: list[int] = []
    prefixes: list[int] = []
    for _ in range(shape["groups"]):
        prefix = -1
        if shape["prompt"]:
            prefix = len(lengths)
            lengths.append(shape["prompt"])
            prefixes.append(-1)
        lengths += shape["responses"]
        prefixes += [prefix] * len(shape["responses"])
    documents = Documents(tuple(itertools.accumulate(lengths, initial=0)), tuple(prefixes))
    tokens = sum(lengths) // shape["ranks"]
    rotary = RotaryEmbedding(DIM, rotary_percent=1.0, use_cpu_initialization=True)
    context = ContextParallel(rank, shape["ranks"])
    row = PackedRow.of(documents, context, torch.arange(tokens) % max(lengths), rotary, torch.float32)
    attention = PackedAttention(_settings(shape["ranks"]), 1, None, None)
    return lambda query, key, value: attention(query, key, value, None, packed_seq_params=row), tokens


def theirs(shape: dict[str, Any]) -> tuple[Any, int]:
    """Return the same of 551ecf2, which repeats prompts and rotates in Megatron's attention."""
    from megatron_srpo.model.layers import PackedAttention  # first: it installs the CPU shim

    # isort: split
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    lengths = [shape["prompt"] + length for length in shape["responses"]] * shape["groups"]
    bounds = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32)
    settings = _settings(shape["ranks"])
    attention = PackedAttention(settings, 1, None, None)
    angles = RotaryEmbedding(DIM, rotary_percent=1.0, use_cpu_initialization=True).get_emb(max(lengths))
    row = SimpleNamespace(cu_seqlens_q=bounds)
    group: Any = parallel_state.get_context_parallel_group()

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key = (
            apply_rotary_pos_emb(x, angles, settings, cu_seqlens=bounds, cp_group=group) for x in (query, key)
        )
        return attention(query, key, value, None, packed_seq_params=row)

    return forward, sum(lengths) // shape["ranks"]


def _settings(ranks: int) -> Any:
    names = ("attention_dropout", "apply_rope_fusion", "rotary_interleaved", "multi_latent_attention")
    return SimpleNamespace(context_parallel_size=ranks, **dict.fromkeys(names, 0))


def measure(name: str, of_baseline: bool, rounds: int) -> float:
    """Return the best seconds of a row, in a process of a group of `ranks`."""
    import megatron_srpo.model.layers  # noqa: F401  (it installs the CPU shim)

    # isort: split
    import torch.distributed as dist
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    shape, rank = SHAPES[name], int(os.environ["RANK"])
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=shape["ranks"])
    forward, tokens = theirs(shape) if of_baseline else ours(shape, rank)
    tensors = inputs(tokens)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        output = forward(*tensors)
        torch.autograd.grad(output, tensors, torch.ones_like(output))
        seconds.append(time.perf_counter() - start)
    dist.destroy_process_group()
    return min(seconds[1:])


def run(name: str, options: argparse.Namespace, tree: Any, of_baseline: bool) -> float:
    """Measure a row in processes of its own, with the package of `tree`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [sys.executable, __file__, "--row", name, "--rounds", str(options.rounds)]
    command += ["--of-baseline"] if of_baseline else []
    ranks = SHAPES[name]["ranks"]
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = tree_environment(tree, place | {"OMP_NUM_THREADS": "1"})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    results = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(results[0][1][-3000:])
    return json.loads(results[0][0].splitlines()[-1])


def format_row(row: Row) -> str:
    """Return a row as a line of the table."""
    return f"{row['name']:>36}  {1000 * row['seconds']:8.2f} ms  {row['ratio']:5.2f}"


def main() -> None:
    """Measure one row in this process with --row, otherwise all, and publish the report."""
    parser = make_parser(__doc__, rounds=10, baseline=True)
    parser.add_argument("--row", choices=list(SHAPES), help=argparse.SUPPRESS)  # in its own process
    parser.add_argument("--of-baseline", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row, options.of_baseline, options.rounds)))
        return
    rows: list[Row] = []
    for name in SHAPES:
        seconds = run(name, options, ROOT, of_baseline=False)
        rows.append({"name": name, "seconds": seconds, "ratio": 1.0})
        if options.baseline:
            with baseline_tree(options.baseline) as tree:
                before = run(name, options, tree, of_baseline=True)
            label = f"{name} at {options.baseline}"
            rows.append({"name": label, "seconds": before, "ratio": before / seconds})
    publish(
        options, cpu_name(threads=1), {"heads": HEADS, "key_heads": KEY_HEADS, "dim": DIM}, rows, format_row
    )


if __name__ == "__main__":
    main()
