"""The self-teacher: its weights, and its scores of the policy's responses (docs/method.md, section 2)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.config.schema import TeacherSection
from megatron_srpo.distributed.layout import replica_group
from megatron_srpo.model.architecture import Architecture
from megatron_srpo.model.build import PolicyModel
from megatron_srpo.training.batch_plan import OptimizerBatch
from megatron_srpo.training.offload import HostMemory
from megatron_srpo.training.optimizer import Optimizer, Shard
from megatron_srpo.training.schedule import run_schedule
from megatron_srpo.vocab_parallel.fused import score
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Projection
from megatron_srpo.weights.transfer import ParameterShard, parameters_of


@dataclass
class TeacherScores:
    """The teacher's scores of this rank's distilled samples in an optimizer batch, on the last stage.

    Attributes:
        hidden: By sample key, each model's final hidden states [R, H]; `trust_region` has two models.
        entropy: By sample key, the teacher's entropies [R], in nats.
        weights: Each model's output matrix, [padded vocabulary / TP, H].
        interpolation: The second model's share of the logits, if there are two.
    """

    hidden: dict[int, list[Tensor]] = field(default_factory=dict)
    entropy: dict[int, Tensor] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)
    interpolation: float = 0.0

    def logits(self, keys: Sequence[int]) -> Projection | InterpolatedLogits:
        """Return the teacher's logits for these samples' policy tokens, concatenated."""
        states = [torch.cat(parts) for parts in zip(*(self.hidden[key] for key in keys), strict=True)]
        models = [Projection(*pair) for pair in zip(states, self.weights, strict=True)]
        if len(models) == 1:
            return models[0]
        first, second = models
        return InterpolatedLogits(first, second, self.interpolation)


@dataclass(eq=False)
class Teacher:
    """The teacher. `ema` and `frozen` use a copy of the model, `live` the policy, `trust_region` both.

    An EMA is kept in fp32 in `shares`, distributed over the ranks of a replica group; the copy that scores is
    set from them after each update.
    """

    settings: TeacherSection
    temperature: float
    logits_memory: int | None
    host: HostMemory
    policy_chunks: Sequence[torch.nn.Module]
    copy_of_policy: InitVar[Callable[[], Sequence[PolicyModel]]]  # returns a copy with the current weights

    def __post_init__(self, copy_of_policy: Callable[[], Sequence[PolicyModel]]) -> None:
        self.chunks: Sequence[PolicyModel] = [] if self.settings.kind == "live" else copy_of_policy()
        self.shares: list[Tensor] = []
        for chunk in self.chunks:
            chunk.requires_grad_(False)

    @property
    def has_weights(self) -> bool:
        """True if the teacher has weights in addition to the policy's."""
        return self.settings.kind != "live"

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of the copy, chunk by chunk, in the policy's order; empty for `live`."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def share(self, position: int, shard: Shard) -> Tensor:
        """Return the flat weights of `shard`'s range of the parameter at `position`, for checkpoints."""
        if self.shares:
            return self.host.values(self.shares[position])
        return self.host.values(self.parameters[position]).view(-1)[shard.start : shard.end]

    @torch.no_grad()
    def restore(self, weights: Iterable[tuple[Tensor, Shard]]) -> None:
        """Restore all parameters from flat weights, in order, and for an EMA the fp32 shares."""
        self.shares = []
        for parameter, (values, shard) in zip(self.parameters, weights, strict=True):
            parameter.view(-1).copy_(values)
            if self.settings.kind == "ema":
                own = values[shard.start : shard.end]
                self.shares.append(own.to(parameter.device, torch.float32, copy=True))

    def score(self, batch: OptimizerBatch) -> TeacherScores:
        """Score the distilled samples' responses after the teacher's prompts; two passes for trust_region."""
        scores = TeacherScores(interpolation=self.settings.interpolation)
        models = {"live": [self.policy_chunks], "trust_region": [self.chunks, self.policy_chunks]}
        passes = models.get(self.settings.kind, [self.chunks])
        for chunks in passes:
            self._forward(chunks, batch, scores, is_last=chunks is passes[-1])
        return scores

    def _forward(
        self, chunks: Sequence[torch.nn.Module], batch: OptimizerBatch, scores: TeacherScores, is_last: bool
    ) -> None:
        """Add a model's hidden states and output matrix to `scores`, after the last model the entropies."""
        position = len(scores.weights)

        def keep(number: int, hidden: Tensor, model: PolicyModel) -> Tensor:
            micro_batch = batch.teacher_micro_batches[number]
            if len(scores.weights) == position:  # cloned: the live policy changes between mini-batches
                weight = model.output_weight.detach()
                scores.weights.append(weight.clone() if chunks is self.policy_chunks else weight)
            keys, counts = micro_batch.distilled_keys, micro_batch.target_counts
            for key, rows in zip(keys, hidden.split(counts), strict=True):
                scores.hidden.setdefault(key, []).append(rows)
            if is_last and keys:
                teacher, shard = scores.logits(keys), model.vocab_shard
                limits = {"temperature": self.temperature, "memory": self.logits_memory}
                statistics = score(teacher, None, shard, **limits)
                scores.entropy.update(zip(keys, statistics.entropy.split(counts), strict=True))
            return hidden.new_zeros(())

        run_schedule(chunks, batch.teacher_micro_batches, keep, backward=False)

    @torch.no_grad()
    def follow(self, optimizer: Optimizer, policy_parameters: Sequence[torch.nn.Parameter]) -> None:
        """Move an EMA toward the policy in fp32: θ' ← (1 - ema_rate) θ' + ema_rate θ; once per step."""
        if self.settings.kind != "ema":
            return
        own = self.parameters
        shards = [optimizer.shard_of(parameter) for parameter in policy_parameters]
        if not self.shares:  # the copy still holds the initial weights exactly
            for parameter, shard in zip(own, shards, strict=True):
                initial = parameter.view(-1)[shard.start : shard.end]
                self.shares.append(initial.to(torch.float32, copy=True))
        for parameter, share, shard in zip(own, self.shares, shards, strict=True):
            share.lerp_(shard.values.float(), self.settings.ema_rate)
            flat = parameter.view(-1)
            group = replica_group(parameter)
            if group.size() == 1:
                flat.copy_(share)
            else:  # a sum of each rank's part and zeros: exact for any division into parts
                flat.zero_()[shard.start : shard.end] = share.to(flat.dtype)
                dist.all_reduce(flat, group=group)

    @torch.no_grad()
    def distance(self, optimizer: Optimizer, architecture: Architecture) -> float | None:
        """Return ‖θ - θ'‖ / ‖θ‖ over all weights, the same on every rank; None for live. A collective."""
        if not self.has_weights:
            return None
        sums = torch.zeros(2, dtype=torch.float64, device=next(self.policy_chunks[0].parameters()).device)
        found: list[Tensor] = []
        for position, (location, parameter) in enumerate(parameters_of(self.policy_chunks, architecture)):
            shard = optimizer.shard_of(parameter)
            if ParameterShard.of(location).is_primary and shard.end > shard.start:
                gap = shard.values - self.share(position, shard)
                norms = [torch.linalg.vector_norm(v, dtype=torch.float64) for v in (gap, shard.values)]
                found.append(torch.stack(norms))
        if found:
            sums = torch.stack(found).square().sum(0)
        dist.all_reduce(sums)
        gap, norm = sums.tolist()
        return math.sqrt(gap / norm) if norm else 0.0
