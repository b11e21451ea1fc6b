"""Check replies of any kind of server, and join the parts of a completion."""

import math
from collections.abc import Sequence

from megatron_srpo.rollout.engine import Completion

# what reading a value of an unexpected kind raises: huge numbers and deep nesting included
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
_ROUNDING = 1e-3  # how far above 0 a log-probability may be


class InvalidReply(ValueError):
    """A reply that no correct server sends; the message has the reason."""


def check_tokens(
    ids: Sequence[int], logprobs: Sequence[float], reason: str, limit: int, vocab_size: int
) -> None:
    """Raise InvalidReply unless these can be a response of at most `limit` tokens."""
    if reason not in ("stop", "length", "abort"):
        raise InvalidReply(f"finish_reason {reason!r}")
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise InvalidReply(f"an output id is outside the vocabulary of {vocab_size}")
    if len(logprobs) != len(ids):
        raise InvalidReply(f"{len(ids)} output ids, but {len(logprobs)} log-probabilities")
    if not all(math.isfinite(logprob) and logprob <= _ROUNDING for logprob in logprobs):
        raise InvalidReply("a log-probability is not a finite number below 0")
    if len(ids) > limit or (reason == "length" and len(ids) != limit) or (reason != "abort" and not ids):
        raise InvalidReply(f"{len(ids)} tokens and finish_reason {reason}; {limit} were requested")


def joined(first: Completion | None, second: Completion) -> Completion:
    """Join the completion of an aborted attempt and that of its continuation."""
    if first is None or not first.ids:
        return second
    offset = len(first.ids)
    spans = list(first.versions)
    for version, start, end in second.versions:
        if spans[-1][0] == version:
            version, start = version, spans.pop()[1] - offset
        spans.append((version, start + offset, end + offset))
    ids, logprobs = [*first.ids, *second.ids], [*first.logprobs, *second.logprobs]
    return Completion(ids, logprobs, spans, second.finish_reason)
