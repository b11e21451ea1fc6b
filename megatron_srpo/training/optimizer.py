"""Megatron's DDP, optimizer and learning-rate schedule around the model chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.layout import replica_group
from megatron_srpo.distributed.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    OptimizerConfig,
    OptimizerParamScheduler,
    finalize_model_grads,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron_srpo.model.build import PolicyModel
from megatron_srpo.training.offload import HostMemory


def wrap_data_parallel(chunks: Sequence[PolicyModel], config: Config) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers; gradients are summed, not averaged, over data-parallel ranks, in
    fp32.
    """
    parallel, on_gpu = config.parallel, torch.cuda.is_available()
    overlaps_reduce = on_gpu if parallel.overlap_grad_reduce is None else parallel.overlap_grad_reduce
    overlaps_gather = (
        on_gpu and overlaps_reduce if parallel.overlap_param_gather is None else parallel.overlap_param_gather
    )
    settings = DistributedDataParallelConfig(
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
    """Tell `chunk` in the backward pass that a micro-batch's gradient is in `parameter.main_grad`, though
    autograd had no part in it.
    """
    if chunk.ddp_config.overlap_grad_reduce:
        chunk.param_to_bucket_group[parameter].register_grad_ready(parameter, chunk.force_all_reduce)


def _finalize(chunks, num_tokens=None, **kwargs) -> None:
    """Reduce gradients; the loss is divided already, so Megatron's own division by `num_tokens` is left out."""
    finalize_model_grads(chunks, None, **kwargs)


MOMENTS = ("exp_avg", "exp_avg_sq")


class Shard(NamedTuple):
    """Flat elements start … end - 1 of a parameter: their fp32 values and, by name, Adam's moments (zeros
    before any update).
    """

    start: int
    end: int
    values: Tensor
    moments: dict[str, Tensor]


class Optimizer:
    """AdamW with warm-up and global gradient clipping over Megatron's (distributed) optimizer.

    Its state may be parked in `host`.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], config: Config, host: HostMemory):
        settings, lr = config.optimizer, config.lr
        core = chunks[0].config
        self.config = OptimizerConfig(
            optimizer="adam",
            lr=lr,
            min_lr=lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=core.bf16,
            params_dtype=core.params_dtype,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        )
        self.chunks, self.host = list(chunks), host
        self.updates = 0  # made so far, as Adam's bias correction counts them
        self.inner = get_megatron_optimizer(
            self.config, self.chunks, config_overrides=get_standard_config_overrides(self.config)
        )
        # The scheduler also applies the weight-decay multipliers (none for norms), so it must exist before
        # the first step.
        self.schedule = OptimizerParamScheduler(
            self.inner,
            init_lr=0.0,
            max_lr=lr,
            min_lr=lr,
            lr_warmup_steps=settings.lr_warmup_steps,
            lr_decay_steps=max(config.train.steps, settings.lr_warmup_steps + 1),
            lr_decay_style="constant",
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        core.grad_scale_func = self.inner.scale_loss
        core.finalize_model_grads_func = _finalize
        if self.chunks[0].ddp_config.overlap_grad_reduce:
            quiet = [chunk.no_sync for chunk in self.chunks]
            core.no_sync_func = quiet if len(quiet) > 1 else quiet[0]

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.inner.param_groups[0]["lr"]

    def start_step(self) -> None:
        """Advance the warm-up by one training step: the first step runs at lr / lr_warmup_steps."""
        self.schedule.step(1)

    def zero_grad(self) -> None:
        """Clear the gradient buffers before a forward-backward pass."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.inner.zero_grad()

    def step(self, loss: float) -> tuple[float, bool]:
        """Clip and update. (gradient norm before clipping, whether the weights moved): not for a non-finite
        loss or norm.

        `loss` is the same on all ranks, and so is the norm: all ranks decide alike.
        """
        self.inner.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return norm, False
        self.inner.step()
        self.updates += 1
        return norm, True

    def gather_weights(self) -> None:
        """Bring the updated weights to all ranks, which otherwise happens while the next forward pass runs."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def state(self) -> Iterator[Tensor]:
        """What only updates need: fp32 masters, where they are not the model's own parameters, and Adam's
        moments.
        """
        own = {
            parameter.untyped_storage()._cdata for chunk in self.chunks for parameter in chunk.parameters()
        }
        for inner in getattr(self.inner, "chained_optimizers", [self.inner]):
            for master in (master for group in inner.optimizer.param_groups for master in group["params"]):
                if master.untyped_storage()._cdata not in own:
                    yield master
                yield from (
                    moment
                    for name, moment in inner.optimizer.state.get(master, {}).items()
                    if name in MOMENTS
                )

    def gradients(self) -> Iterator[Tensor]:
        """The buffers that gradients are summed in."""
        for chunk in self.chunks:
            yield from (buffer.grad_data for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers])

    def held_range(self, parameter: Parameter) -> tuple[int, int]:
        """Flat elements of `parameter` whose fp32 values and moments this rank's optimizer holds: start,
        end.
        """
        return self._holding(parameter)[:2]

    def shard_of(self, parameter: Parameter) -> Shard:
        """The part of `parameter` this rank keeps where each element is kept once, as it is now.

        That is what its optimizer holds, or an even share of it where all ranks of its replica group hold the
        same. The values are the optimizer's own memory, or the host's copy while they are parked.
        """
        start, end, master, adam = self._holding(parameter)
        if master is None:
            return Shard(0, 0, parameter.new_empty(0, dtype=torch.float32), {})
        values = self.host.values(master.detach()).view(-1)
        state = adam.state.get(master) or {name: torch.zeros_like(master) for name in MOMENTS}
        moments = {name: self.host.values(state[name]).view(-1) for name in MOMENTS}
        if not self.config.use_distributed_optimizer:
            rank, size = (group := replica_group(parameter)).rank(), group.size()
            share = -(-end // size)
            start, end = min(rank * share, end), min((rank + 1) * share, end)
            values, moments = values[start:end], {name: moment[start:end] for name, moment in moments.items()}
        return Shard(start, end, values, moments)

    @torch.no_grad()
    def restore(self, parameter: Parameter, values: Tensor, moments: dict[str, Tensor]) -> None:
        """Put back the fp32 `values` and `moments` of the `held_range`, flat; `updates` must have been set
        before.
        """
        _, _, master, adam = self._holding(parameter)
        if master is None:
            return
        master.view(-1).copy_(values)
        if self.updates:
            state = adam.state[master]
            for name in MOMENTS:
                state[name] = moments[name].to(master.device, torch.float32, copy=True).view(master.shape)
            if isinstance(
                adam, torch.optim.Adam
            ):  # torch's own counts updates for each parameter, Apex's kin for each group
                state["step"] = torch.tensor(float(self.updates), dtype=torch.float32)
            else:
                for group in adam.param_groups:
                    group["step"] = self.updates

    def _holding(self, parameter: Parameter) -> tuple[int, int, Tensor | None, torch.optim.Optimizer | None]:
        """(start, end, fp32 master of that range, the torch optimizer that has it) of what this rank holds
        of `parameter`.
        """
        for inner in getattr(self.inner, "chained_optimizers", [self.inner]):
            if parameter in getattr(inner, "model_param_gbuf_map", ()):
                owned = inner._get_model_param_range_map(parameter)["param"]
                group, place = inner.model_param_group_index_map[parameter]
                return (
                    owned.start,
                    owned.end,
                    inner.optimizer.param_groups[group]["params"][place],
                    inner.optimizer,
                )
            if not self.config.use_distributed_optimizer:
                master = getattr(parameter, "main_param", None)
                master = parameter if master is None else master
                if any(master is own for group in inner.optimizer.param_groups for own in group["params"]):
                    return 0, parameter.numel(), master, inner.optimizer
        return 0, 0, None, None
