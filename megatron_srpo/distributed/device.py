"""Dtype and layer implementation of the model on this process's device."""

import importlib.util

import torch

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.schema import ModelSection


def model_dtype(model: ModelSection, on_gpu: bool | None = None) -> torch.dtype:
    """Return the dtype of weights and activations: model.dtype, or bfloat16 on CUDA and float32 on CPU."""
    if model.dtype == "auto":
        on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
        return torch.bfloat16 if on_gpu else torch.float32
    return getattr(torch, model.dtype)


def uses_transformer_engine(model: ModelSection) -> bool:
    """Return True if layers are Transformer Engine's. Raises ConfigError if required but not available."""
    available = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if model.transformer_impl == "transformer_engine" and not available:
        needs = "transformer_engine needs CUDA and its package installed"
        raise ConfigError(f"model.transformer_impl: {needs}; use auto or local")
    return available and model.transformer_impl != "local"
