"""What a server may answer to /generate: everything in a reply is checked before it is believed."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from megatron_srpo.rollout.engine import Completion

_ROUNDING = 1e-3  # how far above 0 a log-probability may lie


class BadReply(ValueError):
    """The server answered what no correct one can; the message says what."""


def parse(reply: Any, limit: int, vocab_size: int, versions: Collection[str]) -> Completion:
    """The reply's tokens. Raises BadReply.

    Args:
        limit: tokens asked for.
        versions: the weights that may have made the tokens.
    """
    try:
        meta, ids = reply["meta_info"], list(reply["output_ids"])
        reason = meta["finish_reason"]["type"]
        # a request aborted before its first token has neither ids nor log-probabilities
        rows = meta.get("output_token_logprobs") or [] if reason == "abort" else meta["output_token_logprobs"]
        logprobs = [float(row[0]) for row in rows]
        named = [row[1] for row in rows]
        spans = meta.get("weight_versions") or [
            {"version": meta.get("weight_version"), "start": 0, "end": len(ids)}
        ]
        spans = [(str(span["version"]), span["start"], span["end"]) for span in spans] if ids else []
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise BadReply(f"not of the shape of a reply: {type(error).__name__}: {error}") from None
    if reason not in ("stop", "length", "abort"):
        raise BadReply(f"finish_reason {reason!r}")
    if named != ids:
        raise BadReply(
            f"{len(ids)} output_ids, but the log-probabilities are those of {len(named)} other tokens"
        )
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise BadReply(f"an output id is outside the vocabulary of {vocab_size}")
    if not all(math.isfinite(logprob) and logprob <= _ROUNDING for logprob in logprobs):
        raise BadReply("a log-probability is not a finite number below 0")
    if len(ids) > limit or (reason == "length" and len(ids) != limit) or (reason != "abort" and not ids):
        raise BadReply(f"{len(ids)} tokens and finish_reason {reason}; {limit} were asked for")
    if [start for _, start, _ in spans] + [len(ids)] != [0] + [end for _, _, end in spans]:
        raise BadReply(f"weight_versions {spans} do not cover {len(ids)} tokens")
    if strange := {version for version, _, _ in spans} - set(versions):
        raise BadReply(f"made by weights {sorted(strange)}, expected {sorted(versions)}")
    return Completion(ids, logprobs, spans, reason)


def joined(first: Completion | None, second: Completion) -> Completion:
    """The tokens of an aborted attempt and those of the one that went on from it."""
    if first is None or not first.ids:
        return second
    offset = len(first.ids)
    spans = list(first.versions)
    for version, start, end in second.versions:
        if spans[-1][0] == version:
            version, start = version, spans.pop()[1] - offset
        spans.append((version, start + offset, end + offset))
    return Completion(
        [*first.ids, *second.ids], [*first.logprobs, *second.logprobs], spans, second.finish_reason
    )
