"""SGLang's /generate: the request, and the reply, which is checked before it is used."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_srpo.rollout.engine import Completion, Sampling
from megatron_srpo.rollout.servers.generation import Call
from megatron_srpo.rollout.servers.replies import InvalidReply, check_tokens


@dataclass(eq=False)
class SGLangAPI:
    """See `CompletionsAPI`. is_seeded: the servers use sampling_seed."""

    health_path = "/health"
    version_path = "/model_info"

    vocab_size: int
    is_seeded: bool

    def call(self, request_id: str, ids: list[int], limit: int, sampling: Sampling, seed: str) -> Call:
        parameters = {
            "max_new_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": not sampling.stop_ids,  # else it stops at its own, too
            "skip_special_tokens": False,
        }
        if self.is_seeded:
            digest = hashlib.sha256(seed.encode()).digest()
            parameters["sampling_seed"] = int.from_bytes(digest[:4], "little") >> 1
        body = {"rid": request_id, "input_ids": ids, "return_logprob": True, "sampling_params": parameters}
        return Call("/generate", body)

    def parse(self, reply: Any, limit: int, versions: Sequence[str]) -> Completion:
        return parse(reply, limit, self.vocab_size, versions)

    def abort_call(self, request_id: str) -> Call | None:
        return Call("/abort_request", {"rid": request_id})

    def has_version(self, info: Any, version: str) -> bool:
        return str(info["weight_version"]) == version


def parse(reply: Any, limit: int, vocab_size: int, versions: Sequence[str]) -> Completion:
    """Return the completion in a JSON reply (see `CompletionsAPI.parse`). Raises InvalidReply."""
    try:
        meta, ids = reply["meta_info"], list(reply["output_ids"])
        reason = meta["finish_reason"]["type"]
        # a request aborted before its first token has neither ids nor log-probabilities
        rows = meta.get("output_token_logprobs") or [] if reason == "abort" else meta["output_token_logprobs"]
        logprobs = [float(row[0]) for row in rows]
        named = [row[1] for row in rows]
        whole = {"version": meta.get("weight_version"), "start": 0, "end": len(ids)}
        spans = meta.get("weight_versions") or [whole]
        spans = [(str(span["version"]), span["start"], span["end"]) for span in spans] if ids else []
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise InvalidReply(f"not of the shape of a reply: {type(error).__name__}: {error}") from None
    if named != ids:
        found = f"the log-probabilities are those of {len(named)} other tokens"
        raise InvalidReply(f"{len(ids)} output_ids, but {found}")
    check_tokens(ids, logprobs, reason, limit, vocab_size)
    if [start for _, start, _ in spans] + [len(ids)] != [0] + [end for _, _, end in spans]:
        raise InvalidReply(f"weight_versions {spans} do not cover {len(ids)} tokens")
    unexpected = {version for version, _, _ in spans} - set(versions)
    if unexpected:
        raise InvalidReply(f"made by weights {sorted(unexpected)}, expected {sorted(versions)}")
    return Completion(ids, logprobs, spans, reason)
