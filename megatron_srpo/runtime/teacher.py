"""The self-teacher: whose weights it has, and its scores of the students' own responses (METHOD.md §2, "Teacher")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_srpo.config import TeacherSection
from megatron_srpo.model.qwen3 import Qwen3
from megatron_srpo.runtime.optimizer import Optimizer
from megatron_srpo.runtime.packing import OptimizerBatch
from megatron_srpo.runtime.parallel import Layout
from megatron_srpo.runtime.schedule import run_schedule
from megatron_srpo.vocab_parallel.fused import score


@dataclass
class TeacherTargets:
    """The teacher's view of one optimizer batch's distilled samples of this rank, by sample key; filled on the last stage.

    hidden: [R, H] final hidden states that predict the response, in the model's dtype. entropy: [R] nats, full vocabulary.
    weight: [padded vocabulary / TP, H] the teacher's output matrix.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    entropy: dict[int, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None


class Teacher:
    """Weights by `teacher.kind`: `ema` and `frozen` hold a copy of the model, `live` is the policy itself.

    The EMA is kept in fp32, every data-parallel rank a share of each parameter (the distributed optimizer's own where
    there is one); the copy it scores with has the model's dtype and is refreshed from the shares after every step.
    """

    def __init__(
        self,
        settings: TeacherSection,
        layout: Layout,
        temperature: float,
        policy_chunks: Sequence[torch.nn.Module],
        copy_of_policy: Callable[[], Sequence[Qwen3]],
    ):
        """`copy_of_policy()` builds chunks with the policy's present weights; it is not called for `live`."""
        self.settings, self.layout = settings, layout
        self.temperature = temperature
        self.chunks: Sequence[Qwen3] = policy_chunks if settings.kind == "live" else copy_of_policy()
        self.shares: list[Tensor] = []
        if settings.kind != "live":
            for chunk in self.chunks:
                chunk.requires_grad_(False)

    def score(self, batch: OptimizerBatch) -> TeacherTargets:
        """One forward pass over the distilled samples, packed on their own, with the teacher's longer prompts."""
        targets = TeacherTargets()

        def keep(number: int, hidden: Tensor, model: Qwen3) -> Tensor:
            micro_batch = batch.teacher_micro_batches[number]
            if targets.weight is None:  # the live policy's own matrix moves between mini-batches
                targets.weight = model.output_weight.detach().clone() if self.settings.kind == "live" else model.output_weight
            entropy = score(hidden, targets.weight, None, model.vocab_shard, temperature=self.temperature).entropy
            lengths = micro_batch.response_lengths
            for document, rows, values in zip(micro_batch.documents, hidden.split(lengths), entropy.split(lengths), strict=True):
                targets.hidden[document.key], targets.entropy[document.key] = rows, values
            return hidden.new_zeros(())

        run_schedule(self.chunks, batch.teacher_micro_batches, keep, backward=False)
        return targets

    @torch.no_grad()
    def follow(self, optimizer: Optimizer, policy_parameters: Sequence[torch.nn.Parameter]) -> None:
        """θ' ← (1 - ema_rate) θ' + ema_rate θ in fp32; nothing to do for `frozen` and `live`.

        `policy_parameters` are in the order of the teacher's own. Call once per training step, not when it was skipped.
        """
        if self.settings.kind != "ema":
            return
        own = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        shards = [optimizer.shard_of(parameter) for parameter in policy_parameters]
        if not self.shares:  # the copy still holds the initial weights exactly
            self.shares = [p.view(-1)[s.start : s.end].to(torch.float32, copy=True) for p, s in zip(own, shards, strict=True)]
        for parameter, share, shard in zip(own, self.shares, shards, strict=True):
            share.lerp_(shard.values.float(), self.settings.ema_rate)
            flat = parameter.view(-1)
            if self.layout.data_parallel_size == 1:
                flat.copy_(share)
            else:  # every rank adds its own part to zeros: exact, and blind to how the parts are cut
                flat.zero_()[shard.start : shard.end] = share.to(flat.dtype)
                dist.all_reduce(flat, group=self.layout.data_parallel_group)
