"""The embedded engine: transformers' model of the folder's architecture, in this process.

It shares no code with the trainer's model: their log-probabilities are compared every step.

Requests are sampled in waves. A wave is a fixed set of requests, sampled by continuous batching (wave.py) and
delivered together at its end. The bits of a sample depend on the rows that are computed with it: matrix
products are rounded differently for other shapes, and experts process the tokens of all rows together. The
schedule within a wave depends on nothing outside it, and a resumed run forms the remaining waves again, so
its samples have the same bits as an uninterrupted run's. Fixed slots whose bits do not depend on their
neighbours would need constant shapes: every pass with all rows and the longest cache.

A wave has WAVE_BATCHES times as many requests as rows are computed at once. With more, fewer rows are idle at
the end of a wave. With fewer, samples are delivered earlier: a stopped run loses at most one wave,
over-sampling stops between waves, and `eval` shows its progress after each. In a simulation of 1,024 answers
in 64 rows, a quarter of the longest answer long on average, 1, 2, 4 and 16 need 1, 0.60, 0.45 and 0.31 as
many passes. On a CPU, where passes with fewer rows are faster, they need 1, 0.88, 0.83 and 0.78 of the time.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Event

import torch
from torch import Tensor

from megatron_srpo.config.rollout_section import WAVE_BATCHES
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.device import model_dtype
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.distributed.startup import without_compiler
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import CompletionStream, Engine, Request, Sampling
from megatron_srpo.rollout.transformers.cache import register_attention
from megatron_srpo.rollout.transformers.linear import discard_copies, is_usable, use_onednn
from megatron_srpo.rollout.transformers.wave import Wave, context_of


def check(config: Config, trains: bool) -> None:
    """Accept every configuration (see rollout/engines.py)."""


def create(config: Config, folder: HFFolder, layout: Layout, say: Callable[[str], None]) -> Engine:
    """Create the engine (see rollout/engines.py)."""
    return TransformersEngine(folder, layout.device, model_dtype(config.model), config.rollout.batch_size)


class TransformersEngine:
    """Sampling in waves of continuous batches. Holds a full copy of the model in `dtype` on `device`."""

    def __init__(self, folder: HFFolder, device: torch.device, dtype: torch.dtype, batch_size: int):
        with without_compiler():
            from transformers.models.auto.configuration_auto import AutoConfig
            from transformers.models.auto.modeling_auto import AutoModelForCausalLM

            config = AutoConfig.from_pretrained(folder.path, local_files_only=True)
            attention = register_attention()
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        self.model = model.to(device).eval()
        if is_usable(device, dtype):
            use_onednn(self.model)
        self.architecture = folder.architecture
        self.device = device
        self.batch_size = batch_size
        self.version = ""

    @torch.no_grad()
    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Copy the stream into the model. Raises ValueError for an unknown, misshapen or missing tensor."""
        discard_copies(self.model)
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
        """Yield waves of similar contexts; `stop` is read between them. Raises EngineFailed for NaN."""
        for numbers in _waves(requests, WAVE_BATCHES * self.batch_size):
            wave = [requests[number] for number in numbers]
            if stop.is_set():
                completions = [request.aborted() for request in wave]
            else:
                completions = Wave(self.model, wave, sampling, self.version, self.batch_size).run()
            yield dict(zip(numbers, completions, strict=True))

    def release_memory(self) -> None:
        """Do nothing: rollout.colocated is for servers."""

    def close(self) -> None:
        """Do nothing: the model's memory is freed with this object."""


def _waves(requests: Sequence[Request], size: int) -> Iterator[list[int]]:
    """Yield the indices of waves of up to `size` requests, shortest contexts first.

    Requests with the same context are in one wave unless they exceed `size`. Without some of the first waves,
    the others are the same.
    """
    contexts = [context_of(request) for request in requests]
    order = sorted(range(len(requests)), key=lambda number: (len(contexts[number]), contexts[number]))
    wave: list[int] = []
    for _, members in itertools.groupby(order, key=contexts.__getitem__):
        group = list(members)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            if len(wave) + len(part) > size:
                yield wave
                wave = []
            wave += part
    if wave:
        yield wave
