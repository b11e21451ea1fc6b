"""Compare two models: tensor by tensor, and by their logits on random ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from _transformers import Reference
from torch import Tensor

from megatron_srpo.distributed.byte_progress import ByteProgress
from megatron_srpo.weights.sources import Tensors

LOGIT_TOKENS = (2, 48)  # sequences, their length
_BLOCK = 2**24  # elements compared at once


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of two tensors; `relative` to the first's largest magnitude."""

    name: str
    largest: float
    relative: float
    elements: int
    total: int

    def __str__(self) -> str:
        most = f"by at most {self.largest:.3g} ({self.relative:.3g} of its largest element)"
        return f"{self.name}: {self.elements} of {self.total} elements differ, {most}"


def difference(name: str, first: Tensor, second: Tensor) -> Difference | None:
    """Return None for equal values of any dtypes; NaN equals NaN and differs from all else by infinity."""
    if first.dtype == second.dtype and torch.equal(first, second):
        return None
    elements, largest, scale = 0, 0.0, 0.0
    pairs = zip(first.reshape(-1).split(_BLOCK), second.reshape(-1).split(_BLOCK), strict=True)
    for one, other in ((one.float(), other.float()) for one, other in pairs):
        gap = (one - other).abs_()
        same = (one == other) | (one.isnan() & other.isnan())  # infinities, too
        gap = gap.nan_to_num_(nan=torch.inf, posinf=torch.inf).masked_fill_(same, 0)
        elements += int(gap.count_nonzero())
        largest = max(largest, float(gap.max()))
        scale = max(scale, float(one.abs().nan_to_num_(nan=0).max()))
    if not elements:
        return None
    return Difference(name, largest, largest / scale if scale else torch.inf, elements, first.numel())


def compare_tensors(first: Tensors, second: Tensors, progress: ByteProgress) -> Iterator[Difference | str]:
    """Yield what differs, in the first's order: a Difference, or a line about names and shapes."""
    names, others = first.names(), set(second.names())
    for name in names:
        if name not in others:
            yield f"{name}: missing from the second"
        elif first.shape(name) != second.shape(name):
            yield f"{name}: has shape {list(first.shape(name))}, in the second {list(second.shape(name))}"
        elif (found := difference(name, tensor := first.tensor(name), second.tensor(name))) is not None:
            yield found
        if name in others and first.shape(name) == second.shape(name):
            progress.advance(tensor.nbytes)
    for name in sorted(others - set(names)):
        yield f"{name}: missing from the first"


def logits(source: Tensors, config_folder: Path, seed: int = 0) -> Tensor:
    """Compute fp32 logits [sequences, tokens, vocabulary] of transformers' model on random ids."""
    reference = Reference(config_folder)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, reference.config.vocab_size, LOGIT_TOKENS, generator=generator)
    return reference.compute_logits(source, ids)
