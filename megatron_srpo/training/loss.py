"""The routed loss of an optimizer batch, micro-batch by micro-batch on the last pipeline stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.algorithm.objective import TokenTerms, entropy_weights, routed_objective
from megatron_srpo.algorithm.settings import Algorithm
from megatron_srpo.data import histogram
from megatron_srpo.data.update_report import TokenSums
from megatron_srpo.distributed.megatron import DistributedDataParallel
from megatron_srpo.model.build import PolicyModel
from megatron_srpo.training.batch_plan import OptimizerBatch
from megatron_srpo.training.optimizer import gradient_is_ready
from megatron_srpo.training.teacher import TeacherScores
from megatron_srpo.training.token_values import TokenValues
from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.fused import Statistics, fused_objective
from megatron_srpo.vocab_parallel.logits import Projection, Rows


class LossSettings(NamedTuple):
    """Settings of the loss, the same in every step."""

    algorithm: Algorithm
    divergence: Divergence
    temperature: float
    logits_memory: int | None  # bytes of the tiles of logits; None: the device's default


class TokenTotals:
    """This rank's token sums of an optimizer batch so far."""

    def __init__(self, device: torch.device, importance_cap: float | None):
        self.sums = TokenSums.zeros(device)  # a vector
        self.gap_max = torch.zeros((), device=device)  # largest |log π_old - log π_roll|, in nats
        self._cap = importance_cap

    def add(self, old_logprob: Tensor, engine_logprob: Tensor, entropy: Tensor, **others: Tensor) -> None:
        """Add policy tokens, [R] each; `others` are values of other fields of `TokenSums`."""
        gap = old_logprob - engine_logprob
        importance = gap.exp()
        capped = importance if self._cap is None else importance.clamp(max=self._cap)
        values = others | {
            "tokens": torch.ones_like(gap),
            "entropy": entropy,
            "gap": gap.abs(),
            "clipped": importance > capped,
            "importance": capped,
        }
        added = TokenSums.from_vector(TokenSums.zeros(gap.device))._asdict()
        added |= {name: value.double().sum() for name, value in values.items()}
        self.sums += TokenSums(**added).vector
        if len(gap):
            torch.maximum(self.gap_max, gap.abs().max().float(), out=self.gap_max)

    def count_entropies(self, teacher_entropy: Tensor) -> None:
        """Add the teacher's entropies of distilled tokens to the histogram."""
        self.sums[-histogram.BINS :] += histogram.counts(teacher_entropy)


@dataclass(eq=False)
class RoutedLoss:
    """The loss of an optimizer batch: call it with each micro-batch's hidden states."""

    settings: LossSettings
    batch: OptimizerBatch
    scores: TeacherScores
    mean_entropy_weight: Tensor
    old_logprobs: Mapping[int, Tensor] | None  # log π_old [R] by micro-batch; None: the policy's own
    last_chunk: DistributedDataParallel
    token_values: TokenValues | None
    totals: TokenTotals

    def __call__(self, number: int, hidden: Tensor, model: PolicyModel) -> Tensor:
        """Return micro-batch `number`'s part of the batch's loss, from `hidden` [R, H].

        The gradient of the output matrix is added to its `main_grad`, that of `hidden` returned to autograd.
        """
        settings, micro_batch = self.settings, self.batch.micro_batches[number]
        algorithm, device = settings.algorithm, hidden.device
        keys = micro_batch.distilled_keys
        teacher_entropy, teacher = torch.empty(0, device=device), None
        if keys:
            # Student and teacher must have scored the same tokens, although their prompts differ in length.
            counts = [len(self.scores.entropy[key]) for key in keys]
            assert counts == micro_batch.target_counts[: len(keys)]
            teacher_entropy = torch.cat([self.scores.entropy[key] for key in keys])
            teacher = self.scores.logits(keys)
        beta, cap = algorithm.entropy_beta, algorithm.entropy_weight_cap
        weights = entropy_weights(teacher_entropy, beta, self.mean_entropy_weight, cap).float()
        old_logprobs = None if self.old_logprobs is None else self.old_logprobs[number]
        terms = self.batch.terms(micro_batch, weights, old_logprobs, device)
        weight = model.output_weight
        assert isinstance(weight, torch.nn.Parameter)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: gradient_is_ready(self.last_chunk, weight))
        policy = Projection(hidden, weight.detach())  # the weight's gradient bypasses autograd
        loss, statistics = fused_objective(
            policy,
            micro_batch.targets.to(device),
            _TileObjective(terms, algorithm),
            model.vocab_shard,
            weight_grad=weight.main_grad,  # pyright: ignore[reportAttributeAccessIssue]  (Megatron's)
            teacher=teacher,
            divergence=settings.divergence,
            temperature=settings.temperature,
            memory=settings.logits_memory,
        )
        if (values := self.token_values) is not None:
            shard, scores = model.vocab_shard, self.scores
            values.record(self.batch, micro_batch, policy, shard, statistics, weights, scores)
        assert statistics.divergence is not None
        old = statistics.logprob if terms.old_logprob is None else terms.old_logprob
        self.totals.add(
            old,
            terms.engine_logprob,
            statistics.entropy,
            loss=loss.detach(),
            trained=torch.ones_like(old),
            distilled=torch.ones_like(weights),
            divergence=statistics.divergence,
            teacher_entropy=teacher_entropy,
            weight=weights,
            weight_squared=weights.square(),
        )
        self.totals.count_entropies(teacher_entropy)
        return loss


class _TileObjective(NamedTuple):
    terms: TokenTerms
    algorithm: Algorithm

    def __call__(self, rows: Rows, tile: Statistics) -> Tensor:
        return routed_objective(tile.logprob, tile.divergence, self.terms.rows(rows), self.algorithm)
