"""Train the policy on its ranks: pack routed samples, score, run forward and backward, update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megatron_srpo.algorithm.objective import entropy_weights
from megatron_srpo.algorithm.settings import Algorithm
from megatron_srpo.config import schema
from megatron_srpo.data.outline import OutlineGroup, outline
from megatron_srpo.data.records import Group, Sample
from megatron_srpo.data.update_report import OptimizerUpdate, TokenSums, UpdateReport
from megatron_srpo.distributed.context_parallel import ContextParallel
from megatron_srpo.distributed.device import model_dtype, uses_transformer_engine
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.build import PolicyModel, build_chunks
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.exchange import deliver
from megatron_srpo.training.batch_plan import BatchPlan, OptimizerBatch, plan_batch
from megatron_srpo.training.loss import LossSettings, RoutedLoss, TokenTotals
from megatron_srpo.training.offload import HostMemory
from megatron_srpo.training.optimizer import Optimizer, wrap_data_parallel
from megatron_srpo.training.packing import MicroBatch, PackingRules
from megatron_srpo.training.schedule import run_schedule
from megatron_srpo.training.teacher import Teacher, TeacherScores
from megatron_srpo.training.token_values import TokenValues
from megatron_srpo.vocab_parallel.divergence import Divergence
from megatron_srpo.vocab_parallel.fused import Statistics, score
from megatron_srpo.vocab_parallel.kernels.choice import describe_kernel
from megatron_srpo.vocab_parallel.logits import Projection
from megatron_srpo.weights.transfer import Repeatable, export, load

_Scores = dict[int, Statistics]  # of the policy's tokens, by number of the micro-batch, on the last stage


@dataclass(frozen=True)
class TrainerSettings:
    """The part of the configuration that the trainer needs."""

    model: schema.ModelSection
    parallel: schema.ParallelSection
    megatron: dict[str, Any]
    algorithm: Algorithm
    teacher: schema.TeacherSection
    optimizer: schema.OptimizerSection
    train: schema.TrainSection
    lr: float
    mini_batch_prompts: int
    temperature: float
    colocated: bool

    @classmethod
    def of(cls, config: schema.Config) -> TrainerSettings:
        """Return the trainer's part of a run's configuration."""
        names = ("model", "parallel", "megatron", "algorithm", "teacher", "optimizer", "train")
        sections = {name: getattr(config, name) for name in (*names, "lr", "mini_batch_prompts")}
        rollout = config.rollout
        return cls(**sections, temperature=rollout.temperature, colocated=rollout.colocated)


class Trainer:
    """Policy, optimizer and teacher of this rank."""

    def __init__(self, settings: TrainerSettings, folder: HFFolder, layout: Layout, is_resumed: bool = False):
        """Build model, optimizer and teacher; load weights from `folder` unless the run is resumed."""
        self.settings = settings
        self.folder = folder
        self.layout = layout
        self.algorithm = settings.algorithm
        chunks = self._build_chunks()
        if not is_resumed:
            load(chunks, folder)
        self.chunks = wrap_data_parallel(chunks, settings.parallel)
        self.host = HostMemory()
        lr, steps = settings.lr, settings.train.steps
        self.optimizer = Optimizer(self.chunks, settings.optimizer, lr, steps, self.host)
        algorithm, temperature, mib = self.algorithm, settings.temperature, settings.train.logits_memory_mib
        top = algorithm.divergence_support, algorithm.divergence_topk
        divergence = Divergence(algorithm.divergence, algorithm.divergence_alpha, *top)
        memory = None if mib is None else mib * 2**20
        self.loss_settings = LossSettings(algorithm, divergence, temperature, memory)
        self.teacher: Teacher | None = None
        if algorithm.uses_teacher:
            shared = self.host, self.chunks, self._copy_of_policy
            self.teacher = Teacher(settings.teacher, temperature, memory, *shared)
        self.rules = packing_rules(settings, layout)
        self._offload()

    def close(self) -> None:
        """Release the model: DDP's hooks refer to it from C++, invisible to the garbage collector."""
        for chunk in self.chunks:
            vars(chunk).clear()

    def describe(self) -> list[str]:
        """Describe, for the log, the loss, and whether a prompt is computed once for several responses."""
        shared = "prompts: responses in a micro-batch share the computation of a common prompt"
        repeated = "prompts: computed for each response; Transformer Engine cannot share them"
        return [self.describe_loss(), shared if self.rules.shares_prompts else repeated]

    def describe_loss(self) -> str:
        """Describe, for the log, how the loss computes its pass over the vocabulary."""
        divergence = self.loss_settings.divergence
        kernel = describe_kernel(self.layout.device, model_dtype(self.settings.model), divergence)
        if not self.algorithm.uses_teacher:
            return f"log-probabilities: {kernel}"
        supports = {"full": "full vocabulary", "sampled": "sampled token"}
        top = f"{divergence.support} {divergence.top_k} and tail"
        return f"{divergence.name} on the {supports.get(divergence.support, top)}: {kernel}"

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The policy's parameters on this rank, chunk by chunk."""
        return [parameter for chunk in self.chunks for parameter in chunk.module.parameters()]

    def _build_chunks(self) -> list[PolicyModel]:
        settings, architecture = self.settings, self.folder.architecture
        sections = settings.model, settings.parallel, settings.megatron
        return build_chunks(architecture, *sections, self.layout.device)

    def _copy_of_policy(self) -> list[PolicyModel]:
        copies = self._build_chunks()
        with torch.no_grad():
            for copy, chunk in zip(copies, self.chunks, strict=True):
                for own, source in zip(copy.parameters(), chunk.module.parameters(), strict=True):
                    own.copy_(source)
        return copies

    def export(self) -> Repeatable:
        """Return the policy as full tensors with HF names; each iteration over it is a collective."""
        return Repeatable(lambda: export(self.chunks, self.folder.architecture))

    @contextmanager
    def onloaded(self) -> Iterator[None]:
        """Onload gradients, teacher and, without optimizer_cpu_offload, update state; offload at the end."""
        self.host.onload([*self.optimizer.gradients(), *self._teacher_weights()])
        if not self.settings.optimizer.optimizer_cpu_offload:
            self.host.onload(self._update_state())
        try:
            yield
        finally:
            self._offload()

    @contextmanager
    def update_state_onloaded(self) -> Iterator[None]:
        """Onload the tensors that only updates need; with optimizer_cpu_offload, offload them at the end."""
        self.host.onload(self._update_state())
        try:
            yield
        finally:
            if self.settings.optimizer.optimizer_cpu_offload:
                self.host.offload(self._update_state())

    def _offload(self) -> None:
        """Offload the tensors that are not needed outside `onloaded`, depending on the settings."""
        if self.settings.colocated:
            self.host.offload([*self._update_state(), *self._teacher_weights()])
            self.host.offload(self.optimizer.gradients(), keep=False)
            if self.layout.device.type == "cuda":
                torch.cuda.empty_cache()
        elif self.settings.optimizer.optimizer_cpu_offload:
            self.host.offload(self._update_state())

    def _teacher_weights(self) -> list[torch.nn.Parameter]:
        return self.teacher.parameters if self.teacher else []

    def _update_state(self) -> list[Tensor]:
        return [*self.optimizer.state(), *(self.teacher.shares if self.teacher else ())]

    def plan(self, groups: Sequence[OutlineGroup]) -> list[BatchPlan]:
        """Plan the step's optimizer batches, `mini_batch_prompts` groups each; `groups` are all ranks'."""
        size, ranks = self.settings.mini_batch_prompts, self.layout.data_parallel_size
        aggregation = self.algorithm.loss_aggregation
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        return [plan_batch(part, ranks, self.rules, aggregation) for part in parts]

    def prepare(self, groups: Sequence[Group], outlines: Sequence[OutlineGroup]) -> list[OptimizerBatch]:
        """Return this rank's part of the step's optimizer batches, with tokens of other ranks. A collective.

        Args:
            groups: This rank's groups: every world_size-th of the step.
            outlines: The outlines of all ranks' groups.
        """
        plans = self.plan(outlines)
        wanted: list[list[int]] = [[] for _ in range(self.layout.data_parallel_size)]
        start = 0
        for plan in plans:
            for numbers, keys in zip(wanted, plan.keys, strict=True):
                numbers.extend(start + key for key in keys)
            start += len(plan.loss_scale)
        return self._build(plans, deliver(groups, outlines, wanted, self.layout))

    def pack(self, groups: Sequence[Group]) -> list[OptimizerBatch]:
        """Return this rank's part of the step's optimizer batches; `groups` are all ranks', with tokens."""
        plans = self.plan([outline(group) for group in groups])
        return self._build(plans, dict(enumerate(chain.from_iterable(groups))))

    def _build(self, plans: Sequence[BatchPlan], samples: Mapping[int, Sample]) -> list[OptimizerBatch]:
        """Build the batches from `samples` by number in the step."""
        batches: list[OptimizerBatch] = []
        start = 0
        for plan in plans:
            by_key = {number - start: sample for number, sample in samples.items()}
            batches.append(plan.build(self.layout.data_parallel_rank, by_key))
            start += len(plan.loss_scale)
        return batches

    def score_teacher(self, batches: Sequence[OptimizerBatch]) -> list[TeacherScores]:
        """Return the teacher's scores for every optimizer batch, before any update."""
        if self.teacher is None:
            return [TeacherScores() for _ in batches]
        return [self.teacher.score(batch) for batch in batches]

    def update(
        self,
        batches: Sequence[OptimizerBatch],
        scores: Sequence[TeacherScores],
        token_values: TokenValues | None = None,
    ) -> UpdateReport:
        """Make one optimizer update per batch; then update the teacher, unless all updates were skipped.

        Before the first update, samples without a gradient are scored and, with several batches, log π_old of
        the others is computed.
        """
        self.optimizer.start_step()
        lr = self.optimizer.lr
        totals = [self._score_samples_without_gradient(batch) for batch in batches]
        old_scores = [self._score(batch.micro_batches) if len(batches) > 1 else None for batch in batches]
        updates: list[OptimizerUpdate] = []
        distances = None
        for batch, teacher_scores, old, sums in zip(batches, scores, old_scores, totals, strict=True):
            self._accumulate_gradients(batch, teacher_scores, old, token_values, sums)
            with self.update_state_onloaded():
                updates.append(self._apply(sums))
                if len(updates) == len(batches):
                    distances = self._update_teacher(any(update.applied for update in updates))
        return UpdateReport(updates, lr, distances)

    def _score(self, micro_batches: Sequence[MicroBatch]) -> _Scores:
        """Return the policy's log-probabilities and entropies of the targets, without gradient."""
        scores: _Scores = {}
        settings = self.loss_settings

        def keep(number: int, hidden: Tensor, model: PolicyModel) -> Tensor:
            policy, shard = Projection(hidden, model.output_weight), model.vocab_shard
            targets = micro_batches[number].targets.to(hidden.device)
            limits = {"temperature": settings.temperature, "memory": settings.logits_memory}
            scores[number] = score(policy, targets, shard, **limits)
            return hidden.new_zeros(())

        run_schedule(self.chunks, micro_batches, keep, backward=False)
        return scores

    def _score_samples_without_gradient(self, batch: OptimizerBatch) -> TokenTotals:
        """Return the totals of the batch's samples that are scored, but not trained."""
        totals = TokenTotals(self.layout.device, self.algorithm.importance_cap)
        for number, found in self._score(batch.scored_micro_batches).items():
            engine = batch.engine_logprobs(batch.scored_micro_batches[number])
            totals.add(found.logprob, engine.to(self.layout.device), found.entropy)
        return totals

    def _accumulate_gradients(
        self,
        batch: OptimizerBatch,
        scores: TeacherScores,
        old: _Scores | None,
        values: TokenValues | None,
        totals: TokenTotals,
    ) -> None:
        """Run forward and backward over the batch; add its sums to `totals`, then those of all ranks."""
        mean = self._mean_entropy_weight(batch, scores)
        logprobs = None if old is None else {number: found.logprob for number, found in old.items()}
        loss = RoutedLoss(self.loss_settings, batch, scores, mean, logprobs, self.chunks[-1], values, totals)
        self.optimizer.zero_grad()
        run_schedule(self.chunks, batch.micro_batches, loss, backward=True)
        self.layout.from_last_stage(self.layout.sum_over_data_parallel(totals.sums))
        self.layout.from_last_stage(self.layout.max_over_data_parallel(totals.gap_max))

    def _mean_entropy_weight(self, batch: OptimizerBatch, scores: TeacherScores) -> Tensor:
        """Return the mean of exp(-beta · entropy) over Ω, [1] float64; 1 if Ω is empty. A collective."""
        total = torch.zeros(1, dtype=torch.float64, device=self.layout.device)
        for entropy in scores.entropy.values():
            total += entropy_weights(entropy, self.algorithm.entropy_beta).sum()
        self.layout.sum_over_data_parallel(total)
        return total / batch.distilled_tokens if batch.distilled_tokens else torch.ones_like(total)

    def _apply(self, totals: TokenTotals) -> OptimizerUpdate:
        sums = TokenSums.from_vector(totals.sums.cpu())
        value = float(sums.loss)
        result = self.optimizer.step(value)
        return OptimizerUpdate(value, result.grad_norm, result.applied, sums, float(totals.gap_max))

    def _update_teacher(self, has_moved: bool) -> tuple[float, float] | None:
        """Update the teacher if the policy `has_moved`; return their distances before and after."""
        self.optimizer.gather_weights()
        if self.teacher is None:
            return None
        before = self.teacher.distance(self.optimizer, self.folder.architecture)
        if has_moved:
            self.teacher.follow(self.optimizer, self.parameters)
        after = self.teacher.distance(self.optimizer, self.folder.architecture)
        return None if before is None or after is None else (before, after)


def packing_rules(settings: TrainerSettings, layout: Layout) -> PackingRules:
    """Return the packing rules that the parallel layout requires."""
    parallel = settings.parallel
    stages = parallel.pipeline_model_parallel_size
    return PackingRules(
        token_budget=settings.train.micro_batch_tokens * parallel.context_parallel_size,
        length_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        uniform=stages > 1,
        count_multiple=stages if parallel.virtual_pipeline_model_parallel_size else 1,
        context=ContextParallel(layout.context_parallel_rank, layout.context_parallel_size),
        shares_prompts=not uses_transformer_engine(settings.model),
    )
