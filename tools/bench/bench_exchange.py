"""Bytes and seconds with which one rank of many exchanges a step's samples, in binary and as JSON.

    python tools/bench/bench_exchange.py [--ranks 64 512 4096] [--groups 32] [--tokens 8192] [--rounds 5] …

One process takes the part of one rank: it encodes what that rank sends, and decodes what it would receive,
which the other ranks' code makes beforehand. No bytes travel; `sent` and `received` count them, `received`
with the parts of the outlines that an all-reduce passes on. By default the step has the paper's size: 32
groups of 8 responses, mean 8,192 tokens. Every fourth sample is distilled, and a replica has 8 ranks.

`json` rows are the exchange of commit 551ecf2: every rank receives every sample as JSON, each rank's share
padded to the longest one. `seconds` is the rank's work, the minimum of the rounds, without the plan, which
both need; `plan_seconds` is the plan from the outlines (the same on every rank). `ratio` is to the first row.
The rank is the one that trains the most tokens of the ranks that also send some.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from _report import Row, add_ratios, cpu_name, make_parser, publish

from megatron_srpo.data.outline import OutlineGroup, outline
from megatron_srpo.data.outline_bytes import decode_outlines, encode_outlines
from megatron_srpo.data.records import Group, Prompt, Route, Sample, Segment, Verdict
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.rollout.exchange import deliver, in_prompt_order
from megatron_srpo.training.batch_plan import plan_batch
from megatron_srpo.training.packing import PackingRules

SAMPLES, PROMPT, TEACHER = 8, 300, 4000
REPLICA = 8  # tensor-parallel ranks
CRC_BYTES, SIZE_BYTES = 4, 8
BUDGET = 16_384  # tokens of a micro-batch


def make_groups(count: int, tokens: int) -> list[Group]:
    """Return the routed groups of a step; responses have `tokens` on average."""
    rng = random.Random(0)
    return [_group(rng, f"chemistry/train/{number}", tokens) for number in range(count)]


def _group(rng: random.Random, name: str, tokens: int) -> Group:
    prompt = Prompt(
        id=name,
        task="sciknoweval",
        messages=({"role": "user", "content": "why " * PROMPT},),
        answer="C",
        ids=_ids(rng, PROMPT),
    )
    return tuple(_sample(rng, prompt, index, tokens) for index in range(SAMPLES))


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(100_000, 151_936) for _ in range(count))


def _sample(rng: random.Random, prompt: Prompt, index: int, tokens: int) -> Sample:
    length = rng.randrange(tokens // 2, tokens * 3 // 2)
    distilled = index % 4 == 1
    logprobs = tuple(-rng.random() for _ in range(length))
    segment = Segment(ids=_ids(rng, length), logprobs=logprobs, versions=(("12", 0, length),))
    return Sample(
        prompt=prompt,
        index=index,
        segments=(segment,),
        finish_reason="stop",
        text="four" * length,
        verdict=Verdict(reward=float(not distilled), correct=not distilled, format_ok=True),
        route=Route(
            branch="sdpo" if distilled else "grpo",
            policy_weight=float(not distilled),
            distillation_weight=float(distilled),
            advantage=rng.random() - 0.5,
            sibling=0 if distilled else None,
            teacher_ids=_ids(rng, TEACHER) if distilled else None,
        ),
    )


class _Sent(Exception):
    """Ends a rank's part after it has sent."""


@dataclass(frozen=True)
class Rank(Layout):
    """One rank without the others: keeps what it sends, and receives what it is given."""

    sent: dict[int, bytes] = field(default_factory=dict)
    given: Mapping[int, bytes] | None = None  # None: end after sending

    def exchange_bytes(
        self, outgoing: Mapping[int, bytes], incoming: Mapping[int, int], background: bool = False
    ) -> dict[int, bytes]:
        """Keep the outgoing messages, and return the given ones."""
        self.sent.update(outgoing)
        if self.given is None:
            raise _Sent
        return {rank: self.given[rank] for rank in incoming}


def rank_of(ranks: int, rank: int, given: Mapping[int, bytes] | None = None) -> Rank:
    """Return rank `rank` of `ranks`."""
    return Rank(
        rank=rank,
        world_size=ranks,
        data_parallel_rank=rank // REPLICA,
        data_parallel_size=ranks // REPLICA,
        tensor_parallel_rank=rank % REPLICA,
        tensor_parallel_size=REPLICA,
        given=given,
    )


def messages_of(
    groups: Sequence[Group], outlines: Sequence[OutlineGroup], wanted: Sequence[Sequence[int]], layout: Rank
) -> dict[int, bytes]:
    """Return what a rank sends, by receiver."""
    with suppress(_Sent):
        deliver(groups[layout.rank :: layout.world_size], outlines, wanted, layout)
    return layout.sent


def fastest(work: Callable[[], Any], rounds: int) -> float:
    """Return the seconds of the fastest of `rounds` calls."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def binary(groups: Sequence[Group], ranks: int, rounds: int) -> Row:
    """Return the row of the exchange by outlines and tokens."""
    outlines = [outline(group) for group in groups]
    rules = PackingRules(token_budget=BUDGET)

    def plan() -> list[list[int]]:
        return plan_batch(outlines, ranks // REPLICA, rules, "token_mean").keys

    wanted = plan()
    tokens = [one.policy_tokens for group in outlines for one in group]
    owners = range(min(ranks, len(groups)))
    rank = max(owners, key=lambda one: sum(tokens[number] for number in wanted[one // REPLICA]))
    sent = {owner: messages_of(groups, outlines, wanted, rank_of(ranks, owner)) for owner in owners}
    given = {owner: messages[rank] for owner, messages in sent.items() if rank in messages}
    mine = groups[rank::ranks]
    shares = [encode_outlines([outline(group) for group in groups[one::ranks]]) for one in owners]
    outline_bytes = sum(len(share) + CRC_BYTES for share in shares)

    def encode() -> bytes:
        return encode_outlines([outline(group) for group in mine])

    def decode() -> list[OutlineGroup]:
        return in_prompt_order([decode_outlines(share) for share in shares])

    def exchange() -> dict[int, Sample]:
        return deliver(mine, outlines, wanted, rank_of(ranks, rank, given))

    assert decode() == outlines and sorted(exchange()) == sorted(wanted[rank // REPLICA])
    parts = {
        "outlines": fastest(encode, rounds) + fastest(decode, rounds),
        "tokens": fastest(exchange, rounds),
    }
    sizes = 2 * SIZE_BYTES * ranks  # of the messages with outlines, as an all-reduce passes them on
    return {
        "name": f"binary, {ranks} ranks",
        "seconds": sum(parts.values()),
        "outline_seconds": parts["outlines"],
        "token_seconds": parts["tokens"],
        "plan_seconds": fastest(plan, rounds),
        "sent": 2 * outline_bytes + sizes + sum(map(len, sent[rank].values())),
        "received": 2 * outline_bytes + sizes + sum(map(len, given.values())),
        "trained_tokens": sum(tokens[number] for number in wanted[rank // REPLICA]),
    }


def as_json(groups: Sequence[Group], ranks: int, rounds: int) -> Row:
    """Return the row of the exchange of 551ecf2, for the first rank."""

    def encode(rank: int) -> bytes:
        lines = "\n".join(sample.model_dump_json() for group in groups[rank::ranks] for sample in group)
        return f"{SAMPLES}\n{lines}".encode()

    payloads = [encode(rank) for rank in range(ranks)]

    def decode() -> int:
        count = 0
        for payload in payloads:
            _, *rows = payload.decode().split("\n")
            count += len([Sample.model_validate_json(row) for row in rows if row])
        return count

    assert decode() == len(groups) * SAMPLES
    longest = max(map(len, payloads))
    return {
        "name": f"json, {ranks} ranks",
        "seconds": fastest(lambda: encode(0), rounds) + fastest(decode, rounds),
        "sent": longest * (ranks - 1),
        "received": longest * ranks + 2 * SIZE_BYTES * ranks,
    }


def format_row(row: Row) -> str:
    """Return the line to print."""
    sizes = f"sent {row['sent'] / 1e6:10.3f} MB  received {row['received'] / 1e6:10.3f} MB"
    parts = ""
    if "plan_seconds" in row:
        outlines, tokens, plan = (1e3 * row[f"{part}_seconds"] for part in ("outline", "token", "plan"))
        parts = f"  outlines {outlines:.1f} ms, tokens {tokens:.1f} ms; plan {plan:.1f} ms"
    return f"{row['name']:>18}  {row['seconds'] * 1e3:8.2f} ms  × {row['ratio']:6.3f}  {sizes}{parts}"


def main() -> None:
    """Measure both ways at every number of ranks, and publish the rows."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192, help="of a response, on average (%(default)s)")
    options = parser.parse_args()
    groups = make_groups(options.groups, options.tokens)
    rows = [as_json(groups, ranks, options.rounds) for ranks in options.ranks]
    rows += [binary(groups, ranks, options.rounds) for ranks in options.ranks]
    add_ratios(rows)
    shape = {"groups": options.groups, "samples": SAMPLES, "tokens": options.tokens, "replica": REPLICA}
    publish(options, cpu_name(1), shape, rows, format_row)


if __name__ == "__main__":
    main()
