"""From routed samples to packed micro-batches, the same number on every data-parallel rank.

Every rank knows every sample (rollouts are exchanged before), so every rank computes the whole plan and no
collective is
needed: which samples a rank trains, how its micro-batches are filled, and the one denominator of the loss.
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
from megatron_srpo.distributed.context_parallel import ALONE, Context, places


class Document(NamedTuple):
    """One sequence of a packed micro-batch. `key` is the sample's place in its optimizer batch."""

    key: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Input tokens: the last response token predicts nothing that is trained, so it is not fed."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(frozen=True)
class MicroBatch:
    """Documents in one row of T tokens, a part of which is this rank's; its R response tokens in document
    order.

    ids, positions: [T / context-parallel size] long. cu_seqlens: [documents + 1] int32, of the whole row, a
    padding document included.
    predicts: [R] where the hidden state that predicts `targets` [R] is found, with the context-parallel
    ranks' parts one after another.
    shares: of each document, which of its response tokens are this rank's.
    """

    documents: tuple[Document, ...]
    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    predicts: Tensor
    targets: Tensor
    shares: tuple[slice, ...]

    @property
    def response_lengths(self) -> list[int]:
        """This rank's response tokens of each document."""
        return [share.stop - share.start for share in self.shares]


@dataclass(frozen=True)
class OptimizerBatch:
    """What this rank does for one optimizer step.

    `samples` are all ranks' samples; the micro-batches are this rank's.
    """

    samples: tuple[Sample, ...]
    micro_batches: list[MicroBatch]
    teacher_micro_batches: list[MicroBatch]
    loss_scale: tuple[float, ...]  # per sample: what one of its tokens' terms is multiplied by
    distilled_tokens: int  # |Ω|, over all ranks

    def terms(self, micro_batch: MicroBatch, device: torch.device) -> TokenTerms:
        """The objective's per-token inputs for `micro_batch`, [R] fp32; entropy weights not yet applied."""
        keys = [document.key for document in micro_batch.documents]
        lengths = torch.tensor(micro_batch.response_lengths, dtype=torch.long)

        def per_token(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).repeat_interleave(lengths).float().to(device)

        routes = [self.samples[key].route for key in keys]
        scales = [self.loss_scale[key] for key in keys]
        own = (self.samples[key].logprobs[share] for key, share in zip(keys, micro_batch.shares, strict=True))
        engine = list(itertools.chain.from_iterable(own))
        return TokenTerms(
            advantage=per_token([route.advantage for route in routes]),
            policy_weight=per_token(
                [route.policy_weight * scale for route, scale in zip(routes, scales, strict=True)]
            ),
            distillation_weight=per_token(
                [route.distillation_weight * scale for route, scale in zip(routes, scales, strict=True)]
            ),
            engine_logprob=torch.tensor(engine, dtype=torch.float32, device=device),
            old_logprob=None,
        )

    def distilled_count(self, micro_batch: MicroBatch) -> int:
        """Documents of `micro_batch` that are distilled; they come first."""
        return sum(
            self.samples[document.key].route.distillation_weight > 0 for document in micro_batch.documents
        )


class PackingRules(NamedTuple):
    """How rows are filled. length_multiple: tensor-parallel size under sequence parallelism. uniform:
    pipelines send one shape. count_multiple: interleaved pipelines want micro-batches in multiples of their
    stages. context: who shares the rows.
    """

    token_budget: int
    length_multiple: int = 1
    uniform: bool = False
    count_multiple: int = 1
    context: Context = ALONE


def loss_scales(samples: Sequence[Sample], aggregation: str) -> tuple[float, ...]:
    """1 / (the loss's one denominator) for every sample.

    token_mean: 1 / (valid response tokens of all routed samples). seq_mean: 1 / (routed samples · own
    length). A sample routed nowhere counts neither way.
    """
    routed = [sample.route.branch != "none" for sample in samples]
    lengths = [len(sample.response_ids) for sample in samples]
    if aggregation == "seq_mean":
        return tuple(
            1.0 / (sum(routed) * length) if is_routed else 0.0
            for is_routed, length in zip(routed, lengths, strict=True)
        )
    tokens = sum(length for is_routed, length in zip(routed, lengths, strict=True) if is_routed)
    return tuple(1.0 / tokens if is_routed else 0.0 for is_routed in routed)


def pack(
    samples: Sequence[Sample], data_rank: int, data_size: int, rules: PackingRules, aggregation: str
) -> OptimizerBatch:
    """The optimizer batch of data-parallel rank `data_rank` of `data_size`."""
    students = [Document(key, sample.prompt.ids, sample.response_ids) for key, sample in enumerate(samples)]
    teachers = {
        key: Document(key, sample.route.teacher_ids, sample.response_ids)
        for key, sample in enumerate(samples)
        if sample.route.distillation_weight > 0
    }
    # Forward and backward of the student cost three forwards; the teacher adds one.
    costs = [
        3 * student.length + (teachers[key].length if key in teachers else 0)
        for key, student in enumerate(students)
    ]
    keys_of_rank = balance(costs, data_size)
    student_rows = _fill_all([[students[key] for key in keys] for keys in keys_of_rank], rules)
    teacher_rows = _fill_all(
        [[teachers[key] for key in keys if key in teachers] for keys in keys_of_rank], rules
    )
    distilled_first = [
        sorted(row, key=lambda document: document.key not in teachers) for row in student_rows[data_rank]
    ]
    return OptimizerBatch(
        samples=tuple(samples),
        micro_batches=_rows_to_micro_batches(distilled_first, rules),
        teacher_micro_batches=_rows_to_micro_batches(teacher_rows[data_rank], rules) if teachers else [],
        loss_scale=loss_scales(samples, aggregation),
        distilled_tokens=sum(len(document.response_ids) for document in teachers.values()),
    )


def balance(costs: Sequence[int], bins: int) -> list[list[int]]:
    """Items to bins, the dearest first and each to the cheapest bin so far; ties to the lowest bin."""
    loads, contents = [0] * bins, [[] for _ in range(bins)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        cheapest = loads.index(min(loads))
        loads[cheapest] += costs[item]
        contents[cheapest].append(item)
    return contents


def _fill_all(documents_of_rank: list[list[Document]], rules: PackingRules) -> list[list[list[Document]]]:
    """Rows of at most the token budget for every rank, then empty rows until all ranks have the same number."""
    rows_of_rank = [_fill(documents, rules.token_budget, rules.context) for documents in documents_of_rank]
    count = max(max(len(rows) for rows in rows_of_rank), 1)
    count = -(-count // rules.count_multiple) * rules.count_multiple
    return [rows + [[] for _ in range(count - len(rows))] for rows in rows_of_rank]


def _fill(documents: list[Document], budget: int, context: Context) -> list[list[Document]]:
    """First fit, longest first. A document longer than the budget gets a row of its own."""
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in sorted(documents, key=lambda document: (-document.length, document.key)):
        length = context.padded(document.length)
        for index, free in enumerate(room):
            if length <= free:
                rows[index].append(document)
                room[index] -= length
                break
        else:
            rows.append([document])
            room.append(budget - length)
    return rows


def _rows_to_micro_batches(rows: list[list[Document]], rules: PackingRules) -> list[MicroBatch]:
    context = rules.context
    multiple = math.lcm(context.multiple, context.size * rules.length_multiple)
    lengths = [max(sum(context.padded(document.length) for document in row), 1) for row in rows]
    if rules.uniform:
        lengths = [max(lengths)] * len(rows)
    return [
        micro_batch(row, -(-length // multiple) * multiple, context)
        for row, length in zip(rows, lengths, strict=True)
    ]


def micro_batch(documents: list[Document], total: int, context: Context = ALONE) -> MicroBatch:
    """The rank's part of one row of `total` tokens that holds the documents, and a padding document.
    Documents may be none.

    `total` is a multiple of the context's.
    """
    ids: list[int] = []
    bounds, predicts, targets = [0], [], []
    shares = tuple(context.share(len(document.response_ids)) for document in documents)
    for document, share in zip(documents, shares, strict=True):
        sequence = (*document.prompt_ids, *document.response_ids)[: document.length]
        first = (
            len(ids) + len(document.prompt_ids) - 1
        )  # the last prompt token predicts the first response token
        predicts.extend(range(first + share.start, first + share.stop))
        targets.extend(document.response_ids[share])
        ids.extend(sequence)
        ids.extend(
            [0] * (context.padded(document.length) - document.length)
        )  # at the end, where causality hides it
        bounds.append(len(ids))
    if len(ids) < total:  # padding is one more document, with nothing to predict
        bounds.append(total)
        ids.extend([0] * (total - len(ids)))
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    row = torch.tensor(ids), torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens, predicting = torch.tensor(bounds, dtype=torch.int32), torch.tensor(predicts, dtype=torch.long)
    if context.size > 1:
        place = places(cu_seqlens, context.size)
        held = context.held(place)
        row, predicting = tuple(values[held] for values in row), place[predicting]
    return MicroBatch(
        documents=tuple(documents),
        ids=row[0],
        positions=row[1],
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        predicts=predicting,
        targets=torch.tensor(targets, dtype=torch.long),
        shares=shares,
    )
