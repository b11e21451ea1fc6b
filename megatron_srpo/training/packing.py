"""Packing of sequences into rows, and the tensors of a row on one rank.

Sequences with the same prompt form a family, whose prompt is computed once. Rows are planned from lengths
alone; only `micro_batch` needs tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.data.records import Sample
from megatron_srpo.distributed.context_parallel import ContextParallel, gathered_positions
from megatron_srpo.model.packed_row import Documents

# A prompt is shared if that saves this part of a family's tokens: with long responses it would cost more to
# mask attention than it saves.
_WORTH_SHARING = 1 / 8


class PackedSequence(NamedTuple):
    """One sequence of a row, without its tokens."""

    key: int  # the sample's number in its optimizer batch
    prompt_tokens: int
    length: int  # number of input tokens: those before the last policy token


class Family(NamedTuple):
    """Sequences of one row with the same prompt, whose first `shared` tokens are computed once."""

    sequences: tuple[PackedSequence, ...]
    shared: int = 0  # a multiple of `ContextParallel.multiple`, less than the prompt's tokens

    def length(self, context: ContextParallel) -> int:
        """Return the number of tokens in the row, each document padded."""
        own = sum(context.padded(sequence.length - self.shared) for sequence in self.sequences)
        return self.shared + own


Row = list[Family]


class PackingRules(NamedTuple):
    """Limits and shapes of the rows."""

    token_budget: int  # tokens of a row, over all context-parallel ranks
    length_multiple: int = 1  # the tensor-parallel size with sequence parallelism
    uniform: bool = False  # all rows have the same length, as pipelines require
    count_multiple: int = 1  # divisor of the number of micro-batches, the stages of an interleaved pipeline
    context: ContextParallel = ContextParallel()
    shares_prompts: bool = True  # the layers can compute a prompt once for several responses

    def families(self, sequences: Sequence[PackedSequence]) -> list[Family]:
        """Return the families of sequences that have the same prompt: one, if that saves enough tokens."""
        if not sequences or not self.shares_prompts:
            return [Family((sequence,)) for sequence in sequences]
        multiple = self.context.multiple
        # The last token of the prompt stays in each response's document: it predicts the first policy token.
        shared = (sequences[0].prompt_tokens - 1) // multiple * multiple
        saved, all_tokens = shared * (len(sequences) - 1), sum(sequence.length for sequence in sequences)
        if saved < max(_WORTH_SHARING * all_tokens, 1):
            return [Family((sequence,)) for sequence in sequences]
        return [Family(tuple(sequences), shared)]


def fill_all(families_of_rank: Sequence[Iterable[Family]], rules: PackingRules) -> list[list[Row]]:
    """Fill every rank's rows, then add empty rows until all ranks have the same number."""
    rows_of_rank = [_fill(families, rules) for families in families_of_rank]
    count = max(len(rows) for rows in rows_of_rank)
    count = -(-count // rules.count_multiple) * rules.count_multiple
    return [rows + [[] for _ in range(count - len(rows))] for rows in rows_of_rank]


def _fill(families: Iterable[Family], rules: PackingRules) -> list[Row]:
    """Fill rows by first fit, longest first. A sequence longer than the budget gets its own row."""
    rows: list[Row] = []
    room: list[int] = []
    pieces = [piece for family in families for piece in _pieces(family, rules)]
    sized = [(piece.length(rules.context), piece) for piece in pieces]
    for length, piece in sorted(sized, key=lambda pair: (-pair[0], pair[1].sequences[0].key)):
        for index, free in enumerate(room):
            if length <= free:
                rows[index].append(piece)
                room[index] -= length
                break
        else:
            rows.append([piece])
            room.append(rules.token_budget - length)
    return rows


def _pieces(family: Family, rules: PackingRules) -> list[Family]:
    """Divide a family into parts that fit into the budget, if a single sequence does."""
    if len(family.sequences) == 1 or family.length(rules.context) <= rules.token_budget:
        return [family]
    pieces: list[Family] = []
    part: list[PackedSequence] = []
    for sequence in sorted(family.sequences, key=lambda sequence: (-sequence.length, sequence.key)):
        longer = Family((*part, sequence), family.shared)
        if part and longer.length(rules.context) > rules.token_budget:
            pieces += rules.families(part)
            part = []
        part.append(sequence)
    return pieces + rules.families(part)


class SequenceTokens(NamedTuple):
    """The tokens of a sequence."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    policy_positions: Sequence[int]  # positions in `response_ids` of the policy's tokens, the only targets

    @classmethod
    def of(cls, prompt_ids: Sequence[int], sample: Sample) -> SequenceTokens:
        """Return a sample's response after `prompt_ids` (the student's or the teacher's)."""
        positions = [position for position, is_policy in enumerate(sample.loss_mask) if is_policy]
        return cls(prompt_ids, sample.response_ids, positions)

    def sequence(self, key: int) -> PackedSequence:
        """Return the sequence's lengths."""
        prompt_tokens = len(self.prompt_ids)
        return PackedSequence(key, prompt_tokens, prompt_tokens + self.policy_positions[-1])


@dataclass(frozen=True)
class MicroBatch:
    """Sequences in one row of T tokens: this rank's part of it, with R policy tokens in sequence order."""

    sequences: tuple[PackedSequence, ...]
    distilled: int  # number of distilled sequences, which come first
    ids: Tensor  # [T / context-parallel size] int64
    positions: Tensor  # [T / context-parallel size] int64, of the tokens in their sequences
    documents: Documents  # of the complete row, including a document of padding
    predicts: Tensor  # [R] int64, rows of `PolicyModel.final_hidden` that predict the targets
    targets: Tensor  # [R] int64 token ids
    shares: tuple[slice, ...]  # for each sequence, this rank's part of its policy tokens

    @property
    def total(self) -> int:
        """T, the tokens of the complete row."""
        return self.documents.bounds[-1]

    @property
    def target_counts(self) -> list[int]:
        """Number of this rank's policy tokens in each sequence."""
        return [share.stop - share.start for share in self.shares]

    @property
    def distilled_keys(self) -> list[int]:
        """Keys of the distilled sequences, in order."""
        return [sequence.key for sequence in self.sequences[: self.distilled]]


def micro_batches(
    rows: Sequence[Row], tokens: Mapping[int, SequenceTokens], distilled: Iterable[int], rules: PackingRules
) -> list[MicroBatch]:
    """Build the rows' micro-batches, of equal length if `rules.uniform`.

    Args:
        rows: The rows of this rank.
        tokens: The sequences' tokens by key.
        distilled: Keys of the samples that have a teacher.
        rules: The limits and shapes.
    """
    context, keys = rules.context, set(distilled)
    multiple = math.lcm(context.multiple, context.size * rules.length_multiple)
    lengths = [max(sum(family.length(context) for family in row), 1) for row in rows]
    if rules.uniform and rows:
        lengths = [max(lengths)] * len(rows)
    totals = [-(-length // multiple) * multiple for length in lengths]
    return [micro_batch(*pair, tokens, context, keys) for pair in zip(rows, totals, strict=True)]


def micro_batch(
    families: Sequence[Family],
    total: int,
    tokens: Mapping[int, SequenceTokens],
    context: ContextParallel = ContextParallel(),  # noqa: B008  (immutable)
    distilled: Iterable[int] = (),
) -> MicroBatch:
    """Build this rank's part of a row of `total` tokens: the families, if any, and padding at the end."""
    row = _RowBuilder(context)
    for family in families:
        row.add(family, tokens)
    if len(row.ids) < total:
        row.add_document([0] * (total - len(row.ids)), 0, -1)
    keys = set(distilled)
    first_of = dict(sorted(row.first_of.items(), key=lambda item: item[0].key not in keys))
    shares = tuple(context.share(len(tokens[one.key].policy_positions)) for one in first_of)
    predicts: list[int] = []
    targets: list[int] = []
    for (sequence, first), share in zip(first_of.items(), shares, strict=True):
        own = tokens[sequence.key]
        for position in own.policy_positions[share]:
            predicts.append(first + position)
            targets.append(own.response_ids[position])
    ids, positions = torch.tensor(row.ids), torch.tensor(row.positions)
    predicting = torch.tensor(predicts, dtype=torch.long)
    if context.size > 1:
        gathered = gathered_positions(torch.tensor(row.bounds), context.size)
        local = context.local_tokens(gathered)
        ids, positions, predicting = ids[local], positions[local], gathered[predicting]
    return MicroBatch(
        sequences=tuple(first_of),
        distilled=sum(sequence.key in keys for sequence in first_of),
        ids=ids,
        positions=positions,
        documents=Documents(tuple(row.bounds), tuple(row.prefixes)),
        predicts=predicting,
        targets=torch.tensor(targets, dtype=torch.long),
        shares=shares,
    )


class _RowBuilder:
    """The documents of a row so far."""

    def __init__(self, context: ContextParallel):
        self.context = context
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.bounds = [0]
        self.prefixes: list[int] = []
        self.first_of: dict[
            PackedSequence, int
        ] = {}  # the row's token that predicts the first of the response

    def add(self, family: Family, tokens: Mapping[int, SequenceTokens]) -> None:
        """Append the documents of a family: the shared tokens, and each sequence without them."""
        shared, prefix = family.shared, -1
        shared_ids = [*tokens[family.sequences[0].key].prompt_ids[:shared]]
        if shared:
            prefix = len(self.prefixes)
            self.add_document(shared_ids, 0, -1)
        for sequence in family.sequences:
            own = tokens[sequence.key]
            assert [*own.prompt_ids[:shared]] == shared_ids
            self.first_of[sequence] = len(self.ids) + sequence.prompt_tokens - 1 - shared
            self.add_document([*own.prompt_ids, *own.response_ids][shared : sequence.length], shared, prefix)

    def add_document(self, ids: Sequence[int], first_position: int, prefix: int) -> None:
        """Append a document and its padding, which the causal mask hides."""
        length = self.context.padded(len(ids))
        self.ids += [*ids, *[0] * (length - len(ids))]
        self.positions += range(first_position, first_position + length)
        self.bounds.append(len(self.ids))
        self.prefixes.append(prefix)
