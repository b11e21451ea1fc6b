"""Messages of bytes between ranks: no pickle, no padding to the longest, and a CRC-32 for each message.

Every message starts with the CRC-32 of the rest (little-endian). An empty message is not sent at all.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_CRC_BYTES = 4


class DamagedMessage(RuntimeError):
    """Bytes of another rank differ from those that it sent."""


def gather_bytes(mine: bytes, device: torch.device, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Return every rank's bytes, in rank order, on every rank of the group (default: all).

    Each rank contributes its part of a sum whose other parts are zeros, so the cost depends on the bytes of
    all messages together, not on the longest one times the number of ranks.

    Raises:
        DamagedMessage: A checksum is wrong.
    """
    own = _sealed(mine)
    sizes = _sizes(len(own), device, group)
    everything = torch.zeros(max(sum(sizes), 1), dtype=torch.uint8, device=device)
    start = sum(sizes[: dist.get_rank()])
    everything[start : start + len(own)] = _tensor(own).to(device)
    dist.all_reduce(everything, group=group)
    return [_opened(part, rank) for rank, part in enumerate(_split(everything, sizes))]


def exchange_bytes(
    outgoing: Mapping[int, bytes],
    incoming: Mapping[int, int],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> dict[int, bytes]:
    """Send messages to some ranks and return those of others, without buffers for the remaining ranks.

    Args:
        outgoing: The messages, by receiving rank.
        incoming: The size of the message from each sending rank, as that rank knows it.
        device: Where the backend of the group needs its tensors.
        group: A group of all ranks (default: the first one).

    Raises:
        DamagedMessage: A checksum is wrong.
    """
    ranks = range(dist.get_world_size())
    messages = [_sealed(outgoing.get(rank, b"")) for rank in ranks]
    sizes = [incoming.get(rank, 0) for rank in ranks]
    sizes = [size + _CRC_BYTES if size else 0 for size in sizes]
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    sent = _tensor(b"".join(messages)).to(device)
    dist.all_to_all_single(received, sent, sizes, [len(message) for message in messages], group=group)
    parts = _split(received, sizes)
    return {rank: _opened(parts[rank], rank) for rank in ranks if sizes[rank]}


def gather_on_first(mine: Sequence[bytes], device: torch.device) -> list[list[bytes]]:
    """Return every rank's list of bytes, in rank order, on the first rank, and an empty list on the others.

    Raises:
        DamagedMessage: A checksum is wrong.
    """
    lengths = [len(mine), *map(len, mine)]
    message = b"".join([struct.pack(f"<{len(lengths)}Q", *lengths), *mine])
    sizes = dict(enumerate(_sizes(len(message), device)))
    is_first = dist.get_rank() == 0
    found = exchange_bytes({0: message}, sizes if is_first else {}, device)
    return [_parts(found[rank]) for rank in sizes] if is_first else []


def _parts(message: bytes) -> list[bytes]:
    (count,) = struct.unpack_from("<Q", message)
    lengths = struct.unpack_from(f"<{count}Q", message, 8)
    bounds = itertools.accumulate(lengths, initial=8 * (count + 1))
    return [message[start:end] for start, end in itertools.pairwise(bounds)]


def _sizes(own: int, device: torch.device, group: dist.ProcessGroup | None = None) -> list[int]:
    """Return every rank's number."""
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.long, device=device)
    sizes[dist.get_rank()] = own
    dist.all_reduce(sizes, group=group)
    return sizes.tolist()


def _tensor(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message or b"\0"), dtype=torch.uint8)[: len(message)]


def _split(received: Tensor, sizes: list[int]) -> list[memoryview]:
    data = received.cpu().numpy().data
    bounds = itertools.accumulate(sizes, initial=0)
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


def _sealed(message: bytes) -> bytes:
    return zlib.crc32(message).to_bytes(_CRC_BYTES, "little") + message if message else b""


def _opened(received: memoryview, sender: int) -> bytes:
    """Return the message of rank `sender` without its checksum."""
    message = bytes(received[_CRC_BYTES:])
    if _sealed(message) != received:
        raise DamagedMessage(f"{len(message)} bytes from rank {sender} arrived damaged (CRC-32)")
    return message
