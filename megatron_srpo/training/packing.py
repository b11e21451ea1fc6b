"""Packing of routed samples into micro-batches, the same number on every data-parallel rank.

Every rank knows all samples and computes the complete plan, without a collective.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.algorithm.objective import TokenTerms
from megatron_srpo.data.records import Sample
from megatron_srpo.distributed.context_parallel import ContextParallel, gathered_positions


class PackedSequence(NamedTuple):
    """One sequence of a micro-batch."""

    key: int  # the sample's index in its optimizer batch
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    policy_positions: Sequence[int]  # positions in `response_ids` of the policy's tokens, the only targets

    @classmethod
    def of(cls, key: int, prompt_ids: Sequence[int], sample: Sample) -> PackedSequence:
        """Return the sequence of a sample's response after `prompt_ids` (the student's or the teacher's)."""
        positions = [position for position, is_policy in enumerate(sample.loss_mask) if is_policy]
        return cls(key, prompt_ids, sample.response_ids, positions)

    @property
    def length(self) -> int:
        """Number of input tokens: those before the last policy token, after which nothing is predicted."""
        return len(self.prompt_ids) + self.policy_positions[-1]


_Row = list[PackedSequence]


@dataclass(frozen=True)
class MicroBatch:
    """Sequences in one row of T tokens: this rank's part of it, with R policy tokens in sequence order."""

    sequences: tuple[PackedSequence, ...]
    distilled: int  # number of distilled sequences, which come first
    ids: Tensor  # [T / context-parallel size] int64
    positions: Tensor  # [T / context-parallel size] int64
    cu_seqlens: Tensor  # [sequences + 1] int32, of the complete row, including a padding sequence
    max_seqlen: int
    predicts: Tensor  # [R] int64, rows of `PolicyModel.final_hidden` that predict the targets
    targets: Tensor  # [R] int64 token ids
    shares: tuple[slice, ...]  # for each sequence, this rank's part of its policy tokens

    @property
    def target_counts(self) -> list[int]:
        """Number of this rank's policy tokens in each sequence."""
        return [share.stop - share.start for share in self.shares]

    @property
    def distilled_keys(self) -> list[int]:
        """Keys of the distilled sequences, in order."""
        return [sequence.key for sequence in self.sequences[: self.distilled]]


@dataclass(frozen=True)
class OptimizerBatch:
    """This rank's work for one optimizer step."""

    samples: tuple[Sample, ...]  # of all ranks
    micro_batches: list[MicroBatch]
    teacher_micro_batches: list[MicroBatch]
    loss_scale: tuple[float, ...]  # for each sample, 1 / (denominator of the loss)
    distilled_tokens: int  # |Ω|, over all ranks

    def terms(
        self, micro_batch: MicroBatch, weights: Tensor, old_logprobs: Tensor | None, device: torch.device
    ) -> TokenTerms:
        """Return the objective's inputs, [R] float32, given entropy `weights` [D] and `old_logprobs` [R]."""
        counts = torch.tensor(micro_batch.target_counts, dtype=torch.long)

        def per_token(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).repeat_interleave(counts).float().to(device)

        advantages: list[float] = []
        policy_weights: list[float] = []
        distillation_weights: list[float] = []
        engine_logprobs: list[float] = []
        for sequence, share in zip(micro_batch.sequences, micro_batch.shares, strict=True):
            sample, scale = self.samples[sequence.key], self.loss_scale[sequence.key]
            advantages.append(sample.routed.advantage)
            policy_weights.append(sample.routed.policy_weight * scale)
            distillation_weights.append(sample.routed.distillation_weight * scale)
            engine_logprobs.extend(sample.logprobs[share])
        distillation = per_token(distillation_weights)
        distillation[: len(weights)] *= weights
        return TokenTerms(
            advantage=per_token(advantages),
            policy_weight=per_token(policy_weights),
            distillation_weight=distillation,
            engine_logprob=torch.tensor(engine_logprobs, dtype=torch.float32, device=device),
            old_logprob=old_logprobs,
        )


class PackingRules(NamedTuple):
    """Limits and shapes of the rows."""

    token_budget: int  # tokens of a row, over all context-parallel ranks
    length_multiple: int = 1  # the tensor-parallel size with sequence parallelism
    uniform: bool = False  # all rows have the same length, as pipelines require
    count_multiple: int = 1  # divisor of the number of micro-batches, the stages of an interleaved pipeline
    context: ContextParallel = ContextParallel()


def loss_scales(samples: Sequence[Sample], aggregation: str) -> tuple[float, ...]:
    """Return the factor of each sample's token losses, 1 / denominator; 0 for a sample with branch none.

    token_mean: the denominator is the number of policy tokens of all routed samples. seq_mean: it is the
    number of routed samples times the sample's own number of policy tokens.
    """
    lengths = [sample.policy_tokens if sample.routed.branch != "none" else 0 for sample in samples]
    if aggregation == "seq_mean":
        routed = sum(length > 0 for length in lengths)
        return tuple(1.0 / (routed * length) if length else 0.0 for length in lengths)
    return tuple(1.0 / sum(lengths) if length else 0.0 for length in lengths)


def pack(
    samples: Sequence[Sample], data_rank: int, data_size: int, rules: PackingRules, aggregation: str
) -> OptimizerBatch:
    """Return the optimizer batch of data-parallel rank `data_rank` of `data_size`."""
    students: list[PackedSequence] = []
    teachers: dict[int, PackedSequence] = {}
    for key, sample in enumerate(samples):
        students.append(PackedSequence.of(key, sample.prompt.ids, sample))
        if sample.routed.distillation_weight > 0:
            assert sample.routed.teacher_ids is not None
            teachers[key] = PackedSequence.of(key, sample.routed.teacher_ids, sample)
    # The student's forward and backward cost as much as three forwards; the teacher adds one.
    costs = [3 * student.length for student in students]
    for key, teacher in teachers.items():
        costs[key] += teacher.length
    keys_of_rank = balance(costs, data_size)
    student_rows = _fill_all([[students[key] for key in keys] for keys in keys_of_rank], rules)
    distilled = [[teachers[key] for key in keys if key in teachers] for keys in keys_of_rank]
    teacher_rows = _fill_all(distilled, rules)
    return OptimizerBatch(
        samples=tuple(samples),
        micro_batches=_micro_batches(student_rows[data_rank], teachers, rules),
        teacher_micro_batches=_micro_batches(teacher_rows[data_rank], teachers, rules) if teachers else [],
        loss_scale=loss_scales(samples, aggregation),
        distilled_tokens=sum(len(teacher.policy_positions) for teacher in teachers.values()),
    )


def balance(costs: Sequence[int], bins: int) -> list[list[int]]:
    """Distribute items over bins, largest first, each to the least loaded bin (of equal ones, the first)."""
    loads: list[int] = [0] * bins
    contents: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        cheapest = loads.index(min(loads))
        loads[cheapest] += costs[item]
        contents[cheapest].append(item)
    return contents


def _fill_all(sequences_of_rank: list[_Row], rules: PackingRules) -> list[list[_Row]]:
    """Fill every rank's rows, then add empty rows until all ranks have the same number."""
    rows_of_rank = [_fill(sequences, rules.token_budget, rules.context) for sequences in sequences_of_rank]
    count = max(max(len(rows) for rows in rows_of_rank), 1)
    count = -(-count // rules.count_multiple) * rules.count_multiple
    return [rows + [[] for _ in range(count - len(rows))] for rows in rows_of_rank]


def _fill(sequences: _Row, budget: int, context: ContextParallel) -> list[_Row]:
    """Fill rows by first fit, longest first. A sequence longer than the budget gets its own row."""
    rows: list[_Row] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=lambda sequence: (-sequence.length, sequence.key)):
        length = context.padded(sequence.length)
        for index, free in enumerate(room):
            if length <= free:
                rows[index].append(sequence)
                room[index] -= length
                break
        else:
            rows.append([sequence])
            room.append(budget - length)
    return rows


def _micro_batches(
    rows: list[_Row], teachers: dict[int, PackedSequence], rules: PackingRules
) -> list[MicroBatch]:
    """Build the rows' micro-batches, of equal length if `rules.uniform`; distilled sequences come first."""
    context = rules.context
    multiple = math.lcm(context.multiple, context.size * rules.length_multiple)
    lengths = [max(sum(context.padded(sequence.length) for sequence in row), 1) for row in rows]
    if rules.uniform:
        lengths = [max(lengths)] * len(rows)
    built: list[MicroBatch] = []
    for row, length in zip(rows, lengths, strict=True):
        ordered = sorted(row, key=lambda sequence: sequence.key not in teachers)
        distilled = sum(sequence.key in teachers for sequence in row)
        built.append(micro_batch(ordered, -(-length // multiple) * multiple, context, distilled))
    return built


def micro_batch(
    sequences: Sequence[PackedSequence],
    total: int,
    context: ContextParallel = ContextParallel(),  # noqa: B008  (immutable)
    distilled: int = 0,
) -> MicroBatch:
    """Build this rank's part of a row of `total` tokens: the sequences, if any, and a padding sequence."""
    ids: list[int] = []
    bounds = [0]
    predicts: list[int] = []
    targets: list[int] = []
    shares = tuple(context.share(len(sequence.policy_positions)) for sequence in sequences)
    for sequence, share in zip(sequences, shares, strict=True):
        first = len(ids) + len(sequence.prompt_ids) - 1  # a token is predicted from the position before it
        for position in sequence.policy_positions[share]:
            predicts.append(first + position)
            targets.append(sequence.response_ids[position])
        ids.extend([*sequence.prompt_ids, *sequence.response_ids][: sequence.length])
        ids.extend([0] * (context.padded(sequence.length) - sequence.length))  # hidden by the causal mask
        bounds.append(len(ids))
    if len(ids) < total:
        bounds.append(total)
        ids.extend([0] * (total - len(ids)))
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    row_ids, predicting = torch.tensor(ids), torch.tensor(predicts, dtype=torch.long)
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    if context.size > 1:
        gathered = gathered_positions(cu_seqlens, context.size)
        local = context.local_tokens(gathered)
        row_ids, positions, predicting = row_ids[local], positions[local], gathered[predicting]
    return MicroBatch(
        sequences=tuple(sequences),
        distilled=distilled,
        ids=row_ids,
        positions=positions,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        predicts=predicting,
        targets=torch.tensor(targets, dtype=torch.long),
        shares=shares,
    )
