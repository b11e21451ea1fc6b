"""The self-teacher: whose weights it has, and its scores of the students' own responses (METHOD.md §2,
"Teacher").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.config.schema import TeacherSection
from megatron_srpo.distributed.layout import replica_group
from megatron_srpo.model.build import PolicyModel
from megatron_srpo.training.offload import HostMemory
from megatron_srpo.training.optimizer import Optimizer, Shard
from megatron_srpo.training.packing import OptimizerBatch
from megatron_srpo.training.schedule import run_schedule
from megatron_srpo.vocab_parallel.fused import score
from megatron_srpo.vocab_parallel.logits import InterpolatedLogits, Projection


@dataclass
class TeacherTargets:
    """The teacher's view of one optimizer batch's distilled samples of this rank, by sample key; filled on
    the last stage.

    hidden: of each of the teacher's models, [R, H] final hidden states that predict the response, in the
    model's dtype.
    weights: of each, [padded vocabulary / TP, H] its output matrix. entropy: [R] nats, full vocabulary.
    interpolation: the second model's share of the logits, where there are two.
    """

    hidden: dict[int, list[Tensor]] = field(default_factory=dict)
    entropy: dict[int, Tensor] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)
    interpolation: float = 0.0

    def logits(self, keys: Sequence[int]) -> Projection | InterpolatedLogits:
        """The teacher's logits for these samples' response tokens, one after another."""
        states = [torch.cat(parts) for parts in zip(*(self.hidden[key] for key in keys), strict=True)]
        models = [Projection(*pair) for pair in zip(states, self.weights, strict=True)]
        return models[0] if len(models) == 1 else InterpolatedLogits(*models, self.interpolation)


class Teacher:
    """Weights by `teacher.kind`: `ema` and `frozen` hold a copy of the model, `live` is the policy itself,
    `trust_region` is both.

    The EMA is kept in fp32, every rank of a parameter's replica group a share of each parameter (the
    distributed optimizer's own where there is one); the copy it scores with has the model's dtype and is
    refreshed from the shares after every step.
    """

    def __init__(
        self,
        settings: TeacherSection,
        temperature: float,
        logits_memory: int | None,
        host: HostMemory,
        policy_chunks: Sequence[torch.nn.Module],
        copy_of_policy: Callable[[], Sequence[PolicyModel]],
    ):
        """`copy_of_policy()` builds chunks with the policy's present weights; it is not called for `live`."""
        self.settings = settings
        self.temperature, self.logits_memory, self.host = temperature, logits_memory, host
        self.policy_chunks = policy_chunks
        self.chunks: Sequence[PolicyModel] = [] if settings.kind == "live" else copy_of_policy()
        self.shares: list[Tensor] = []
        for chunk in self.chunks:
            chunk.requires_grad_(False)

    @property
    def has_weights(self) -> bool:
        """Whether there are weights besides the policy's."""
        return self.settings.kind != "live"

    def share(self, position: int, shard: Shard) -> Tensor:
        """Its flat weights of `shard`'s range, of the parameter at `position` in its order: what a
        checkpoint keeps.
        """
        if self.shares:
            return self.host.values(self.shares[position])
        return self.host.values(self.parameters[position]).view(-1)[shard.start : shard.end]

    @torch.no_grad()
    def restore(self, weights: Iterable[tuple[Tensor, Shard]]) -> None:
        """Put back every parameter's flat weights, in order; of an EMA, the shard's range in fp32 as well."""
        self.shares = []
        for parameter, (values, shard) in zip(self.parameters, weights, strict=True):
            parameter.view(-1).copy_(values)
            if self.settings.kind == "ema":
                self.shares.append(
                    values[shard.start : shard.end].to(parameter.device, torch.float32, copy=True)
                )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those of the copy it scores with."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def score(self, batch: OptimizerBatch) -> TeacherTargets:
        """A forward pass over the distilled samples, packed on their own, with the teacher's longer prompts;
        two of `trust_region`.
        """
        targets = TeacherTargets(interpolation=self.settings.interpolation)
        if self.settings.kind in ("ema", "frozen", "trust_region"):
            self._forward(self.chunks, batch, targets, is_last=self.settings.kind != "trust_region")
        if self.settings.kind in ("live", "trust_region"):
            self._forward(self.policy_chunks, batch, targets, is_last=True)
        return targets

    def _forward(
        self, chunks: Sequence[torch.nn.Module], batch: OptimizerBatch, targets: TeacherTargets, is_last: bool
    ) -> None:
        """Add one model's hidden states and output matrix to `targets`, and after the last model the
        entropies.
        """
        position = len(targets.weights)

        def keep(number: int, hidden: Tensor, model: PolicyModel) -> Tensor:
            micro_batch = batch.teacher_micro_batches[number]
            if len(targets.weights) == position:  # the live policy's own matrix moves between mini-batches
                weight = model.output_weight.detach()
                targets.weights.append(weight.clone() if chunks is self.policy_chunks else weight)
            keys, lengths = [document.key for document in micro_batch.documents], micro_batch.response_lengths
            for key, rows in zip(keys, hidden.split(lengths), strict=True):
                targets.hidden.setdefault(key, []).append(rows)
            if is_last and keys:
                options = {"temperature": self.temperature, "memory": self.logits_memory}
                entropy = score(targets.logits(keys), None, model.vocab_shard, **options).entropy
                targets.entropy.update(zip(keys, entropy.split(lengths), strict=True))
            return hidden.new_zeros(())

        run_schedule(chunks, batch.teacher_micro_batches, keep, backward=False)

    @torch.no_grad()
    def follow(self, optimizer: Optimizer, policy_parameters: Sequence[torch.nn.Parameter]) -> None:
        """θ' ← (1 - ema_rate) θ' + ema_rate θ in fp32; nothing to do for other kinds.

        `policy_parameters` are in the order of the teacher's own. Call once per training step, not when it
        was skipped.
        """
        if self.settings.kind != "ema":
            return
        own = self.parameters
        shards = [optimizer.shard_of(parameter) for parameter in policy_parameters]
        if not self.shares:  # the copy still holds the initial weights exactly
            self.shares = [
                p.view(-1)[s.start : s.end].to(torch.float32, copy=True)
                for p, s in zip(own, shards, strict=True)
            ]
        for parameter, share, shard in zip(own, self.shares, shards, strict=True):
            share.lerp_(shard.values.float(), self.settings.ema_rate)
            flat = parameter.view(-1)
            if (group := replica_group(parameter)).size() == 1:
                flat.copy_(share)
            else:  # every rank adds its own part to zeros: exact, and blind to how the parts are cut
                flat.zero_()[shard.start : shard.end] = share.to(flat.dtype)
                dist.all_reduce(flat, group=group)
