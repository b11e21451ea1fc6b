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

    `logprobs`: one a token, in nats, of the full softmax at the sampling temperature (temperature 1 when
    greedy); top_p does not renormalise them.
    """

    ids: list[int]  # token ids; a stop token is included
    logprobs: list[float]
    versions: list[tuple[str, int, int]]  # half-open spans (weight version, start, end) of `ids`
    finish_reason: Literal["stop", "length", "abort"]  # "abort": a partial rollout, possibly empty


EMPTY = Completion([], [], [], "abort")


class Request(NamedTuple):
    """One response to sample."""

    prompt_ids: tuple[int, ...]
    seed: str  # decides the randomness of the response alone, whatever else is in its batch
    start: Completion | None = None  # partial rollout of an earlier attempt, which the response continues

    def aborted(self) -> Completion:
        """Return what is there without sampling more."""
        return (self.start or EMPTY)._replace(finish_reason="abort")


CompletionStream = Generator[Mapping[int, Completion], None, None]  # by the request's index


class EngineFailed(RuntimeError):
    """The engine cannot sample any more; the message says why and what to look at."""


class Engine(Protocol):
    """Samples with the policy's weights. Each implementation is a folder of rollout/ (see engines.py)."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: Event) -> CompletionStream:
        """Yield the completion of every request once, in any order, while others still run.

        Completions of one engine batch are yielded together: a resumed run re-batches the rest identically.
        Once the consumer has set `stop`, what still runs is aborted, and the rest is yielded as it is
        (finish_reason "abort"). A consumer that needs no rest may close the iterator instead.

        Raises EngineFailed.
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Consume the stream of tensors and sample with them from now on. All ranks together."""

    def release_memory(self) -> None:
        """Give GPU memory to the trainer until the next update. All ranks together, when none samples."""

    def close(self) -> None:
        """Release all resources. May be called on one rank alone."""
