"""Attention in a packed row: which tokens see which, as few batches of scaled dot products.

A row is a sequence of documents. A document may continue another one, its prefix, which several documents
share: a group's prompt is computed once, and each response sees the prompt and its own earlier tokens. This
is exact, because causal attention never lets a prompt see a response.

The batches are made once for each row, not once for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_srpo.distributed.context_parallel import ContextParallel

_MAX_PADDING = 1.5  # rows of a batch, padding included, for each row that is needed


class Unit(NamedTuple):
    """Consecutive queries and the keys that they see: the last query sees the last key, each one less before.

    All queries see the complete prefix.
    """

    queries: range  # this rank's rows
    keys: range  # rows of the complete row
    prefix: range  # rows of the complete row; may be empty

    @property
    def offset(self) -> int:
        """Number of keys before the first query's own."""
        return len(self.keys) - len(self.queries)


class Documents(NamedTuple):
    """The documents of a packed row, in tokens of the complete row.

    Attributes:
        bounds: The start of each document, and the end of the last.
        prefixes: For each document the number of the document that it continues, or -1. A prefix is padded
            to no length, and continues no other document itself.
    """

    bounds: tuple[int, ...]
    prefixes: tuple[int, ...]

    def range(self, number: int) -> range:
        """Return the rows of a document; of none for -1."""
        return range(0) if number < 0 else range(self.bounds[number], self.bounds[number + 1])

    def units(self, context: ContextParallel) -> list[Unit]:
        """Return this rank's queries: complete documents, or two chunks of each with context parallelism."""
        units: list[Unit] = []
        done = 0  # this rank's rows
        for number, prefix in enumerate(self.prefixes):
            own, prefix_rows = self.range(number), self.range(prefix)
            if context.size == 1:
                units.append(Unit(own, own, prefix_rows))
                continue
            chunk = len(own) // (2 * context.size)
            for part in (context.rank, 2 * context.size - 1 - context.rank):
                queries, keys = range(done, done + chunk), own[: (part + 1) * chunk]
                units.append(Unit(queries, keys, prefix_rows))
                done += chunk
        return units


class _Bundle(NamedTuple):
    """Units of similar length that share a prefix, or one unit without a prefix."""

    units: list[Unit]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Prefix length, longest keys, longest queries, number of units."""
        keys, queries = (max(len(unit[place]) for unit in self.units) for place in (1, 0))
        return len(self.units[0].prefix), keys, queries, len(self.units)

    @property
    def rows(self) -> int:
        """Rows of queries, keys and prefix that are needed."""
        return len(self.units[0].prefix) + sum(len(unit.queries) + len(unit.keys) for unit in self.units)

    @property
    def offsets(self) -> set[int]:
        """The offsets of its units."""
        return {unit.offset for unit in self.units}


def _bundles(units: Sequence[Unit], masked: bool) -> list[_Bundle]:
    """Bundle the units of each prefix; the longest keys of a bundle are at most 1.5 times the shortest."""
    by_prefix: dict[tuple[range, int], list[Unit]] = {}
    bundles: list[_Bundle] = []
    for unit in units:
        if unit.prefix:
            by_prefix.setdefault((unit.prefix, 0 if masked else unit.offset), []).append(unit)
        else:
            bundles.append(_Bundle([unit]))
    for family in by_prefix.values():
        ordered = sorted(family, key=lambda unit: (-len(unit.keys), unit.queries.start))
        start = 0
        for end in range(1, len(ordered) + 1):
            if end == len(ordered) or _MAX_PADDING * len(ordered[end].keys) < len(ordered[start].keys):
                bundles.append(_Bundle(ordered[start:end]))
                start = end
    return bundles


def _batches(bundles: Sequence[_Bundle], masked: bool) -> Iterator[list[_Bundle]]:
    """Group bundles of similar shape; without masks, those of equal prefix length and one equal offset."""
    batch: list[_Bundle] = []
    most, rows = (0, 0, 0, 0), 0
    for bundle in sorted(bundles, key=lambda bundle: bundle.shape, reverse=True):
        wider = tuple(map(max, most, bundle.shape))
        prefix, keys, queries, count = wider
        padded = (len(batch) + 1) * (prefix + count * (keys + queries))
        fits = padded <= _MAX_PADDING * (rows + bundle.rows)
        if batch and not masked:
            same = bundle.shape[0] == most[0] and len(batch[0].offsets | bundle.offsets) == 1
            fits = fits and same
        if batch and not fits:
            yield batch
            batch, wider, rows = [], bundle.shape, 0
        batch.append(bundle)
        most, rows = wider, rows + bundle.rows
    if batch:
        yield batch


class Placement(NamedTuple):
    """Rows of a tensor [t, …], and their places in a padded tensor [count · length, …]."""

    count: int
    length: int
    rows: slice | Tensor
    places: Tensor | None  # None: the rows fill it in order

    @classmethod
    def of(cls, ranges: Sequence[range], count: int, length: int, device: torch.device) -> Placement:
        """Place each range, or an empty one, at the start of `length` rows of its own."""
        rows = torch.cat([torch.arange(own.start, own.stop) for own in ranges])
        places = torch.cat([n * length + torch.arange(len(own)) for n, own in enumerate(ranges)])
        first = int(rows[0]) if len(rows) else 0
        in_order = torch.equal(rows, torch.arange(first, first + len(rows)))
        is_full = len(places) == count * length
        return cls(
            count,
            length,
            slice(first, first + len(rows)) if in_order else rows.to(device),
            None if is_full else places.to(device),
        )

    def pad(self, tensor: Tensor) -> Tensor:
        """Return the rows of `tensor` at their places in zeros, [count, length, …]."""
        rows = self.rows
        picked = tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)
        if self.places is not None:
            zeros = tensor.new_zeros(self.count * self.length, *tensor.shape[1:])
            picked = zeros.index_put((self.places,), picked)  # unlike index_copy, autograd keeps no rows
        return picked.unflatten(0, (self.count, self.length))

    def unpad(self, padded: Tensor) -> Tensor:
        """Return what is at the rows' places of [count, length, …], in the order of the rows."""
        flat = padded.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


class AttentionBatch(NamedTuple):
    """One call of the attention: B bundles of N units, padded to Q queries, K own keys and P prefix keys."""

    queries: Placement  # of this rank's rows in [B · N, Q]
    keys: Placement  # of rows of the complete row in [B · N, K]
    prefixes: Placement | None  # of rows of the complete row in [B, P]; None without
    mask: Any  # None: causal, without a prefix; else a bias [B · N or 1, 1, Q, P + K], or torch's CausalBias


def attention_batches(
    documents: Documents, context: ContextParallel, device: torch.device, dtype: torch.dtype
) -> list[AttentionBatch]:
    """Return the attention of a row as batches; on CUDA only such that need no mask in memory."""
    masked = device.type == "cpu"
    found = _batches(_bundles(documents.units(context), masked), masked)
    return [_attention_batch(batch, device, dtype) for batch in found]


def _attention_batch(batch: list[_Bundle], device: torch.device, dtype: torch.dtype) -> AttentionBatch:
    prefix, keys, queries, count = map(max, zip(*(bundle.shape for bundle in batch), strict=True))
    units: list[Unit] = []
    for bundle in batch:
        missing = count - len(bundle.units)
        units += [*bundle.units, *[Unit(range(0), range(0), range(0))] * missing]
    prefixes = [bundle.units[0].prefix for bundle in batch]
    return AttentionBatch(
        Placement.of([unit.queries for unit in units], len(units), queries, device),
        Placement.of([unit.keys for unit in units], len(units), keys, device),
        Placement.of(prefixes, len(batch), prefix, device) if prefix else None,
        _mask(batch, (len(batch), count, queries, keys, prefix), device, dtype),
    )


def _mask(
    batch: list[_Bundle], shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype
) -> Any:
    """Return the mask of a batch. Padded keys come after all keys that a query of theirs may see."""
    size, count, queries, keys, prefix = shape
    lengths = [len(bundle.units[0].prefix) for bundle in batch]
    offsets = set().union(*(bundle.offsets for bundle in batch))
    uniform = len(offsets) == 1 and len(set(lengths)) == 1
    if uniform and prefix + keys == queries:
        return None
    if uniform and device.type != "cpu":
        from torch.nn.attention.bias import causal_lower_right  # imports torch._dynamo

        return causal_lower_right(queries, prefix + keys)
    offset = torch.zeros(size, count, dtype=torch.long)
    for number, bundle in enumerate(batch):
        offset[number, : len(bundle.units)] = torch.tensor([unit.offset for unit in bundle.units])
    if uniform:
        offset = offset[:1, :1]
    last = offset[..., None] + torch.arange(queries)  # own key of each query
    own = torch.arange(keys) <= last[..., None]
    seen = torch.arange(prefix) < torch.tensor(lengths)[: len(own), None]
    seen = seen[:, None, None, :].expand(*own.shape[:3], prefix)
    visible = torch.cat([seen, own], dim=-1).flatten(0, 1)[:, None]
    bias = torch.zeros(visible.shape, dtype=dtype)
    return bias.masked_fill_(~visible, -torch.inf).to(device)
