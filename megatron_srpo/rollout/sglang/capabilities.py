"""Check, before a run starts, that a server reports all required capabilities."""

import contextlib
import re
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import Sampling
from megatron_srpo.rollout.servers.http import ServerFailed
from megatron_srpo.rollout.servers.replies import InvalidReply
from megatron_srpo.rollout.sglang.api import NUCLEUS, SGLangAPI
from megatron_srpo.rollout.sglang.server import SGLangServer
from megatron_srpo.rollout.sglang.settings import SGLangSettings

Info = Mapping[str, Any]
OLDEST, WITH_SESSIONS = (0, 5, 19), (0, 5, 21)


class Capabilities(NamedTuple):
    """Capabilities that a server reports."""

    version: str  # of SGLang
    needs_session: bool  # weights must be sent between begin and end calls
    is_seeded: bool  # it uses sampling_seed
    tensor_parallel_size: int  # its workers


def inspect(server: SGLangServer, settings: RolloutSection, folder: HFFolder) -> Capabilities:
    """Query the server and sample one token. Raises ConfigError, ServerFailed if it does not respond."""
    found = check(server.url, server.get("/server_info"), server.get("/model_info"), settings, folder)
    if settings.urls:  # a trainer that was killed may have left it in the middle of a publication
        if found.needs_session:
            with contextlib.suppress(ServerFailed):  # usually there is none to end
                server.post("/end_weight_update", {})
        server.post("/continue_generation", {})
    api = SGLangAPI(folder.architecture.vocab_size, found.is_seeded, renormalises=settings.top_p < 1)
    sampling = Sampling(settings.temperature, settings.top_p, 1, ())
    call = api.call(uuid.uuid4().hex, [folder.stop_ids[0]], 1, sampling, "inspect")
    try:
        reply = server.post(call.path, call.body, timeout=settings.section(SGLangSettings).request_timeout)
        api.parse(call, reply, 1, [server.version()])
    except InvalidReply as problem:
        raise ConfigError(f"rollout.engine: {server.url} returns no usable tokens: {problem}") from None
    return found


def check(
    url: str, server_info: Info, model_info: Info, settings: RolloutSection, folder: HFFolder
) -> Capabilities:
    """Return the capabilities in the replies of /server_info and /model_info. Raises ConfigError."""
    version = str(server_info.get("version"))
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    numbers = tuple(map(int, match.groups())) if match else None
    if numbers is None or numbers < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ConfigError(f"rollout.engine: {url} is SGLang {version}; {needed} or newer is needed")
    config = folder.config
    for key in ("model_type", "architectures"):
        if model_info.get(key) is not None and model_info[key] != config.get(key):
            problem = f"{model_info[key]!r}; that of model.hf_path is {config.get(key)!r}"
            raise ConfigError(f"rollout.engine: {url} serves a model whose {key} is {problem}")
    longest = settings.max_prompt_tokens + settings.max_response_tokens
    context = server_info.get("context_length") or folder.architecture.max_position_embeddings
    limits = [context, server_info.get("max_total_num_tokens")]
    limit = min(number for number in limits if number is not None)
    if longest > limit:
        needed = f"with rollout.max_prompt_tokens a sequence has up to {longest} tokens"
        found = f"{url} takes {limit} (--context-length, --max-total-tokens)"
        raise ConfigError(f"rollout.max_response_tokens: {needed}; {found}")
    if settings.top_p < 1 and server_info.get("sampling_mask_max_tokens", 0) < 2 * NUCLEUS:
        needed = f"0.5.23 with --sampling-mask-max-tokens {2 * NUCLEUS} or more"  # twice: tokens may tie
        problem = f"{url} (SGLang {version}) does not return the log-probabilities of what it samples from"
        raise ConfigError(
            f"rollout.top_p: {settings.top_p:g} biases training: {problem}; set 1, or use {needed}"
        )
    if settings.colocated and not server_info.get("enable_memory_saver"):
        raise ConfigError(f"rollout.colocated: {url} was started without --enable-memory-saver")
    for key in ("dp_size", "pp_size"):
        if settings.section(SGLangSettings).update != "disk" and server_info.get(key, 1) > 1:
            option = f"--{key.replace('_', '-')} {server_info[key]}"
            problem = f"{url} has {option}, which takes updates from disk only"
            raise ConfigError(f"rollout.sglang.update: {problem}")
    is_seeded = bool(server_info.get("enable_deterministic_inference"))
    tensor_parallel_size = int(server_info.get("tp_size", 1))
    return Capabilities(version, numbers >= WITH_SESSIONS, is_seeded, tensor_parallel_size)
