"""Context parallelism: the tokens of a packed row, and the policy tokens of the loss, that belong to a rank.

Every sequence is padded to a multiple of 2·C tokens for C context-parallel ranks, and cut into 2·C chunks;
rank r holds chunks r and 2·C - 1 - r, so that causal attention costs all ranks the same. Megatron's rotary
embeddings and Transformer Engine's attention assume this order.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ContextParallel(NamedTuple):
    """This rank among those that share each sequence."""

    rank: int = 0
    size: int = 1

    @property
    def multiple(self) -> int:
        """The divisor of every padded sequence length."""
        return 2 * self.size if self.size > 1 else 1

    def padded(self, length: int) -> int:
        """Round `length` up to `multiple`."""
        return -(-length // self.multiple) * self.multiple

    def share(self, count: int) -> slice:
        """Return this rank's part of a sequence's `count` policy tokens in the loss; may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def local_tokens(self, positions: Tensor) -> Tensor:
        """Return the positions of this rank's tokens in a row with these `gathered_positions`: [T / size]."""
        return positions.argsort().view(self.size, -1)[self.rank]


def gathered_positions(bounds: Tensor, size: int) -> Tensor:
    """Return the position of each token of a row after the ranks' parts are concatenated: [T].

    Args:
        bounds: [sequences + 1] integers, the start of each padded sequence and the end of the last one.
        size: Number of context-parallel ranks, at least 2.
    """
    total, lengths = int(bounds[-1]), bounds.diff()
    start = bounds[:-1].repeat_interleave(lengths, output_size=total).long()
    chunk = (lengths // (2 * size)).repeat_interleave(lengths, output_size=total).long()
    within = torch.arange(total, device=bounds.device) - start
    number = within // chunk
    rank = number.minimum(2 * size - 1 - number)
    return rank * (total // size) + start // size + within % chunk + chunk * (number >= size)
