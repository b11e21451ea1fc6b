"""Keys and values of a batch, and the attention function that transformers' models call with them.

Rows that continue the same context form a group. The context's keys and values are stored once for the group,
and its rows attend to them in one matrix product; those of the response are stored for each row (cf. Juravsky
et al., arXiv 2402.05099). Both parts are exact: their softmaxes are merged by their normalisers.

Memory in tokens, each with 2 · layers · key-value heads · head dimension · element size bytes: groups in the
batch × longest context (in steps of 64), and rows × longest response so far (in steps of 128). When that
grows, one layer at a time is copied. Rows that finish leave their place to waiting ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

ATTENTION = "megatron_srpo"  # name of the attention function in transformers' registry
_PREFIX_STEP, _RESPONSE_STEP = 64, 128  # tokens by which the stores grow


class AttentionPass(Protocol):
    """The keys and values that the attention of one forward pass stores and reads."""

    longest: int  # tokens of the longest sequence

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store keys and values [T, kv heads, d]; return the attention of queries [T, heads, d]."""
        ...


def register_attention() -> str:
    """Register the attention function with transformers, without a mask function; return its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    return ATTENTION


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention_pass: AttentionPass,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over packed tokens: query [1, heads, T, d], key and value [1, kv heads, T, d]."""
    if attention_mask is not None:
        raise ValueError("the embedded engine's attention takes no mask")
    if sliding_window is not None and attention_pass.longest > sliding_window:
        raise ValueError(f"{attention_pass.longest} tokens exceed the sliding window of {sliding_window}")
    layer: Any = module.layer_idx
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attention_pass.attend(layer, query, key, value, scaling)[None], None


class _Store:
    """Keys and values of one layer: [2, places, kv heads, tokens, d], zero where nothing was written."""

    def __init__(self, step: int):
        self.step = step
        self.content: Tensor | None = None

    def reserve(self, places: int, tokens: int, like: Tensor) -> Tensor:
        """Return the content after growing it to the given size; `like` [T, kv heads, d] gives the rest."""
        old = self.content
        if old is None or places > old.shape[1] or tokens > old.shape[3]:
            tokens = -(-tokens // self.step) * self.step
            if old is not None:
                places, tokens = max(places, old.shape[1]), max(tokens, old.shape[3])
            new = like.new_zeros(2, places, like.shape[1], tokens, like.shape[2])
            if old is not None:
                new[:, : old.shape[1], :, : old.shape[3]] = old
            self.content = new
            return new
        return old

    def move(self, sources: Tensor, targets: Tensor, tokens: int) -> None:
        """Copy the first `tokens` tokens of some places to others."""
        if self.content is not None:
            used = self.content[:, :, :, :tokens]
            used[:, targets] = used[:, sources]


class SharedPrefixCache:
    """Contexts by group and responses by row, in places from 0 without gaps."""

    def __init__(self, layers: int, rows: int, device: torch.device):
        self.rows = rows
        self.device = device
        self.prefixes = [_Store(_PREFIX_STEP) for _ in range(layers)]
        self.responses = [_Store(_RESPONSE_STEP) for _ in range(layers)]
        self.lengths: list[int] = []  # tokens of each group's context

    def prefill(self, lengths: Sequence[int]) -> Prefill:
        """Return the pass that appends a group for each of the packed contexts."""
        first = len(self.lengths)
        self.lengths += lengths
        return Prefill(self, first, lengths)

    def move_rows(self, moves: Sequence[tuple[int, int]], tokens: int) -> None:
        """Move rows (source, target) with up to `tokens` response tokens."""
        _move(self.responses, moves, tokens, self.device)

    def move_groups(self, moves: Sequence[tuple[int, int]], count: int) -> None:
        """Move groups (source, target), and keep the first `count`."""
        _move(self.prefixes, moves, max(self.lengths), self.device)
        for source, target in moves:
            self.lengths[target] = self.lengths[source]
        del self.lengths[count:]


def _move(
    stores: Sequence[_Store], moves: Sequence[tuple[int, int]], tokens: int, device: torch.device
) -> None:
    if moves:
        sources, targets = torch.tensor(moves, device=device).unbind(1)
        for store in stores:
            store.move(sources, targets, tokens)


class Prefill:
    """Causal attention within each of several packed contexts."""

    def __init__(self, cache: SharedPrefixCache, first: int, lengths: Sequence[int]):
        self.cache = cache
        self.first = first
        self.lengths = lengths
        self.longest = max(lengths)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """See AttentionPass."""
        cache = self.cache
        content = cache.prefixes[layer].reserve(len(cache.lengths), max(cache.lengths), key)
        output = torch.empty_like(query)
        end = 0
        for group, length in enumerate(self.lengths, self.first):
            part = slice(end, end + length)
            end += length
            keys, values = content[:, group, :, :length]
            keys.copy_(key[part].transpose(0, 1))
            values.copy_(value[part].transpose(0, 1))
            queries = query[part].transpose(0, 1)[None]
            attended = scaled_dot_product_attention(
                queries, keys[None], values[None], is_causal=True, scale=scaling, enable_gqa=True
            )
            output[part] = attended[0].transpose(0, 1)
        return output


class Decoding:
    """Attention of one new token per row, while the rows and their groups stay the same.

    Rows of a group are padded to the largest group: their queries form a grid [groups, size].
    """

    def __init__(self, cache: SharedPrefixCache, groups: Sequence[int]):
        """Arrange the rows; `groups` has each row's group. Groups whose requests all wait have no row."""
        size = [0] * len(cache.lengths)
        cells = []
        for group in groups:
            cells.append((group, size[group]))
            size[group] += 1
        self.cache = cache
        self.size = max(size)
        self.group, self.member = torch.tensor(cells, device=cache.device).unbind(1)  # [n]
        self.row = torch.zeros(len(size), self.size, dtype=torch.long, device=cache.device)  # by cell
        self.row[self.group, self.member] = torch.arange(len(groups), device=cache.device)
        self.context = max(cache.lengths)
        self.prefix_bias = _bias(cache.lengths, cache.device)
        self.longest = 0

    def step(self, ages: Sequence[int]) -> Decoding:
        """Prepare the pass for the rows' next tokens, which come after `ages` response tokens."""
        device = self.cache.device
        self.tokens = max(ages) + 1
        self.longest = self.context + self.tokens
        self.response_bias = _bias([age + 1 for age in ages], device)
        self.place: tuple[Any, ...] = (slice(len(ages)), slice(None), ages[0])
        if self.response_bias is not None:
            self.place = (
                torch.arange(len(ages), device=device),
                slice(None),
                torch.tensor(ages, device=device),
            )
        return self

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """See AttentionPass."""
        cache, (rows, heads, d), kv_heads = self.cache, query.shape, key.shape[1]
        groups, shared = len(cache.lengths), heads // kv_heads
        responses = cache.responses[layer].reserve(cache.rows, self.tokens, key)
        responses[0][self.place] = key
        responses[1][self.place] = value
        queries = query.reshape(rows, kv_heads, shared, d)
        keys, values = responses[:, :rows, :, : self.tokens]
        own = _Attended(queries, keys, values, self.response_bias, scaling)
        content = cache.prefixes[layer].content
        assert content is not None
        keys, values = content[:, :groups, :, : self.context]
        grid = queries[self.row].transpose(1, 2)  # [groups, kv heads, size, shared, d]
        grid = grid.reshape(groups, kv_heads, self.size * shared, d)
        prefix = _Attended(grid, keys, values, self.prefix_bias, scaling)
        shape = (groups, kv_heads, self.size, shared, -1)
        normaliser, output = (
            tensor.view(shape).transpose(1, 2)[self.group, self.member]
            for tensor in (prefix.normaliser, prefix.output)
        )
        share = torch.sigmoid(normaliser - own.normaliser)  # of the context in the sum of both
        return own.output.lerp(output, share).to(query.dtype).view(rows, heads, d)


class _Attended:
    """Attention of queries [B, kv heads, m, d] over keys and values [B, kv heads, L, d], in float32.

    Attributes:
        output: [B, kv heads, m, d]
        normaliser: Logarithm of the softmax's denominator. [B, kv heads, m, 1]
    """

    def __init__(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float):
        scores = _scores(queries, keys).mul_(scaling)
        if bias is not None:
            scores.add_(bias)
        highest = scores.amax(-1, keepdim=True)
        scores.sub_(highest).exp_()
        total = scores.sum(-1, keepdim=True)
        self.output = (scores.to(values.dtype) @ values).float().div_(total)
        self.normaliser = highest + total.log()


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the products [B, kv heads, m, L] in float32, not rounded to the dtype of the keys."""
    keys = keys.transpose(2, 3)
    if queries.is_cuda and queries.dtype != torch.float32:
        flat = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1), out_dtype=torch.float32)
        return flat.view(*queries.shape[:3], -1)
    return queries.float() @ keys.float()


def _bias(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Return 0 at places below each length, else -inf, [n, 1, 1, longest]; None if all lengths are equal."""
    if min(lengths) == max(lengths):
        return None
    places = torch.arange(max(lengths), device=device)
    is_beyond = places >= torch.tensor(lengths, device=device)[:, None]
    bias = torch.zeros(is_beyond.shape, device=device).masked_fill_(is_beyond, float("-inf"))
    return bias[:, None, None]
