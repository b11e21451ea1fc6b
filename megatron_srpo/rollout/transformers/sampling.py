"""Sample one token for each row of logits, by inverting the cumulative distribution."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_srpo.rollout.engine import Sampling

_BLOCK = 512  # tokens whose mass is summed before masses are accumulated in float64
_NUCLEUS = 256  # tokens that are sorted first; most nuclei are smaller
_BELOW_1 = 1 - 2**-52


class Chosen(NamedTuple):
    """One token per row.

    Attributes:
        ids: Token ids. [n]
        logprobs: Natural logarithms of their probabilities. [n], float32.
    """

    ids: Tensor
    logprobs: Tensor


def uniforms(seed: str, count: int) -> np.ndarray:
    """Return `count` uniform numbers in [0, 1) for a sample's seed, independently of its batch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed.encode())))).random(count)


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Chosen:
    """Return the first token of each row whose cumulative probability exceeds the row's uniform number.

    Tokens are in the order of their ids, or by falling probability with top_p below 1. The vocabulary is
    read a few times in float32. Only the sums of its blocks, and one block a row, are accumulated in float64.

    Args:
        logits: [n, V], float32.
        uniforms: In [0, 1). [n], float64.
        sampling: With temperature 0, the most probable token is chosen, and log-probabilities are at
            temperature 1.
    """
    rows, vocabulary = logits.shape
    highest = logits.amax(-1, keepdim=True)
    scale = 1 / (sampling.temperature or 1.0)
    blocks = -(-vocabulary // _BLOCK)
    weights = logits.new_empty(rows, blocks * _BLOCK)
    weights[:, vocabulary:] = 0
    torch.sub(logits, highest, out=weights[:, :vocabulary]).mul_(scale).exp_()
    masses = weights.view(rows, blocks, _BLOCK).sum(-1).double().cumsum(-1)
    total = masses[:, -1:]
    if sampling.temperature == 0:
        place, kept = logits.argmax(-1, keepdim=True), total
    elif sampling.top_p < 1:
        place, kept = _from_nucleus(weights, total, uniforms[:, None], sampling.top_p)
    else:
        place, kept = _from_all(weights, masses, uniforms[:, None]), total
    logprobs = (logits.gather(1, place) - highest).double() * scale - kept.log()
    return Chosen(place[:, 0], logprobs[:, 0].float())


def _from_all(weights: Tensor, masses: Tensor, uniforms: Tensor) -> Tensor:
    """Return tokens [n, 1] for weights [n, blocks · _BLOCK] and cumulative masses of blocks [n, blocks]."""
    total = masses[:, -1:]
    target = torch.minimum(uniforms * total, total * _BELOW_1)
    block = (masses <= target).sum(-1, keepdim=True).clamp(max=masses.shape[1] - 1)
    before = torch.where(block > 0, masses.gather(1, (block - 1).clamp(min=0)), 0.0)
    places = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, places).double().cumsum(-1)
    # the block's sum may be rounded above its last cumulative mass
    rest = torch.minimum(target - before, inside[:, -1:] * _BELOW_1)
    return block * _BLOCK + (inside <= rest).sum(-1, keepdim=True).clamp(max=_BLOCK - 1)


def _from_nucleus(weights: Tensor, total: Tensor, uniforms: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return tokens [n, 1] of the smallest set whose mass reaches top_p, and the set's mass [n, 1]."""
    needed = top_p * total
    count = min(_NUCLEUS, weights.shape[1])
    while True:
        highest, ids = weights.topk(count, dim=-1)
        masses = highest.double().cumsum(-1)
        if count == weights.shape[1] or not (masses[:, -1:] < needed).any():
            break
        count = min(8 * count, weights.shape[1])
    last = (masses < needed).sum(-1, keepdim=True).clamp(max=count - 1)
    nucleus = masses.gather(1, last)
    place = (masses <= uniforms * nucleus).sum(-1, keepdim=True)
    return ids.gather(1, torch.minimum(place, last)), nucleus
