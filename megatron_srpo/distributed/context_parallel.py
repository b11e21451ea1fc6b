"""Context parallelism: which tokens of a packed row, and which response tokens of the loss, belong to a rank.

Every document is padded to a multiple of 2·C tokens, of C context-parallel ranks, and cut into 2·C chunks;
rank r holds chunks r and 2·C - 1 - r, so that causal attention costs all ranks the same. It is the order that
Megatron's rotary embeddings and Transformer Engine's attention take for granted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Context(NamedTuple):
    """A rank among those that share each document."""

    rank: int = 0
    size: int = 1

    @property
    def multiple(self) -> int:
        """What the length of a document must be a multiple of."""
        return 2 * self.size if self.size > 1 else 1

    def padded(self, length: int) -> int:
        """`length` rounded up to it."""
        return -(-length // self.multiple) * self.multiple

    def share(self, count: int) -> slice:
        """Those of a document's `count` response tokens that this rank's loss is made of.

        Too few for all ranks: some get none.
        """
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def held(self, place: Tensor) -> Tensor:
        """[T / size] the row's tokens on this rank, in its order, by the row's `places`."""
        return place.argsort().view(self.size, -1)[self.rank]


ALONE = Context()


def places(bounds: Tensor, size: int) -> Tensor:
    """[T] where each token of a row is found once the parts of `size` > 1 ranks are gathered, one after
    another.

    bounds: [documents + 1] integers, where the padded documents begin and the last one ends.
    """
    total, lengths = int(bounds[-1]), bounds.diff()
    start, chunk = (
        values.repeat_interleave(lengths, output_size=total).long()
        for values in (bounds[:-1], lengths // (2 * size))
    )
    within = torch.arange(total, device=bounds.device) - start
    number = within // chunk
    rank = number.minimum(2 * size - 1 - number)
    return rank * (total // size) + start // size + within % chunk + chunk * (number >= size)
