"""Exchange of a step's samples between ranks.

All ranks receive the outlines, a sample's tokens go to the ranks that train it, and rank 0 writes the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

from megatron_srpo.data.outline import OutlineGroup, outline
from megatron_srpo.data.outline_bytes import decode_outlines, encode_outlines
from megatron_srpo.data.records import Group, Sample
from megatron_srpo.data.rollout_file import EncodedSample, encode_sample, write_step
from megatron_srpo.data.token_bytes import decode_tokens, encode_tokens, message_bytes
from megatron_srpo.distributed.layout import Layout

_T = TypeVar("_T")


def share_outlines(groups: Sequence[Group], layout: Layout) -> list[OutlineGroup]:
    """Return the outlines of all ranks' routed groups on every rank, in prompt order. A collective.

    Rank r holds every world_size-th group of the step, from the r-th.
    """
    own = [outline(group) for group in groups]
    if layout.world_size == 1:
        return own
    return in_prompt_order([decode_outlines(part) for part in layout.gather_bytes(encode_outlines(own))])


def in_prompt_order(shares: Sequence[Sequence[_T]]) -> list[_T]:
    """Merge the ranks' shares of a step: the first of each rank, then the second of each, and so on."""
    longest = max(map(len, shares), default=0)
    return [share[place] for place in range(longest) for share in shares if place < len(share)]


def deliver(
    groups: Sequence[Group],
    outlines: Sequence[OutlineGroup],
    wanted: Sequence[Sequence[int]],
    layout: Layout,
) -> dict[int, Sample]:
    """Send the tokens of this rank's samples to the ranks that train them. A collective.

    Every rank knows all sizes from the outlines, so ranks exchange nothing but tokens.

    Args:
        groups: This rank's groups: every world_size-th of the step.
        outlines: The outlines of all groups of the step, see `share_outlines`.
        wanted: For each data-parallel rank, the numbers in the step of the samples that it trains.
        layout: This rank's place among the others.

    Returns:
        The samples that this rank trains, by number.

    Raises:
        DamagedMessage: A checksum is wrong.
    """
    flat = list(chain.from_iterable(outlines))
    owners = [place % layout.world_size for place, group in enumerate(outlines) for _ in group]
    mine = [number for number, owner in enumerate(owners) if owner == layout.rank]
    own = dict(zip(mine, chain.from_iterable(groups), strict=True))
    outgoing: dict[int, bytes] = {}
    for data_rank, numbers in enumerate(wanted):
        sent = [number for number in numbers if number in own]
        peers = [peer for peer in layout.replica_ranks(data_rank) if peer != layout.rank] if sent else []
        if peers:
            message = encode_tokens([own[number] for number in sent], [flat[number] for number in sent])
            outgoing |= dict.fromkeys(peers, message)
    expected: dict[int, list[int]] = {}
    for number in wanted[layout.data_parallel_rank]:
        if number not in own:
            expected.setdefault(owners[number], []).append(number)
    sizes = {owner: message_bytes([flat[number] for number in sent]) for owner, sent in expected.items()}
    received = layout.exchange_bytes(outgoing, sizes)
    samples = {number: own[number] for number in wanted[layout.data_parallel_rank] if number in own}
    for owner, numbers in expected.items():
        found = decode_tokens(received[owner], [flat[number] for number in numbers])
        samples |= dict(zip(numbers, found, strict=True))
    return samples


def write_samples(
    groups: Sequence[Group], outlines: Sequence[OutlineGroup], folder: Path, step: int, layout: Layout
) -> None:
    """Write all ranks' samples of `step` to `folder` on rank 0, encoded by their own ranks. A collective.

    groups: This rank's; outlines: all ranks', in prompt order.
    """
    encoded = [part for sample in chain.from_iterable(groups) for part in encode_sample(sample)]
    shares = [iter(share) for share in layout.gather_on_first(encoded)]
    if layout.rank > 0:
        return
    samples: list[EncodedSample] = []
    for place, group in enumerate(outlines):
        share = shares[place % layout.world_size]
        samples += [EncodedSample(next(share), next(share)) for _ in group]
    write_step(folder, step, samples)
