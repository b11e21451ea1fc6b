"""Megatron's DDP, optimizer and learning-rate schedule around the model chunks."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_srpo.config.schema import OptimizerSection, ParallelSection
from megatron_srpo.distributed import megatron
from megatron_srpo.distributed.layout import replica_group
from megatron_srpo.distributed.megatron import DistributedDataParallel
from megatron_srpo.model.build import PolicyModel
from megatron_srpo.training.offload import HostMemory


def wrap_data_parallel(
    chunks: Sequence[PolicyModel], parallel: ParallelSection
) -> list[DistributedDataParallel]:
    """Wrap the chunks in Megatron's DDP: fp32 gradient buffers, summed (not averaged) over the ranks."""
    overlaps_reduce, overlaps_gather = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    if overlaps_reduce is None:
        overlaps_reduce = torch.cuda.is_available()
    if overlaps_gather is None:
        overlaps_gather = torch.cuda.is_available() and overlaps_reduce
    settings = megatron.DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=overlaps_reduce or overlaps_gather,
        overlap_param_gather=overlaps_gather and parallel.use_distributed_optimizer,
        bucket_size=parallel.ddp_bucket_size,
        average_in_collective=False,
    )
    return [
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


def gradient_is_ready(chunk: DistributedDataParallel, parameter: Parameter) -> None:
    """Mark the gradient in `parameter.main_grad` as ready; needed if it was written outside autograd."""
    if chunk.ddp_config.overlap_grad_reduce:
        chunk.param_to_bucket_group[parameter].register_grad_ready(parameter, chunk.force_all_reduce)


def _finalize(chunks, num_tokens=None, **kwargs) -> None:
    """Reduce gradients without Megatron's division by `num_tokens`: the loss has been divided already."""
    megatron.finalize_model_grads(chunks, None, **kwargs)


MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAM_SETTINGS = {"weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"}


class Shard(NamedTuple):
    """Flat elements start … end - 1 of a parameter in fp32, and Adam's moments (zeros before any update)."""

    start: int
    end: int
    values: Tensor
    moments: dict[str, Tensor]


class StepResult(NamedTuple):
    """The result of `Optimizer.step`."""

    grad_norm: float  # before clipping
    applied: bool


class _Holding(NamedTuple):
    """Flat elements start … end - 1 of a parameter: their fp32 master and its torch optimizer."""

    start: int
    end: int
    master: Tensor
    adam: torch.optim.Optimizer


class Optimizer:
    """AdamW with warm-up and global gradient clipping over Megatron's (distributed) optimizer."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        settings: OptimizerSection,
        lr: float,
        steps: int,
        host: HostMemory,
    ):
        core, decay = chunks[0].config, settings.weight_decay
        self.config = megatron.OptimizerConfig(
            optimizer="adam",
            lr=lr,
            min_lr=lr,
            **settings.model_dump(include=_ADAM_SETTINGS),
            bf16=core.bf16,
            params_dtype=core.params_dtype,
            use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
        )
        self.chunks = list(chunks)
        self.host = host
        self.updates = 0  # applied so far, as Adam's bias correction counts them
        overrides = megatron.get_standard_config_overrides(self.config)
        wrapped: Any = self.chunks
        self.inner = megatron.get_megatron_optimizer(self.config, wrapped, config_overrides=overrides)
        # The schedule also sets each group's weight decay (0 for norms), so it must precede the first step.
        self.schedule = megatron.OptimizerParamScheduler(
            self.inner,
            init_lr=0.0,
            max_lr=lr,
            min_lr=lr,
            lr_warmup_steps=settings.lr_warmup_steps,
            lr_decay_steps=max(steps, settings.lr_warmup_steps + 1),
            lr_decay_style="constant",
            start_wd=decay,
            end_wd=decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        core.grad_scale_func = self.inner.scale_loss
        core.finalize_model_grads_func = _finalize
        if self.chunks[0].ddp_config.overlap_grad_reduce:
            quiet: Any = [chunk.no_sync for chunk in self.chunks]
            core.no_sync_func = quiet if len(quiet) > 1 else quiet[0]

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.inner.param_groups[0]["lr"]

    def start_step(self) -> None:
        """Advance the warm-up by one training step: the first step runs at lr / lr_warmup_steps."""
        self.schedule.step(1)

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.inner.zero_grad()

    def step(self, loss: float) -> StepResult:
        """Clip and update, unless loss or gradient norm is not finite (which is the same on all ranks)."""
        self.inner.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return StepResult(norm, False)
        self.inner.step()
        self.updates += 1
        return StepResult(norm, True)

    def gather_weights(self) -> None:
        """Gather the updated weights on all ranks now instead of in the next forward pass."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def state(self) -> Iterator[Tensor]:
        """Yield the tensors only updates need: Adam's moments, and fp32 masters apart from parameters."""
        parameters = chain.from_iterable(chunk.parameters() for chunk in self.chunks)
        own = {parameter.untyped_storage()._cdata for parameter in parameters}
        for inner in self._chained:
            for group in inner.optimizer.param_groups:
                for master in group["params"]:
                    if master.untyped_storage()._cdata not in own:
                        yield master
                    state = inner.optimizer.state.get(master, {})
                    yield from (state[name] for name in state if name in MOMENTS)

    def gradients(self) -> Iterator[Tensor]:
        """Yield the gradient buffers."""
        for chunk in self.chunks:
            buffers: Any = chunk.buffers  # Megatron's own, not torch's method
            for buffer in [*buffers, *chunk.expert_parallel_buffers]:
                yield buffer.grad_data

    def held_range(self, parameter: Parameter) -> tuple[int, int]:
        """Return (start, end) of the parameter's flat elements in this rank's optimizer."""
        holding = self._holding(parameter)
        return (0, 0) if holding is None else (holding.start, holding.end)

    def shard_of(self, parameter: Parameter) -> Shard:
        """Return this rank's part of the parameter, disjoint between the ranks of its replica group.

        While the tensors are offloaded, these are views of the host copies.
        """
        holding = self._holding(parameter)
        if holding is None:
            return Shard(0, 0, parameter.new_empty(0, dtype=torch.float32), {})
        start, end, master, adam = holding
        values = self.host.values(master.detach()).view(-1)
        state = adam.state.get(master) or {name: torch.zeros_like(master) for name in MOMENTS}
        moments = {name: self.host.values(state[name]).view(-1) for name in MOMENTS}
        if not self.config.use_distributed_optimizer:
            group = replica_group(parameter)
            share = -(-end // group.size())
            start, end = min(group.rank() * share, end), min((group.rank() + 1) * share, end)
            values, moments = values[start:end], {name: moment[start:end] for name, moment in moments.items()}
        return Shard(start, end, values, moments)

    @torch.no_grad()
    def restore(self, parameter: Parameter, values: Tensor, moments: dict[str, Tensor]) -> None:
        """Restore the flat fp32 `values` and `moments` of the `held_range`; set `updates` before."""
        holding = self._holding(parameter)
        if holding is None:
            return
        _, _, master, adam = holding
        master.view(-1).copy_(values)
        if self.updates:
            state = adam.state[master]
            for name in MOMENTS:
                state[name] = moments[name].to(master.device, torch.float32, copy=True).view(master.shape)
            if isinstance(adam, torch.optim.Adam):  # torch's Adam counts updates per parameter
                state["step"] = torch.tensor(float(self.updates), dtype=torch.float32)
            else:  # Apex's Adam counts them per group
                for group in adam.param_groups:
                    group["step"] = self.updates

    @property
    def _chained(self) -> list:
        """Megatron's optimizers, one for dense parameters and one for experts."""
        return getattr(self.inner, "chained_optimizers", [self.inner])

    def _holding(self, parameter: Parameter) -> _Holding | None:
        for inner in self._chained:
            if parameter in getattr(inner, "model_param_gbuf_map", ()):
                owned = inner._get_model_param_range_map(parameter)["param"]
                group, place = inner.model_param_group_index_map[parameter]
                master = inner.optimizer.param_groups[group]["params"][place]
                return _Holding(owned.start, owned.end, master, inner.optimizer)
            if not self.config.use_distributed_optimizer:
                master = getattr(parameter, "main_param", None)
                master = parameter if master is None else master
                if any(master is own for group in inner.optimizer.param_groups for own in group["params"]):
                    return _Holding(0, parameter.numel(), master, inner.optimizer)
        return None
