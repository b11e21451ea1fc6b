"""The planner's inputs: a machine's data sheet, and the expected lengths of samples."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.device import model_dtype


class Machine(NamedTuple):
    """One accelerator and its links, in bytes, FLOP/s and bytes/s: the vendor's figures, one way, dense.

    Attributes:
        network_bandwidth: Of the GPU's own network adapter (50e9 is 400 Gb/s).
        host_bandwidth: To host memory (PCIe 5 or 4, 16 lanes).
        mfu: Assumed share of the peak in matrix products.
        reserve: Assumed bytes for CUDA's context, NCCL, cuBLAS and fragmentation; on a CPU for the
            interpreter with its libraries (0.5 GB after all imports, 2026-11-29).
    """

    name: str
    memory: float
    peak: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    gpus_per_node: int = 8
    mfu: float = 0.40
    reserve: float = 5e9

    @property
    def is_gpu(self) -> bool:
        """True if the machine computes in bf16 with fused kernels."""
        return self.name != "cpu"

    def bandwidth(self, ranks: int, abreast: int = 1) -> float:
        """Return a rank's bytes/s in a group of `ranks`; across nodes, `abreast` groups share adapters."""
        if ranks <= self.gpus_per_node:
            return self.node_bandwidth
        return min(self.node_bandwidth, self.network_bandwidth * max(1, self.gpus_per_node // abreast))


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("h100", 80e9, 989e12, 3.35e12, 450e9, 50e9, 64e9),
        Machine("h200", 141e9, 989e12, 4.8e12, 450e9, 50e9, 64e9),
        Machine("h20", 96e9, 148e12, 4.0e12, 450e9, 50e9, 64e9),
        Machine("a100", 80e9, 312e12, 2.0e12, 300e9, 25e9, 32e9),
        Machine("cpu", 16e9, 0.05e12, 0.01e12, 5e9, 1e9, 5e9, mfu=0.5, reserve=0.6e9),
    )
}


class Workload(NamedTuple):
    """Expected tokens of a sample, as means; `distilled_share` is the share of the response tokens."""

    prompt_tokens: int
    response_tokens: int
    distilled_share: float

    @classmethod
    def expected(cls, config: Config) -> Workload:
        """Assume an eighth of the limits, as in the papers' runs, and the algorithm's distilled share."""
        prompt = max(1, config.rollout.max_prompt_tokens // 8)
        response = max(1, config.rollout.max_response_tokens // 8)
        return cls(prompt, response, config.algorithm.expected_distilled_share)

    @property
    def document(self) -> int:
        """Tokens of a sample."""
        return self.prompt_tokens + self.response_tokens

    def teacher_document(self, config: Config) -> int:
        """Return the teacher's tokens of a sample; its prompt adds a sibling's response and 40 tokens."""
        return min(config.teacher.max_prompt_tokens, self.document + 40) + self.response_tokens


def planned_dtype(config: Config, machine: Machine) -> torch.dtype:
    """Return the dtype of weights and activations on the planned machine."""
    return model_dtype(config.model, machine.is_gpu)
