"""The engine protocol: token ids in, token ids with log-probabilities out, weights as a stream of HF-named
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor


class Sampling(NamedTuple):
    """How to sample. temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_tokens: int
    stop_ids: tuple[int, ...]


class Completion(NamedTuple):
    """One response. A stop token stays in `ids`. `logprobs` are those of the full softmax at the sampling
    temperature (temperature 1 when greedy); top_p does not renormalise them. `versions`: half-open spans
    (weight version, start, end). finish_reason "abort": broken off, and possibly empty.
    """

    ids: list[int]
    logprobs: list[float]
    versions: list[tuple[str, int, int]]
    finish_reason: Literal["stop", "length", "abort"]


class Request(NamedTuple):
    """One response wanted. `seed` alone decides its randomness, whatever else is sampled beside it.

    start: what an earlier attempt that was broken off has of it; the response goes on from there.
    """

    prompt_ids: tuple[int, ...]
    seed: str
    start: Completion | None = None


# finished({number of a request: its completion}) -> whether that is enough. Called in the thread that called
# `generate`, with what is
# done, in any order. What an engine computes together it hands over together: then what is left is computed
# as it would have been.
# After "enough" the others are broken off and handed over too ("abort"), with what they have.
Finished = Callable[[Mapping[int, Completion]], bool]


class EngineFailed(RuntimeError):
    """The engine cannot sample any more; the message says why and what to look at."""


class Engine(Protocol):
    """What samples. Implementations: `transformers_engine` (in this process), `sglang` (servers)."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished) -> None:
        """One completion a request, handed to `finished` while others still run."""

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Take the whole stream and sample with it from now on, as `version`."""

    def close(self) -> None:
        """Let go of what the engine holds; it is not used again."""
