"""The likeliest tokens of every position, over all shards of the vocabulary: for people to look at, not for
the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_srpo.vocab_parallel.divergence import log_sum_exp, top_ids
from megatron_srpo.vocab_parallel.logits import Teacher
from megatron_srpo.vocab_parallel.shard import (
    VocabShard,
    accumulation_dtype,
    all_reduce,
    check_consistent,
    local_columns,
)

_TILE_TOKENS = 128


class TopTokens(NamedTuple):
    """ids: [T, k], the likeliest first. logprobs: [T, k] of these, nats. target_logprob: [T] of the targets."""

    ids: Tensor
    logprobs: Tensor
    target_logprob: Tensor


@torch.no_grad()
def top_tokens(
    source: Teacher, targets: Tensor, shard: VocabShard, k: int, temperature: float = 1.0
) -> TopTokens:
    """The k likeliest ids (all, where the vocabulary has fewer) and their exact log-probabilities, the same
    on every rank.

    Args:
        source: logits of T tokens, or what they are made of. targets: [T] ids.
        temperature: logits are divided by it.

    One product a token and five small collectives a tile of 128 tokens; memory: three fp32 tiles of this
    shard's width. Raises ValueError when source and shard do not fit each other.
    """
    own, k = source.tensor, min(k, shard.vocab_size)
    check_consistent(source.problem("source", shard), shard, {"tokens": len(own), "k": k}, own.device)
    parts = []
    for start in range(0, len(own), _TILE_TOKENS):
        rows = slice(start, min(start + _TILE_TOKENS, len(own)))
        logits = torch.empty(
            rows.stop - start, shard.width, dtype=accumulation_dtype(own.dtype), device=own.device
        )
        source.write(rows, logits, 1.0 / temperature)
        logprobs = logits - log_sum_exp(logits, shard.group)[:, None]
        ids = top_ids(logprobs, k, shard)
        parts.append((ids, _at(ids, logprobs, shard), _at(targets[rows, None], logprobs, shard)[:, 0]))
    if not parts:
        empty = torch.empty(0, k, dtype=accumulation_dtype(own.dtype), device=own.device)
        return TopTokens(empty.long(), empty, empty[:, 0])
    return TopTokens(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _at(ids: Tensor, logprobs: Tensor, shard: VocabShard) -> Tensor:
    """The log-probabilities of ids [n, k], whoever holds them."""
    mine, column = local_columns(ids, shard)
    values = (
        torch.where(mine, logprobs.gather(1, column), 0.0) if shard.width else logprobs.new_zeros(ids.shape)
    )
    return all_reduce(values, shard.group)
