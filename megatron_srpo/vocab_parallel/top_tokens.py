"""The likeliest tokens at every position, over all vocabulary shards: for reports, not for the loss."""

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
    """The k likeliest ids of T tokens; log-probs are in nats."""

    ids: Tensor  # [T, k], the likeliest first
    logprobs: Tensor  # [T, k]
    target_logprob: Tensor  # [T]


@torch.no_grad()
def top_tokens(
    source: Teacher, targets: Tensor, shard: VocabShard, k: int, temperature: float = 1.0
) -> TopTokens:
    """Find the k likeliest ids (all, if the vocabulary has fewer) and their exact log-probs, on every rank.

    Cost: one matrix product, five small collectives per tile of 128 tokens, and memory of three fp32 tiles.

    Raises:
        ValueError: On all ranks together, if source and shard do not match.
    """
    like, k, error = source.tensor, min(k, shard.vocab_size), None
    try:
        source.validate("source", shard)
    except ValueError as exception:
        error = exception
    check_consistent(error, shard, {"tokens": len(like), "k": k}, like.device)
    dtype = accumulation_dtype(like.dtype)
    empty = like.new_empty((0, k), dtype=dtype)
    tiles = [TopTokens(empty.long(), empty, empty.sum(1))]
    for start in range(0, len(like), _TILE_TOKENS):
        rows = slice(start, min(start + _TILE_TOKENS, len(like)))
        logits = like.new_empty((rows.stop - start, shard.width), dtype=dtype)
        source.write(rows, slice(0, shard.width), logits, 1.0 / temperature)
        logprobs = logits - log_sum_exp(logits, shard.group)[:, None]
        ids = top_ids(logprobs, k, shard)
        target_logprob = _gather_logprobs(targets[rows, None], logprobs, shard)[:, 0]
        tiles.append(TopTokens(ids, _gather_logprobs(ids, logprobs, shard), target_logprob))
    return TopTokens(*(torch.cat(column) for column in zip(*tiles, strict=True)))


def _gather_logprobs(ids: Tensor, logprobs: Tensor, shard: VocabShard) -> Tensor:
    values = logprobs.new_zeros(ids.shape)
    if shard.width:
        is_local, columns = local_columns(ids, shard)
        values = torch.where(is_local, logprobs.gather(1, columns), 0.0)
    return all_reduce(values, shard.group)
