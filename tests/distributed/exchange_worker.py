"""Exchange random groups under one layout, as tests/distributed/test_exchange.py asks for."""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from random_groups import random_groups, trained
from worker import each_job


@contextmanager
def damage(layout):
    """Flip one bit of the first message that rank 1 receives, in any collective that carries bytes."""
    import torch
    import torch.distributed as dist

    real = dist.all_to_all_single, dist.all_reduce

    def exchange(received, *rest, **options):
        real[0](received, *rest, **options)
        flip(received)

    def reduce(received, *rest, **options):
        real[1](received, *rest, **options)
        flip(received)

    def flip(received):
        if layout.rank == 1 and received.dtype == torch.uint8:
            received[5] ^= 1

    dist.all_to_all_single, dist.all_reduce = exchange, reduce
    try:
        yield
    finally:
        dist.all_to_all_single, dist.all_reduce = real


def refused(call):
    """Return what DamagedMessage says if `call` raises it, else None."""
    from megatron_srpo.distributed.messages import DamagedMessage

    try:
        call()
    except DamagedMessage as error:
        return str(error)
    return None


def run(job: dict) -> None:
    """Exchange, and compare with the groups that every rank can make itself."""
    from megatron_srpo.config.schema import ParallelSection
    from megatron_srpo.data.outline import outline
    from megatron_srpo.data.rollout_file import dump, step_file
    from megatron_srpo.distributed.layout import process_group
    from megatron_srpo.rollout.exchange import deliver, share_outlines, write_samples

    with process_group(ParallelSection(**job["parallel"]), 1) as layout:
        groups = random_groups(job["groups"], job["seed"])
        samples = list(chain.from_iterable(groups))
        mine = groups[layout.rank :: layout.world_size]
        outlines = share_outlines(mine, layout)
        assert outlines == [outline(group) for group in groups]
        shares = layout.gather_json(
            [layout.data_parallel_rank, layout.replica_ranks(layout.data_parallel_rank)]
        )
        for rank, (data_rank, peers) in enumerate(shares):
            assert layout.data_rank_of(rank) == data_rank
            assert peers == [peer for peer, (other, _) in enumerate(shares) if other == data_rank]
        rng = random.Random(job["seed"])
        numbers = rng.sample(range(len(samples)), int(job["share"] * len(samples)))
        wanted = [[] for _ in range(layout.data_parallel_size)]
        for number in numbers:
            wanted[rng.randrange(job["workers"]) % layout.data_parallel_size].append(number)
        found = deliver(mine, outlines, wanted, layout)
        expected = {number: trained(samples[number]) for number in wanted[layout.data_parallel_rank]}
        assert {number: trained(sample) for number, sample in found.items()} == expected
        folder = Path(job["folder"])
        write_samples(mine, outlines, folder / "together", 1, layout)
        parts = layout.gather_on_first([bytes([layout.rank])] * layout.rank)
        if layout.rank == 0:
            assert parts == [[bytes([rank])] * rank for rank in range(layout.world_size)]
            dump(groups, folder / "alone", 1)
            written = [step_file(folder / name, 1).read_bytes() for name in ("together", "alone")]
            assert written[0] == written[1]
        everything = [list(range(len(samples)))] * layout.data_parallel_size
        (folder / f"rank_{layout.rank}.json").write_text(json.dumps(sorted(found)))
        if layout.world_size == layout.data_parallel_size and groups:
            with damage(layout):
                found = [
                    refused(lambda: share_outlines(mine, layout)),
                    refused(lambda: deliver(mine, outlines, everything, layout)),
                ]
            for problem in found:
                assert (problem is not None) == (layout.rank == 1), problem
                assert problem is None or "from rank 0 arrived damaged (CRC-32)" in problem


if __name__ == "__main__":
    each_job(run)
