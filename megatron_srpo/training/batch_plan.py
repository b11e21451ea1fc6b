"""The plan of an optimizer batch: which rank trains which samples, in which rows.

Every rank knows the outlines of all samples and computes the complete plan, without a collective. A sample
whose loss has no gradient is not trained, but counts in the denominator. A part of these samples is scored
instead, so that the log-probabilities of trainer and engine are compared on all kinds of samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from megatron_srpo.algorithm.objective import TokenTerms
from megatron_srpo.data.outline import Outline, OutlineGroup
from megatron_srpo.data.records import Sample
from megatron_srpo.training.packing import (
    Family,
    MicroBatch,
    PackedSequence,
    PackingRules,
    Row,
    SequenceTokens,
    fill_all,
    micro_batches,
)

SCORED = 8  # one of so many samples without a gradient is scored


@dataclass(frozen=True)
class OptimizerBatch:
    """This rank's work for one optimizer step."""

    samples: Mapping[int, Sample]  # by key, those of this rank's micro-batches
    micro_batches: list[MicroBatch]  # trained
    teacher_micro_batches: list[MicroBatch]
    scored_micro_batches: list[MicroBatch]  # of samples without a gradient
    loss_scale: tuple[float, ...]  # for each sample of all ranks, 1 / (denominator of the loss)
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
        for sequence in micro_batch.sequences:
            sample, scale = self.samples[sequence.key], self.loss_scale[sequence.key]
            advantages.append(sample.routed.advantage)
            policy_weights.append(sample.routed.policy_weight * scale)
            distillation_weights.append(sample.routed.distillation_weight * scale)
        distillation = per_token(distillation_weights)
        distillation[: len(weights)] *= weights
        return TokenTerms(
            advantage=per_token(advantages),
            policy_weight=per_token(policy_weights),
            distillation_weight=distillation,
            engine_logprob=self.engine_logprobs(micro_batch).to(device),
            old_logprob=old_logprobs,
        )

    def engine_logprobs(self, micro_batch: MicroBatch) -> Tensor:
        """Return the engine's log-probabilities of the targets, [R] float32."""
        pairs = zip(micro_batch.sequences, micro_batch.shares, strict=True)
        logprobs = [self.samples[sequence.key].logprobs[share] for sequence, share in pairs]
        return torch.tensor(list(chain.from_iterable(logprobs)), dtype=torch.float32)


@dataclass(frozen=True)
class BatchPlan:
    """The work of all data-parallel ranks for one optimizer step; the lists have an entry for each rank."""

    rules: PackingRules
    rows: list[list[Row]]
    teacher_rows: list[list[Row]]
    scored_rows: list[list[Row]]
    loss_scale: tuple[float, ...]  # for each sample, 1 / (denominator of the loss)
    distilled_tokens: int  # |Ω|

    @property
    def keys(self) -> list[list[int]]:
        """The samples whose tokens each rank needs, ascending."""
        pairs = zip(self.rows, self.scored_rows, strict=True)
        return [sorted(sequence.key for sequence in _sequences(own + scored)) for own, scored in pairs]

    def build(self, data_rank: int, samples: Mapping[int, Sample]) -> OptimizerBatch:
        """Build the micro-batches of a rank, given at least the samples whose `keys` it has."""
        own = {key: samples[key] for key in self.keys[data_rank]}
        students = {key: SequenceTokens.of(sample.prompt.ids, sample) for key, sample in own.items()}
        distilled = [sequence.key for sequence in _sequences(self.teacher_rows[data_rank])]
        teachers: dict[int, SequenceTokens] = {}
        for key in distilled:
            teacher_ids = own[key].routed.teacher_ids
            assert teacher_ids is not None
            teachers[key] = SequenceTokens.of(teacher_ids, own[key])
        return OptimizerBatch(
            samples=own,
            micro_batches=micro_batches(self.rows[data_rank], students, distilled, self.rules),
            teacher_micro_batches=micro_batches(
                self.teacher_rows[data_rank], teachers, distilled, self.rules
            ),
            scored_micro_batches=micro_batches(self.scored_rows[data_rank], students, (), self.rules),
            loss_scale=self.loss_scale,
            distilled_tokens=self.distilled_tokens,
        )


def _sequences(rows: Sequence[Row]) -> list[PackedSequence]:
    return [sequence for row in rows for family in row for sequence in family.sequences]


def loss_scales(outlines: Sequence[Outline], aggregation: str) -> tuple[float, ...]:
    """Return the factor of each sample's token losses, 1 / denominator; 0 for a sample with branch none.

    token_mean: the denominator is the number of policy tokens of all routed samples. seq_mean: it is the
    number of routed samples times the sample's own number of policy tokens.
    """
    lengths = [outline.policy_tokens if outline.routed.branch != "none" else 0 for outline in outlines]
    if aggregation == "seq_mean":
        routed = sum(length > 0 for length in lengths)
        return tuple(1.0 / (routed * length) if length else 0.0 for length in lengths)
    total = sum(lengths)
    return tuple(1.0 / total if length else 0.0 for length in lengths)


def plan_batch(
    groups: Sequence[OutlineGroup], data_size: int, rules: PackingRules, aggregation: str
) -> BatchPlan:
    """Return the plan of an optimizer batch of these routed groups for `data_size` data-parallel ranks."""
    return _Planner(groups, rules).plan(data_size, aggregation)


class _Planner:
    """The sequences of an optimizer batch by key, which counts the samples of all groups."""

    def __init__(self, groups: Sequence[OutlineGroup], rules: PackingRules):
        self.outlines = list(chain.from_iterable(groups))
        self.rules = rules
        keys = iter(range(len(self.outlines)))
        self.groups = [list(islice(keys, len(group))) for group in groups]

    def plan(self, data_size: int, aggregation: str) -> BatchPlan:
        """Return the plan."""
        outlines, rules = self.outlines, self.rules
        trained = [[key for key in group if outlines[key].routed.teaches] for group in self.groups]
        silent = [key for key, outline in enumerate(outlines) if not outline.routed.teaches]
        parts_of_rank = self._distribute([keys for keys in trained if keys], data_size)
        scored_of_rank = self._distribute([[key] for key in silent[::SCORED]], data_size)
        student_families = [[f for part in parts for f in self.students(part)] for parts in parts_of_rank]
        teacher_families = [[f for part in parts for f in self.teachers(part)] for parts in parts_of_rank]
        scored_families = [[f for part in parts for f in self.students(part)] for parts in scored_of_rank]
        return BatchPlan(
            rules=rules,
            rows=fill_all(student_families, rules),
            teacher_rows=fill_all(teacher_families, rules),
            scored_rows=fill_all(scored_families, rules),
            loss_scale=loss_scales(outlines, aggregation),
            distilled_tokens=sum(
                outline.policy_tokens for outline in outlines if outline.routed.distillation_weight > 0
            ),
        )

    def students(self, keys: Sequence[int]) -> list[Family]:
        """Return the families of samples of one group after its prompt."""
        if not keys:
            return []
        prompt_tokens = self.outlines[keys[0]].prompt_tokens
        return self.rules.families([self._sequence(key, prompt_tokens) for key in keys], prompt_tokens)

    def teachers(self, keys: Sequence[int]) -> list[Family]:
        """Return the families of a group's distilled samples.

        Either those who see the same demonstration form a family, or all, which share the question: whatever
        takes fewer tokens.
        """
        outlines = {key: self.outlines[key] for key in keys}
        distilled = [key for key, outline in outlines.items() if outline.routed.distillation_weight > 0]
        if not distilled:
            return []
        sequences = {key: self._sequence(key, outlines[key].teacher_tokens) for key in distilled}
        by_prompt: dict[int, list[PackedSequence]] = {}
        for key, sequence in sequences.items():
            by_prompt.setdefault(outlines[key].teacher_of, []).append(sequence)
        apart = [
            family
            for alike in by_prompt.values()
            for family in self.rules.families(alike, alike[0].prompt_tokens)
        ]
        common = outlines[distilled[0]].teacher_shared
        together = self.rules.families(list(sequences.values()), common)
        return min(apart, together, key=self._tokens)

    def _sequence(self, key: int, prompt_tokens: int) -> PackedSequence:
        return PackedSequence(key, prompt_tokens, prompt_tokens + self.outlines[key].response_inputs)

    def _distribute(self, groups: Sequence[Sequence[int]], data_size: int) -> list[list[Sequence[int]]]:
        """Distribute the groups' samples over the ranks; divide groups where that makes the slowest faster.

        The parts of a group share its prompt no longer. Of equal costs, the larger parts are chosen.
        """
        size = max((len(group) for group in groups), default=1) if self.rules.shares_prompts else 1
        best: list[list[Sequence[int]]] = []
        lowest = None
        while lowest is None or (size >= 1 and data_size > 1):
            parts = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
            costs = [self._cost(part) for part in parts]
            numbers = balance(costs, data_size)
            highest = max(sum(costs[number] for number in rank) for rank in numbers)
            if lowest is None or highest < lowest:
                lowest, best = highest, [[parts[number] for number in rank] for rank in numbers]
            size = (size + 1) // 2 if size > 1 else 0
        return best

    def _cost(self, keys: Sequence[int]) -> int:
        """Return the teacher's tokens plus three times the student's, for forward and backward."""
        return 3 * self._tokens(self.students(keys)) + self._tokens(self.teachers(keys))

    def _tokens(self, families: Sequence[Family]) -> int:
        return sum(family.length(self.rules.context) for family in families)


def balance(costs: Sequence[int], bins: int) -> list[list[int]]:
    """Distribute items over bins, largest first, each to the least loaded bin (of equal ones, the first)."""
    loads = [(0, number) for number in range(bins)]
    contents: list[list[int]] = [[] for _ in range(bins)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, cheapest = loads[0]
        heapq.heapreplace(loads, (load + costs[item], cheapest))
        contents[cheapest].append(item)
    return contents
