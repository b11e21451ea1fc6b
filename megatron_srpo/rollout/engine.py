"""The engine protocol: token ids in, token ids with log-probabilities out, weights as HF-named tensors."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from threading import Event
from typing import Literal, NamedTuple, Protocol

from torch import Tensor


class Sampling(NamedTuple):
    """Sampling parameters. temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_tokens: int
    stop_ids: tuple[int, ...]


class Completion(NamedTuple):
    """One response.

    Attributes:
        ids: Token ids, including a stop token.
        logprobs: One per token, in nats, of the softmax at the sampling temperature (temperature 1 when
            greedy); with top_p, of the distribution sampled from if the settings say `renormalises`.
        versions: Half-open spans (weight version, start, end) of `ids`.
        finish_reason: "abort" marks a partial rollout, which may be empty.
    """

    ids: list[int]
    logprobs: list[float]
    versions: list[tuple[str, int, int]]
    finish_reason: Literal["stop", "length", "abort"]


EMPTY = Completion([], [], [], "abort")


class Request(NamedTuple):
    """One response to sample.

    Attributes:
        prompt_ids: Token ids of the prompt.
        seed: Determines the randomness of the response, independently of its batch.
        start: Partial rollout of an earlier attempt, which the response continues.
    """

    prompt_ids: tuple[int, ...]
    seed: str
    start: Completion | None = None

    def aborted(self) -> Completion:
        """Return the partial rollout without sampling more."""
        return (self.start or EMPTY)._replace(finish_reason="abort")


CompletionStream = Generator[Mapping[int, Completion], None, None]  # by the request's index


class EngineFailed(RuntimeError):
    """The engine can no longer sample; the message has the reason and what to check."""


class Engine(Protocol):
    """An engine that samples with the policy's weights: one folder of rollout/ (see engines.py)."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: Event) -> CompletionStream:
        """Yield the completion of every request once, in any order, while others are in flight.

        Completions that depend on each other's rows are yielded together: a resumed run samples the rest
        with the same bits.
        Once the consumer sets `stop`, requests in flight are aborted, and the rest is yielded as it is
        (finish_reason "abort"). A consumer that does not need the rest may close the iterator instead.

        Raises:
            EngineFailed: The engine can no longer sample.
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Load the streamed (name, tensor) pairs and sample with them from now on. A collective call."""

    def release_memory(self) -> None:
        """Free GPU memory until the next update. A collective call, with no request in flight."""

    def close(self) -> None:
        """Release all resources. May be called on one rank alone."""
