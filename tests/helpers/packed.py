"""Plan and build an optimizer batch of complete samples, as one data-parallel rank does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from megatron_srpo.data.outline import outline
from megatron_srpo.data.records import Group, Sample
from megatron_srpo.distributed.context_parallel import ContextParallel
from megatron_srpo.training.batch_plan import BatchPlan, OptimizerBatch, plan_batch
from megatron_srpo.training.packing import Family, MicroBatch, PackingRules, SequenceTokens, micro_batch


def plan(
    groups: Sequence[Group], data_size: int, rules: PackingRules, aggregation: str = "token_mean"
) -> BatchPlan:
    """Return the plan of the groups' outlines."""
    return plan_batch([outline(group) for group in groups], data_size, rules, aggregation)


def pack(
    groups: Sequence[Group], rank: int, data_size: int, rules: PackingRules, aggregation: str = "token_mean"
) -> OptimizerBatch:
    """Return the batch of data-parallel rank `rank`, which only has the samples that it needs."""
    planned = plan(groups, data_size, rules, aggregation)
    samples = dict(enumerate(chain.from_iterable(groups)))
    return planned.build(rank, {key: samples[key] for key in planned.keys[rank]})


def alone(samples: Sequence[Sample]) -> list[Group]:
    """Return each sample as a group of its own."""
    return [(sample,) for sample in samples]


def row_of(
    documents: Sequence[Sequence[int]], total: int, context: ContextParallel | None = None
) -> MicroBatch:
    """Return a row of `total` tokens; each document's first token is its prompt, the others its response."""
    tokens = {n: SequenceTokens(ids[:1], ids[1:], range(len(ids) - 1)) for n, ids in enumerate(documents)}
    families = [Family((one.sequence(number),)) for number, one in tokens.items()]
    return micro_batch(families, total, tokens, context or ContextParallel())
