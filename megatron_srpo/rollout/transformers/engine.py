"""The embedded engine: transformers' model of the folder's architecture, in this process.

It shares no code with the trainer's model: their log-probabilities are compared every step.
"""

from collections.abc import Callable, Iterable, Sequence
from threading import Event
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.device import model_dtype
from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.distributed.startup import without_compiler
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import (
    EMPTY,
    Completion,
    CompletionStream,
    Engine,
    EngineFailed,
    Request,
    Sampling,
)


def check(config: Config, trains: bool) -> None:
    """Accept every configuration (see rollout/engines.py)."""


def create(config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None]) -> Engine:
    """Create the engine (see rollout/engines.py)."""
    return TransformersEngine(folder, layout.device, model_dtype(config.model), config.rollout.batch_size)


class TransformersEngine:
    """Batched sampling with a KV cache. Holds a full copy of the model in `dtype` on `device`."""

    def __init__(self, folder: HFFolder, device: torch.device, dtype: torch.dtype, batch_size: int):
        with without_compiler():
            from transformers.models.auto.configuration_auto import AutoConfig
            from transformers.models.auto.modeling_auto import AutoModelForCausalLM

            config = AutoConfig.from_pretrained(folder.path, local_files_only=True)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.model = model.to(device).eval()
        self.architecture = folder.architecture
        self.device = device
        self.batch_size = batch_size
        self.version = ""

    @torch.no_grad()
    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Copy the stream into the model. Raises ValueError for an unknown, misshapen or missing tensor."""
        own: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            own.update(self.architecture.stored_tensors(name, parameter))
        for name, tensor in tensors:
            parameter = own.pop(name, None)
            if parameter is None or parameter.shape != tensor.shape:
                shape = list(tensor.shape)
                raise ValueError(f"weight update: {name} {shape} does not fit the engine's model")
            parameter.copy_(tensor)
        if own:
            raise ValueError(f"weight update: {len(own)} tensors did not arrive, first {next(iter(own))}")
        self.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: Event) -> CompletionStream:
        """Batch requests of similar length; `stop` is read between batches. Raises EngineFailed for NaN."""
        order = sorted(range(len(requests)), key=lambda number: len(_context(requests[number])))
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            batch = [requests[number] for number in numbers]
            if stop.is_set():
                completions = [request.aborted() for request in batch]
            else:
                completions = self._generate_batch(batch, sampling)
            yield dict(zip(numbers, completions, strict=True))

    def release_memory(self) -> None:
        """Do nothing: rollout.colocated is for servers."""

    def close(self) -> None:
        """Do nothing: the model's memory is freed with this object."""

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        started = [len(request.start.ids) if request.start else 0 for request in requests]  # tokens
        ids, mask = self._left_padded([_context(request) for request in requests])
        uniforms = np.stack([_uniforms(request.seed, sampling.max_tokens) for request in requests])
        uniforms = torch.from_numpy(uniforms).to(self.device)
        stop_ids = torch.tensor(sampling.stop_ids, device=self.device)
        offsets = torch.tensor(started, device=self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = None
        live = torch.arange(len(requests), device=self.device)
        tokens = torch.zeros(len(requests), sampling.max_tokens, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(len(requests), sampling.max_tokens, device=self.device)
        for step in range(sampling.max_tokens - min(started)):
            beat()
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            output = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            # a finished row may stay in the batch, past its limit
            place = (offsets[live] + step).clamp(max=sampling.max_tokens - 1)
            chosen = _sample(output.logits[:, -1].float(), uniforms[live, place], sampling)
            tokens[live, step] = chosen.ids
            logprobs[live, step] = chosen.logprobs
            unfinished = ~torch.isin(chosen.ids, stop_ids) & (offsets[live] + step + 1 < sampling.max_tokens)
            if not unfinished.any():
                break
            ids = chosen.ids[:, None]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            positions = positions[:, -1:] + 1
            if unfinished.sum() <= 3 * len(live) // 4:  # a quarter is done: shrink the batch
                keep = unfinished.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                live, ids, mask, positions = live[keep], ids[keep], mask[keep], positions[keep]
        if logprobs.isnan().any():
            found = f"the model returns NaN with weight version {self.version}"
            raise EngineFailed(f"{found}: are the weights damaged?")
        rows = zip(requests, tokens.tolist(), logprobs.tolist(), strict=True)
        return [self._completion(*row, sampling) for row in rows]

    def _completion(
        self, request: Request, tokens: list[int], logprobs: list[float], sampling: Sampling
    ) -> Completion:
        """Cut a row after its first stop token or at its limit: finished rows may stay in the batch."""
        start = request.start or EMPTY
        tokens = tokens[: sampling.max_tokens - len(start.ids)]
        end = next((place + 1 for place, token in enumerate(tokens) if token in sampling.stop_ids), None)
        reason = "length" if end is None else "stop"
        end = end or len(tokens)
        versions = [*start.versions, (self.version, len(start.ids), len(start.ids) + end)]
        return Completion([*start.ids, *tokens[:end]], [*start.logprobs, *logprobs[:end]], versions, reason)

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device)


def _context(request: Request) -> tuple[int, ...]:
    return request.prompt_ids + tuple(request.start.ids if request.start else ())


def _uniforms(seed: str, count: int) -> np.ndarray:
    """Return `count` uniform numbers in [0, 1) for a sample's seed, independently of its batch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed.encode())))).random(count)


class _Chosen(NamedTuple):
    ids: Tensor  # [n]
    logprobs: Tensor  # [n], nats


def _sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> _Chosen:
    """Sample a token for each row of logits [n, V]: invert the cumulative distribution at uniforms [n]."""
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        best = logits.argmax(-1)
        return _Chosen(best, logprobs.gather(1, best[:, None])[:, 0])
    logprobs, ids = (logits / sampling.temperature).log_softmax(-1), None
    if sampling.top_p < 1:  # only top_p needs them sorted
        logprobs, ids = logprobs.sort(dim=-1, descending=True)
    mass = logprobs.double().exp().cumsum(-1)
    total = mass[:, -1]
    renormalisation = torch.zeros_like(total)
    if sampling.top_p < 1:  # the smallest set of tokens whose mass reaches top_p
        kept = (mass < sampling.top_p * total[:, None]).sum(-1, keepdim=True).clamp(max=mass.shape[1] - 1)
        nucleus = mass.gather(1, kept)[:, 0]
        total, renormalisation = nucleus, (nucleus / total).log()
    place = (mass <= (uniforms * total)[:, None]).sum(-1, keepdim=True).clamp(max=mass.shape[1] - 1)
    chosen = place if ids is None else ids.gather(1, place)
    return _Chosen(chosen[:, 0], logprobs.gather(1, place)[:, 0] - renormalisation.float())
