"""Context parallelism: which tokens of a packed row, and which policy tokens of the loss, belong to a rank.

Every sequence is padded to a multiple of 2·C tokens, of C context-parallel ranks, and cut into 2·C chunks;
rank r holds chunks r and 2·C - 1 - r, so that causal attention costs all ranks the same. Megatron's rotary
embeddings and Transformer Engine's attention take this order for granted.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ContextParallel(NamedTuple):
    """A rank among those that share each sequence."""

    rank: int = 0
    size: int = 1

    @property
    def multiple(self) -> int:
        """Return the divisor of every padded sequence length."""
        return 2 * self.size if self.size > 1 else 1

    def padded(self, length: int) -> int:
        """Round `length` up to `multiple`."""
        return -(-length // self.multiple) * self.multiple

    def share(self, count: int) -> slice:
        """Return which of a sequence's `count` policy tokens this rank's loss takes; none if they are few."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def local_tokens(self, positions: Tensor) -> Tensor:
        """Return this rank's tokens of a row, in its order, from its `gathered_positions`: [T / size]."""
        return positions.argsort().view(self.size, -1)[self.rank]


def gathered_positions(bounds: Tensor, size: int) -> Tensor:
    """Return where each token of a row is once the parts of `size` > 1 ranks are concatenated: [T].

    Args:
        bounds: [sequences + 1] integers, where the padded sequences begin and the last one ends.
    """
    total, lengths = int(bounds[-1]), bounds.diff()
    start = bounds[:-1].repeat_interleave(lengths, output_size=total).long()
    chunk = (lengths // (2 * size)).repeat_interleave(lengths, output_size=total).long()
    within = torch.arange(total, device=bounds.device) - start
    number = within // chunk
    rank = number.minimum(2 * size - 1 - number)
    return rank * (total // size) + start // size + within % chunk + chunk * (number >= size)
