"""The policy on its ranks: packs routed samples, scores, runs forward-backward with the routed loss,
updates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_srpo.algorithm.objective import (
    TokenTerms,
    entropy_weights,
    raw_entropy_weights,
    routed_objective,
)
from megatron_srpo.config.schema import Config
from megatron_srpo.data import histogram as quantiles
from megatron_srpo.data.records import Sample
from megatron_srpo.data.update_report import UpdateReport
from megatron_srpo.distributed.context_parallel import Context
from megatron_srpo.distributed.device import model_dtype
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.build import PolicyModel, build_chunks
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.training.distance import teacher_distance
from megatron_srpo.training.offload import HostMemory
from megatron_srpo.training.optimizer import Optimizer, gradient_is_ready, wrap_data_parallel
from megatron_srpo.training.packing import OptimizerBatch, PackingRules, pack
from megatron_srpo.training.schedule import run_schedule
from megatron_srpo.training.teacher import Teacher, TeacherTargets
from megatron_srpo.training.token_values import TokenValues
from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.fused import Statistics, fused_objective, score
from megatron_srpo.vocab_parallel.kernels.choice import kernel_name
from megatron_srpo.vocab_parallel.logits import Projection, Rows
from megatron_srpo.weights.transfer import Repeatable, export, load

_SUMS = (
    "tokens",
    "entropy",
    "gap",
    "clipped",
    "importance",
    "distilled",
    "divergence",
    "teacher_entropy",
    "weight",
    "weight_squared",
)


class Trainer:
    """Policy, optimizer and teacher of this rank."""

    def __init__(self, config: Config, folder: HFFolder, layout: Layout, is_resumed: bool = False):
        """`is_resumed`: the weights come from a checkpoint afterwards, not from `folder`."""
        self.config, self.folder, self.layout = config, folder, layout
        self.algorithm = config.algorithm
        chunks = build_chunks(
            folder.architecture, config.model, config.parallel, config.megatron, layout.device
        )
        if not is_resumed:
            load(chunks, folder)
        self.chunks = wrap_data_parallel(chunks, config)
        self.host = HostMemory()
        self.optimizer = Optimizer(self.chunks, config, self.host)
        self.teacher = None
        self.logits_memory = config.train.logits_memory_mib and config.train.logits_memory_mib * 2**20
        if self.algorithm.uses_teacher:
            temperature = config.rollout.temperature
            self.teacher = Teacher(
                config.teacher, temperature, self.logits_memory, self.host, self.chunks, self._copy_of_policy
            )
        parallel = config.parallel
        self.rules = PackingRules(
            token_budget=config.train.micro_batch_tokens * parallel.context_parallel_size,
            length_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
            uniform=parallel.pipeline_model_parallel_size > 1,
            count_multiple=parallel.pipeline_model_parallel_size
            if parallel.virtual_pipeline_model_parallel_size
            else 1,
            context=Context(layout.context_parallel_rank, layout.context_parallel_size),
        )
        algorithm = self.algorithm
        self.divergence = Divergence(
            algorithm.divergence,
            algorithm.divergence_alpha,
            algorithm.divergence_support,
            algorithm.divergence_topk,
        )

    def close(self) -> None:
        """Let go of the model; the trainer is not used again.

        Megatron's DDP and the gradient hooks it registers hold each other in C++, where Python's collector
        does not look: a process that trains several times would keep all its models, and the threads of their
        process groups.
        """
        for chunk in self.chunks:
            vars(chunk).clear()

    @property
    def loss_path(self) -> str:
        """How the vocabulary pass of the loss is computed, in words."""
        kernel = kernel_name(self.layout.device, model_dtype(self.config.model))
        if not self.algorithm.uses_teacher:
            return f"log-probabilities: {kernel}"
        support, top_k = self.divergence.support, self.divergence.top_k
        what = {"full": "full vocabulary", "sampled": "sampled token"}.get(
            support, f"{support} {top_k} and tail"
        )
        return f"{self.divergence.name} on the {what}: {kernel}"

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The policy's parameters on this rank, chunk by chunk."""
        return [parameter for chunk in self.chunks for parameter in chunk.module.parameters()]

    def _copy_of_policy(self) -> list[PolicyModel]:
        copies = build_chunks(
            self.folder.architecture,
            self.config.model,
            self.config.parallel,
            self.config.megatron,
            self.layout.device,
        )
        with torch.no_grad():
            for copy, chunk in zip(copies, self.chunks, strict=True):
                for own, source in zip(copy.parameters(), chunk.module.parameters(), strict=True):
                    own.copy_(source)
        return copies

    def export(self) -> Repeatable:
        """The policy as HF-named full tensors; every rank must consume the stream, as often as the others
        do.
        """
        return Repeatable(lambda: export(self.chunks, self.folder.architecture))

    def make_room(self) -> None:
        """With rollout.colocated: until `take_room` the servers have the memory of all but the policy's
        weights.
        """
        if self.config.rollout.colocated:
            self.host.park([*self._update_state(), *self._teacher_weights()])
            self.host.park(self.optimizer.gradients(), keep=False)
            if self.layout.device.type == "cuda":
                torch.cuda.empty_cache()

    def take_room(self) -> None:
        """Everything that training needs is on this rank's device; before each step's training."""
        self.host.fetch([*self.optimizer.gradients(), *self._teacher_weights()])
        if not self.config.optimizer.optimizer_cpu_offload:
            self.host.fetch(self._update_state())
        self._rest()

    def fetch_state(self) -> None:
        """What a checkpoint holds is on this rank's device, to be written over."""
        self.host.fetch([*self._update_state(), *self._teacher_weights()])

    def _rest(self) -> None:
        """With optimizer_cpu_offload: what only updates need waits on the host."""
        if self.config.optimizer.optimizer_cpu_offload:
            self.host.park(self._update_state())

    def _teacher_weights(self) -> list[Tensor]:
        return self.teacher.parameters if self.teacher else []

    def _update_state(self) -> list[Tensor]:
        return [*self.optimizer.state(), *(self.teacher.shares if self.teacher else ())]

    def pack(self, samples: Sequence[Sample]) -> list[OptimizerBatch]:
        """The step's optimizer batches, `mini_batch_prompts` prompts each.

        `samples` are whole groups, all ranks' alike.
        """
        size = self.config.mini_batch_prompts * self.config.rollout.samples_per_prompt
        layout, aggregation = self.layout, self.algorithm.loss_aggregation
        return [
            pack(
                samples[start : start + size],
                layout.data_parallel_rank,
                layout.data_parallel_size,
                self.rules,
                aggregation,
            )
            for start in range(0, len(samples), size)
        ]

    def score_teacher(self, batches: Sequence[OptimizerBatch]) -> list[TeacherTargets]:
        """The teacher's targets for every optimizer batch, before any update."""
        return [TeacherTargets() if self.teacher is None else self.teacher.score(batch) for batch in batches]

    def update(
        self,
        batches: Sequence[OptimizerBatch],
        targets: Sequence[TeacherTargets],
        tokens: TokenValues | None = None,
    ) -> UpdateReport:
        """One optimizer step per batch, then the teacher follows once (not if every update was skipped).

        tokens: notes the values of some samples' tokens on the way.
        """
        self.optimizer.start_step()
        lr = self.optimizer.lr
        old_logprobs = [self._score_policy(batch) if len(batches) > 1 else None for batch in batches]
        report = UpdateReport([], [], [], lr, dict.fromkeys(_SUMS, 0.0), 0.0)
        for batch, target, old in zip(batches, targets, old_logprobs, strict=True):
            loss, norm, moved, sums, gap = self._update_once(batch, target, old, tokens)
            report.losses.append(loss)
            report.grad_norms.append(norm)
            report.moved.append(moved)
            report.sums = {name: report.sums[name] + value for name, value in zip(_SUMS, sums, strict=False)}
            report.teacher_entropies = [
                *map(sum, zip(report.teacher_entropies, sums[len(_SUMS) :], strict=True))
            ]
            report.gap_max = max(report.gap_max, gap)
        self.optimizer.gather_weights()
        before = self._teacher_distance()
        if self.teacher is not None and any(report.moved):
            self.teacher.follow(self.optimizer, self.parameters)
        report.teacher_distances = None if before is None else (before, self._teacher_distance())
        self._rest()
        return report

    def _teacher_distance(self) -> float | None:
        if self.teacher is None or not self.teacher.has_weights:
            return None
        return teacher_distance(self.chunks, self.teacher, self.optimizer, self.folder.architecture)

    def _score_policy(self, batch: OptimizerBatch) -> dict[int, Tensor]:
        """log π_old [R] of each micro-batch, by its number, on the last stage."""
        logprobs: dict[int, Tensor] = {}

        def keep(number: int, hidden: Tensor, model: PolicyModel) -> Tensor:
            targets = batch.micro_batches[number].targets.to(hidden.device)
            temperature = self.config.rollout.temperature
            policy = Projection(hidden, model.output_weight)
            logprobs[number] = score(
                policy, targets, model.vocab_shard, temperature=temperature, memory=self.logits_memory
            ).logprob
            return hidden.new_zeros(())

        run_schedule(self.chunks, batch.micro_batches, keep, backward=False)
        return logprobs

    def _update_once(
        self,
        batch: OptimizerBatch,
        targets: TeacherTargets,
        old_logprobs: dict[int, Tensor] | None,
        tokens: TokenValues | None,
    ):
        """(loss, gradient norm, whether weights moved, token sums and counts, largest log-prob gap), the
        same on every rank.
        """
        mean_weight = self._mean_entropy_weight(batch, targets)
        device = self.layout.device
        total = torch.zeros(1 + len(_SUMS) + quantiles.BINS, dtype=torch.float64, device=device)
        gap_max = torch.zeros((), device=device)

        def routed_loss(number: int, hidden: Tensor, model: PolicyModel) -> Tensor:
            micro_batch = batch.micro_batches[number]
            distilled = [
                document.key for document in micro_batch.documents[: batch.distilled_count(micro_batch)]
            ]
            terms = batch.terms(micro_batch, device)._replace(
                old_logprob=old_logprobs and old_logprobs[number]
            )
            weights, teacher_entropy, teacher = hidden.new_empty(0).float(), hidden.new_empty(0).float(), None
            if distilled:
                # Student and teacher must have scored the same response tokens, though their prompts differ
                # in length.
                assert [len(targets.entropy[key]) for key in distilled] == micro_batch.response_lengths[
                    : len(distilled)
                ]
                teacher_entropy = torch.cat([targets.entropy[key] for key in distilled])
                teacher = targets.logits(distilled)
                raw = raw_entropy_weights(teacher_entropy, self.algorithm.entropy_beta)
                weights = entropy_weights(raw, mean_weight, self.algorithm.entropy_weight_cap).float()
                terms.distillation_weight[: len(weights)] *= weights

            def objective(rows: Rows, tile: Statistics) -> Tensor:
                return routed_objective(tile.logprob, tile.divergence, terms.rows(rows), self.algorithm)

            if hidden.requires_grad:
                hidden.register_hook(lambda _: gradient_is_ready(self.chunks[-1], model.output_weight))
            loss, statistics = fused_objective(
                Projection(hidden, model.output_weight.detach()),  # its gradient goes past autograd
                micro_batch.targets.to(device),
                objective,
                model.vocab_shard,
                weight_grad=model.output_weight.main_grad,
                teacher=teacher,
                divergence=self.divergence,
                temperature=self.config.rollout.temperature,
                memory=self.logits_memory,
            )
            if tokens is not None:
                tokens.note(
                    batch, micro_batch, statistics, (teacher_entropy, weights), hidden, model, targets
                )
            sums, gap = _token_sums(
                statistics, terms, weights, teacher_entropy, self.algorithm.importance_cap
            )
            total.add_(torch.cat([loss.detach().double().view(1), sums]))
            torch.maximum(gap_max, gap, out=gap_max)
            return loss

        self._rest()
        self.optimizer.zero_grad()
        run_schedule(self.chunks, batch.micro_batches, routed_loss, backward=True)
        self.layout.from_last_stage(self.layout.sum_over_data_parallel(total))
        self.layout.from_last_stage(self.layout.max_over_data_parallel(gap_max))
        loss, *sums = total.tolist()
        self.host.fetch(self._update_state())
        norm, moved = self.optimizer.step(loss)
        return loss, norm, moved, sums, float(gap_max)

    def _mean_entropy_weight(self, batch: OptimizerBatch, targets: TeacherTargets) -> Tensor:
        """Mean of w̃ over Ω: every rank takes part, whatever its share, and an empty Ω gives 1."""
        total = torch.zeros(1, dtype=torch.float64, device=self.layout.device)
        for entropy in targets.entropy.values():
            total += raw_entropy_weights(entropy, self.algorithm.entropy_beta).sum()
        self.layout.sum_over_data_parallel(total)
        return total / batch.distilled_tokens if batch.distilled_tokens else torch.ones_like(total)


def _token_sums(
    statistics: Statistics,
    terms: TokenTerms,
    weights: Tensor,
    teacher_entropy: Tensor,
    importance_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """The micro-batch's `_SUMS` in order and its teacher entropies' counts, and its largest |log π_old - log
    π_roll|.
    """
    old = statistics.logprob if terms.old_logprob is None else terms.old_logprob
    gap = old - terms.engine_logprob
    importance = gap.exp()
    capped = importance if importance_cap is None else importance.clamp(max=importance_cap)
    vectors = (
        torch.ones_like(gap),
        statistics.entropy,
        gap.abs(),
        (importance > capped).double(),
        capped,
        torch.ones_like(weights),
        statistics.divergence,
        teacher_entropy,
        weights,
        weights.square(),
    )
    largest = gap.abs().max() if len(gap) else gap.new_zeros(())
    sums = torch.stack([vector.double().sum() for vector in vectors])
    return torch.cat([sums, quantiles.counts(teacher_entropy)]), largest.float()
