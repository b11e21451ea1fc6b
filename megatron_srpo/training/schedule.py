"""Megatron's pipeline schedules over packed micro-batches: forward only, or forward and backward."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_srpo.distributed.megatron import get_forward_backward_func
from megatron_srpo.model.build import PolicyModel
from megatron_srpo.training.packing import MicroBatch

# on_output(index of the micro-batch, final hidden states that predict its targets [R, H], model) → loss
OnOutput = Callable[[int, Tensor, PolicyModel], Tensor]


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    on_output: OnOutput,
    backward: bool,
) -> None:
    """Run the micro-batches through the pipeline; on the last stage, `on_output` returns each one's loss.

    With `backward`, gradients of the sum of the losses are accumulated.
    """
    if not micro_batches:
        return
    device = next(chunks[0].parameters()).device

    def forward_step(iterator, model):
        number, batch = next(iterator)
        ids, positions = batch.ids.to(device), batch.positions.to(device)
        row = _policy_model(model).packed_row(batch.documents, positions)
        output = model(ids[None], positions[None], None, packed_seq_params=row)
        return output, partial(_loss, on_output, number, batch.predicts.to(device), model)

    iterators = [iter(list(enumerate(micro_batches))) for _ in chunks]
    interleaved = len(chunks) > 1
    with torch.set_grad_enabled(backward):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if interleaved else iterators[0],
            model=list(chunks) if interleaved else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].total,  # with pipelines, all rows have this length
            micro_batch_size=1,
            forward_only=not backward,
        )


def _loss(
    on_output: OnOutput, number: int, predicts: Tensor, model: torch.nn.Module, output: Tensor
) -> tuple[Tensor, Tensor, dict]:
    """Return the loss and, as Megatron expects, an unused number of tokens and an empty log."""
    policy = _policy_model(model)
    value = on_output(number, policy.final_hidden(output)[predicts], policy)
    return value, torch.zeros((), dtype=torch.int, device=output.device), {}


def _policy_model(model: torch.nn.Module) -> PolicyModel:
    """Return the model inside Megatron's wrappers."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    assert isinstance(inner, PolicyModel)
    return inner
