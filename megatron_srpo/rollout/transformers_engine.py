"""The embedded engine: transformers' model of the folder's architecture, in this process.

An implementation of the model that shares nothing with the trainer's: their log-probabilities are compared
every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_srpo.distributed.heartbeat import beat
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import Completion, EngineFailed, Finished, Request, Sampling


class TransformersEngine:
    """Batched sampling with a KV cache. Holds a full copy of the model in `dtype` on `device`."""

    def __init__(self, folder: HFFolder, device: torch.device, dtype: torch.dtype, batch_size: int):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder.path, local_files_only=True)
        self.model = (
            AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
            .to(device)
            .eval()
        )
        self.architecture = folder.architecture
        self.device, self.batch_size, self.version = device, batch_size, None

    @torch.no_grad()
    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Copy the stream into the model.

        Raises ValueError when a tensor is unknown, misshapen or missing.
        """
        own = {
            stored: tensor
            for name, parameter in self.model.named_parameters()
            for stored, tensor in self.architecture.stored_tensors(name, parameter)
        }
        for name, tensor in tensors:
            parameter = own.pop(name, None)
            if parameter is None or parameter.shape != tensor.shape:
                raise ValueError(
                    f"weight update: {name} {list(tensor.shape)} does not fit the engine's model"
                )
            parameter.copy_(tensor)
        if own:
            raise ValueError(f"weight update: {len(own)} tensors did not arrive, first {next(iter(own))}")
        self.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished) -> None:
        """See `Engine.generate`. Prompts of like length are batched together; the results depend on it by
        rounding alone.

        "Enough" is heard between batches. Raises EngineFailed for a model that gives NaN.
        """
        order = sorted(range(len(requests)), key=lambda number: _length(requests[number]))
        is_enough = False
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            batch = [requests[number] for number in numbers]
            completions = (
                [_broken_off(request) for request in batch]
                if is_enough
                else self._generate_batch(batch, sampling)
            )
            is_enough |= finished(dict(zip(numbers, completions, strict=True)))

    def close(self) -> None:
        """Nothing is held outside this process."""

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        begun = [0 if request.start is None else len(request.start.ids) for request in requests]
        ids, mask = self._left_padded(
            [(*request.prompt_ids, *(request.start.ids if request.start else ())) for request in requests]
        )
        uniforms = np.stack([_uniforms(request.seed, sampling.max_tokens) for request in requests])
        uniforms = torch.from_numpy(uniforms).to(self.device)
        stops, begun_at = (
            torch.tensor(sampling.stop_ids, device=self.device),
            torch.tensor(begun, device=self.device),
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, live = None, torch.arange(len(requests), device=self.device)
        tokens = torch.zeros(len(requests), sampling.max_tokens, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(len(requests), sampling.max_tokens, device=self.device)
        for step in range(sampling.max_tokens - min(begun)):
            beat()
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            place = (begun_at[live] + step).clamp(
                max=sampling.max_tokens - 1
            )  # a row at its limit is carried on with others
            chosen, chosen_logprobs = _sample(output.logits[:, -1].float(), uniforms[live, place], sampling)
            tokens[live, step], logprobs[live, step] = chosen, chosen_logprobs
            going = ~torch.isin(chosen, stops) & (begun_at[live] + step + 1 < sampling.max_tokens)
            if not going.any():
                break
            ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            positions = positions[:, -1:] + 1
            if going.sum() <= 3 * len(live) // 4:  # a quarter is done: carry only the others on
                keep = going.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                live, ids, mask, positions = live[keep], ids[keep], mask[keep], positions[keep]
        if logprobs.isnan().any():
            raise EngineFailed(
                f"the model of weight version {self.version} gives no numbers (NaN): are its weights damaged?"
            )
        return [
            self._completion(*row, sampling)
            for row in zip(requests, tokens.tolist(), logprobs.tolist(), strict=True)
        ]

    def _completion(
        self, request: Request, tokens: list[int], logprobs: list[float], sampling: Sampling
    ) -> Completion:
        """A finished row may have been carried on with others: what stands after its first stop token is not
        its own.
        """
        start = request.start or Completion([], [], [], "abort")
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


def _length(request: Request) -> int:
    return len(request.prompt_ids) + (0 if request.start is None else len(request.start.ids))


def _broken_off(request: Request) -> Completion:
    return (
        Completion([], [], [], "abort")
        if request.start is None
        else request.start._replace(finish_reason="abort")
    )


def _uniforms(seed: str, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) that belong to `seed`: a sample's randomness does not depend on its
    batch.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed.encode())))).random(count)


def _sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Token ids [n] and their log-probabilities [n], by inverting the cumulative distribution at `uniforms`
    [n].
    """
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        best = logits.argmax(-1)
        return best, logprobs.gather(1, best[:, None])[:, 0]
    logprobs, ids = (logits / sampling.temperature).log_softmax(-1), None
    if sampling.top_p < 1:  # only this needs them in order
        logprobs, ids = logprobs.sort(dim=-1, descending=True)
    mass = logprobs.double().exp().cumsum(-1)
    total = mass[:, -1]
    if sampling.top_p < 1:  # the smallest set of tokens whose mass reaches top_p
        kept = (mass < sampling.top_p * total[:, None]).sum(-1, keepdim=True).clamp(max=mass.shape[1] - 1)
        total = mass.gather(1, kept)[:, 0]
    place = (mass <= (uniforms * total)[:, None]).sum(-1, keepdim=True).clamp(max=mass.shape[1] - 1)
    chosen = place if ids is None else ids.gather(1, place)
    return chosen[:, 0], logprobs.gather(1, place)[:, 0]
