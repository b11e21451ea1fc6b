"""Megatron's DDP, optimizer and learning-rate schedule around the model chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_srpo.config import Config
from megatron_srpo.model.qwen3 import Qwen3
from megatron_srpo.runtime import cpu
from megatron_srpo.runtime.parallel import replica_group

cpu.install()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (  # noqa: E402
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402


def wrap_data_parallel(chunks: Sequence[Qwen3], config: Config) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers; gradients are summed, not averaged, over data-parallel ranks, in fp32."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        average_in_collective=False,
    )
    return [DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)]


def _finalize(chunks, num_tokens=None, **kwargs) -> None:
    """Reduce gradients; the loss is divided already, so Megatron's own division by `num_tokens` is left out."""
    finalize_model_grads(chunks, None, **kwargs)


class Shard(NamedTuple):
    """The part of a parameter whose fp32 value this rank keeps: flat elements start … end - 1."""

    start: int
    end: int
    values: Tensor


class Optimizer:
    """AdamW with warm-up and global gradient clipping over Megatron's (distributed) optimizer."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], config: Config):
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
        self.chunks = list(chunks)
        self.inner = get_megatron_optimizer(self.config, self.chunks, config_overrides=get_standard_config_overrides(self.config))
        # The scheduler also applies the weight-decay multipliers (none for norms), so it must exist before the first step.
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
        """Clip and update. (gradient norm before clipping, whether the weights moved): not for a non-finite loss or norm.

        `loss` is the same on all ranks, and so is the norm: all ranks decide alike.
        """
        self.inner.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return norm, False
        self.inner.step()
        return norm, True

    def shard_of(self, parameter: Parameter) -> Shard:
        """The elements of `parameter` this rank of its replica group keeps in fp32, as they are now.

        With the distributed optimizer in bf16 these are its master weights; otherwise every rank holds all of them and
        takes an even share.
        """
        master = getattr(parameter, "main_param", None)
        if getattr(parameter, "main_param_sharded", False):
            if master is None:
                return Shard(0, 0, parameter.new_empty(0, dtype=torch.float32))
            for optimizer in getattr(self.inner, "chained_optimizers", [self.inner]):
                if parameter in optimizer.model_param_gbuf_map:
                    owned = optimizer._get_model_param_range_map(parameter)["param"]
                    return Shard(owned.start, owned.end, master.detach())
        full = (parameter if master is None else master).detach().view(-1)
        rank, size = (group := replica_group(parameter)).rank(), group.size()
        share = -(-full.numel() // size)
        start, end = min(rank * share, full.numel()), min((rank + 1) * share, full.numel())
        return Shard(start, end, full[start:end])
