"""Megatron's pipeline schedules over packed micro-batches: one call for forward only and for
forward-backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_srpo.distributed.megatron import get_forward_backward_func
from megatron_srpo.model.build import PolicyModel, packed_params
from megatron_srpo.training.packing import MicroBatch

# on_output(number of the micro-batch, its final hidden states at response positions [R, H], the model) ->
# partial loss
OnOutput = Callable[[int, Tensor, PolicyModel], Tensor]


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    on_output: OnOutput,
    backward: bool,
) -> None:
    """Send the micro-batches through the pipeline; `on_output` is called for each on the last stage.

    The partial losses must already be divided by the batch's denominator: nothing is scaled on the way, and
    the gradients summed over micro-batches and data-parallel ranks are those of their sum.
    """
    if not micro_batches:
        return
    device = next(chunks[0].parameters()).device

    def forward_step(iterator, model):
        number, batch = next(iterator)
        output = model(
            batch.ids[None].to(device),
            batch.positions[None].to(device),
            None,
            packed_seq_params=packed_params(batch.cu_seqlens.to(device), batch.max_seqlen),
        )

        def loss(output: Tensor):
            inner = model
            while hasattr(inner, "module"):
                inner = inner.module
            hidden = inner.final_hidden(output)[batch.predicts.to(device)]
            value = on_output(number, hidden, inner)
            return value, torch.zeros((), dtype=torch.int, device=device), {}

        return output, loss

    iterators = [iter(list(enumerate(micro_batches))) for _ in chunks]
    pipelined = len(chunks) > 1
    with torch.set_grad_enabled(backward):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if pipelined else iterators[0],
            model=list(chunks) if pipelined else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=int(
                micro_batches[0].cu_seqlens[-1]
            ),  # pipelines get rows of one length (PackingRules.uniform)
            micro_batch_size=1,
            forward_only=not backward,
        )
