"""/v1/completions with token ids in both directions, as vLLM and SGLang extend OpenAI's.

Extensions: `return_token_ids`, `stop_token_ids`, `ignore_eos` and `skip_special_tokens`; a reply's choices[0]
has token_ids. The log-probabilities must be those of the sampling temperature: SGLang's are; vLLM's are with
--logprobs-mode processed_logprobs, which renormalises under top_p, or at temperature 1.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_srpo.rollout.engine import Completion, Sampling
from megatron_srpo.rollout.servers.generation import Call
from megatron_srpo.rollout.servers.replies import InvalidReply, check_tokens


@dataclass(eq=False)
class OpenAICompletions:
    """See `CompletionsAPI`. No server says which weights it has: replies count as made by the newest."""

    model: str  # name that requests and replies carry
    vocab_size: int
    weights_change: bool  # a server in quarantine may miss an update, and waits for the next one
    health_path = "/health"
    version_path = "/v1/models"

    def call(self, request_id: str, ids: list[int], limit: int, sampling: Sampling, seed: str) -> Call:
        digest = hashlib.sha256(seed.encode()).digest()
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": int.from_bytes(digest[:4], "little") >> 1,
            "logprobs": 1,
            "return_token_ids": True,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": not sampling.stop_ids,  # else it stops at its own, too
            "skip_special_tokens": False,
        }
        return Call("/v1/completions", body)

    def parse(self, reply: Any, limit: int, versions: Sequence[str]) -> Completion:
        try:
            model, choice = reply["model"], reply["choices"][0]
            reason, ids = choice["finish_reason"], choice["token_ids"]
        except (KeyError, TypeError, IndexError) as error:
            raise InvalidReply(f"not of the shape of a reply: {type(error).__name__}: {error}") from None
        if model != self.model:
            raise InvalidReply(f"made by model {model!r}, expected {self.model!r}")
        if not isinstance(ids, list):
            raise InvalidReply("token_ids is missing: the server does not support return_token_ids")
        try:
            logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        except (KeyError, TypeError, ValueError):
            raise InvalidReply("token_logprobs is missing or has a value that is no number") from None
        check_tokens(ids, logprobs, reason, limit, self.vocab_size)
        return Completion(ids, logprobs, [(versions[-1], 0, len(ids))] if ids else [], reason)

    def abort_call(self, request_id: str) -> Call | None:
        return None  # a server aborts a request whose connection is closed

    def has_version(self, info: Any, version: str) -> bool:
        return not self.weights_change
