"""Sample a fixed set of requests by continuous batching: finished rows leave, waiting requests enter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.rollout.engine import EMPTY, Completion, EngineFailed, Request, Sampling
from megatron_srpo.rollout.transformers.cache import AttentionPass, Decoding, SharedPrefixCache
from megatron_srpo.rollout.transformers.sampling import sample, uniforms

_PREFILL_TOKENS = 2048  # of contexts packed into one forward pass; a longer one is alone
_ENTRY_SHARE = 8  # requests enter when 1/8 of the rows is free: each entry costs a forward pass


def context_of(request: Request) -> tuple[int, ...]:
    """Return the tokens before the first one to sample."""
    return request.prompt_ids + tuple(request.start.ids if request.start else ())


@dataclass(eq=False)
class _Group:
    """Requests with the same context, in this order: not prefilled, in the batch, finished."""

    context: tuple[int, ...]
    waiting: list[int]  # requests
    logits: Tensor | None = None  # [V], after the context, while requests wait
    rows: int = 0


@dataclass(eq=False)
class _Row:
    number: int  # of the request
    group: _Group
    limit: int  # tokens to sample at most
    uniforms: np.ndarray  # one a token to sample
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Wave:
    """Samples of a fixed set of requests, `batch_size` rows at once.

    Admission, the shapes of all passes and the places of rows depend on the requests and their samples only,
    so the same requests give the same bits.
    """

    def __init__(
        self, model: Any, requests: Sequence[Request], sampling: Sampling, version: str, batch_size: int
    ):
        self.model = model
        self.requests = requests
        self.sampling = sampling
        self.version = version
        self.device: torch.device = model.device
        self.size = min(batch_size, len(requests))
        self.rows: list[_Row] = []
        self.groups: list[_Group] = []  # prefilled, by their place in the cache
        self.cache = SharedPrefixCache(model.config.num_hidden_layers, self.size, self.device)
        self.completions: dict[int, Completion] = {}

    @torch.inference_mode()
    def run(self) -> list[Completion]:
        """Return the completions in the requests' order. Raises EngineFailed for NaN."""
        waiting = self._grouped()
        decoding = None
        while waiting or self.rows:
            free = self.size - len(self.rows)
            if waiting and (not self.rows or free * _ENTRY_SHARE >= self.size):
                self._admit(waiting, free)
                decoding = None
            elif self.rows:
                if decoding is None:
                    places = {id(group): place for place, group in enumerate(self.groups)}
                    decoding = Decoding(self.cache, [places[id(row.group)] for row in self.rows])
                if self._decode(decoding):
                    decoding = None
        return [self.completions[number] for number in range(len(self.requests))]

    def _grouped(self) -> list[_Group]:
        """Return the groups of requests that have tokens to sample; complete the others."""
        groups: dict[tuple[int, ...], _Group] = {}
        for number, request in enumerate(self.requests):
            if request.start is not None and len(request.start.ids) >= self.sampling.max_tokens:
                self.completions[number] = request.start._replace(finish_reason="length")
                continue
            context = context_of(request)
            groups.setdefault(context, _Group(context, [])).waiting.append(number)
        return list(groups.values())

    def _admit(self, waiting: list[_Group], free: int) -> None:
        """Let up to `free` requests enter, and sample their first tokens; remove finished groups."""
        entering: list[_Row] = []
        new: list[_Group] = []
        while waiting and len(entering) < free:
            group = waiting[0]
            if group.logits is None:
                new.append(group)
            places = free - len(entering)
            entering += [self._row(number, group) for number in group.waiting[:places]]
            group.waiting = group.waiting[places:]
            if not group.waiting:
                waiting.pop(0)
        for part in _packed(new):
            self._prefill(part)
        logits = torch.stack([_logits_of(row.group) for row in entering])
        is_unfinished = self._append_tokens(entering, logits)
        for row in itertools.compress(entering, is_unfinished):
            row.group.rows += 1
            self.rows.append(row)
        for group in {id(row.group): row.group for row in entering}.values():
            if not group.waiting:
                group.logits = None
        self._drop_groups()

    def _row(self, number: int, group: _Group) -> _Row:
        request, limit = self.requests[number], self.sampling.max_tokens
        started = len(request.start.ids) if request.start else 0
        return _Row(number, group, limit - started, uniforms(request.seed, limit)[started:])

    def _prefill(self, groups: Sequence[_Group]) -> None:
        """Compute the contexts of groups in one pass; each group keeps the logits after its last token."""
        lengths = [len(group.context) for group in groups]
        ids = list(itertools.chain.from_iterable(group.context for group in groups))
        positions = list(itertools.chain.from_iterable(map(range, lengths)))
        last = torch.tensor(list(itertools.accumulate(lengths)), device=self.device) - 1
        logits = self._forward(ids, positions, self.cache.prefill(lengths), last)
        self.groups += groups
        for group, row in zip(groups, logits, strict=True):
            group.logits = row

    def _decode(self, decoding: Decoding) -> bool:
        """Sample the next token of all rows; return True if rows or groups have changed."""
        ages = [len(row.ids) - 1 for row in self.rows]  # the newest token is not in the cache
        positions = [len(row.group.context) + age for row, age in zip(self.rows, ages, strict=True)]
        ids = [row.ids[-1] for row in self.rows]
        logits = self._forward(ids, positions, decoding.step(ages), 0)
        is_unfinished = self._append_tokens(self.rows, logits)
        if all(is_unfinished):
            return False
        for row in itertools.compress(self.rows, [not unfinished for unfinished in is_unfinished]):
            row.group.rows -= 1
        moves = _fill_gaps(self.rows, is_unfinished)
        self.cache.move_rows(moves, max(ages) + 1)
        self._drop_groups()
        return True

    def _forward(
        self, ids: list[int], positions: list[int], attention_pass: AttentionPass, keep: Tensor | int
    ) -> Tensor:
        """Return the logits [n, V] in float32 of the packed tokens at `keep`; 0 keeps all."""
        beat()
        output = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=False,
            attention_pass=attention_pass,
            logits_to_keep=keep,
        )
        return output.logits[0].float()

    def _append_tokens(self, rows: Sequence[_Row], logits: Tensor) -> list[bool]:
        """Sample a token for each row, and complete the rows that end; return True for the others."""
        numbers = np.array([row.uniforms[len(row.ids)] for row in rows])
        chosen = sample(logits, torch.from_numpy(numbers).to(self.device), self.sampling)
        is_unfinished = []
        for row, token, logprob in zip(rows, chosen.ids.tolist(), chosen.logprobs.tolist(), strict=True):
            if math.isnan(logprob):
                found = f"the model returns NaN with weight version {self.version}"
                raise EngineFailed(f"{found}: are the weights damaged?")
            row.ids.append(token)
            row.logprobs.append(logprob)
            stopped = token in self.sampling.stop_ids
            is_unfinished.append(not stopped and len(row.ids) < row.limit)
            if not is_unfinished[-1]:
                self._complete(row, stopped)
        return is_unfinished

    def _complete(self, row: _Row, stopped: bool) -> None:
        start = self.requests[row.number].start or EMPTY
        ids = [*start.ids, *row.ids]
        versions = [*start.versions, (self.version, len(start.ids), len(ids))]
        reason = "stop" if stopped else "length"
        self.completions[row.number] = Completion(ids, [*start.logprobs, *row.logprobs], versions, reason)

    def _drop_groups(self) -> None:
        """Remove groups whose requests have all finished from the cache."""
        is_needed = [bool(group.rows or group.waiting) for group in self.groups]
        if not all(is_needed):
            moves = _fill_gaps(self.groups, is_needed)
            self.cache.move_groups(moves, len(self.groups))


def _logits_of(group: _Group) -> Tensor:
    assert group.logits is not None, "not prefilled"
    return group.logits


def _packed(groups: Sequence[_Group]) -> Iterator[list[_Group]]:
    """Yield consecutive groups whose contexts fit into one forward pass."""
    part: list[_Group] = []
    tokens = 0
    for group in groups:
        if part and tokens + len(group.context) > _PREFILL_TOKENS:
            yield part
            part, tokens = [], 0
        part.append(group)
        tokens += len(group.context)
    if part:
        yield part


def _fill_gaps(items: list[Any], is_kept: Sequence[bool]) -> list[tuple[int, int]]:
    """Remove items by moving the last ones into the gaps; return the moves (source, target)."""
    count = sum(is_kept)
    gaps = [place for place in range(count) if not is_kept[place]]
    sources = [place for place in range(count, len(items)) if is_kept[place]]
    moves = list(zip(sources, gaps, strict=True))
    for source, target in moves:
        items[target] = items[source]
    del items[count:]
    return moves
