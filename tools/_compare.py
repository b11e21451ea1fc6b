"""Compares two models: tensor by tensor, and by their logits on random ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_srpo.distributed.byte_progress import ByteProgress
from megatron_srpo.weights.sources import Tensors

LOGIT_TOKENS = (2, 48)  # sequences, their length


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
    first, second = first.float(), second.float()
    gap = (first - second).abs_()
    same = (first == second) | (first.isnan() & second.isnan())  # infinities, too
    gap = gap.nan_to_num_(nan=torch.inf, posinf=torch.inf).masked_fill_(same, 0)
    if not (elements := int(gap.count_nonzero())):
        return None
    largest, scale = float(gap.max()), float(first.abs().nan_to_num_(nan=0).max())
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
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = AutoConfig.from_pretrained(config_folder, local_files_only=True)
    weights = {name: source.tensor(name).float() for name in source.names()}
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32).eval()
    ids = torch.randint(0, config.vocab_size, LOGIT_TOKENS, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits
